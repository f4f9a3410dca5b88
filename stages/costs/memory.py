"""Memory of one GPU, or of one process on a CPU, at the peak of an update.

States as the ZeRO paper counts them (arXiv 1910.02054, section 3), but with gradients summed in float32: with AdamW in mixed
precision 2 + 4 + 12 bytes a weight, of which ZeRO 1 spreads the 12 (master weight and two moments) over the processes, ZeRO 2
the gradients too, ZeRO 3 all. Without ZeRO they are spread as well (stages/engine/deepspeed_engine.py). In float32 a weight is
its own master: 4 + 4 + 8. What DeepSpeed holds beside that is counted as its pinned version has it.
"""

from dataclasses import dataclass

from stages.costs.shape import Shape

REDUCED = 500_000_000
"""Numbers of gradients that DeepSpeed's ZeRO 1 to 3 sum at once (`reduce_bucket_size`)."""
LIVE = 1_000_000_000
"""Weights that ZeRO-3 holds gathered at once (`stage3_max_live_parameters`)."""
PREFETCHED = 50_000_000
"""Weights that ZeRO-3 gathers at once (`stage3_prefetch_bucket_size`)."""
HEAD_ROWS = 1024
"""Predicted tokens that go through the head at once (stages/engine/scorer.py)."""


@dataclass(frozen=True)
class Memory:
    """Bytes, by what they are for."""

    weights: float
    gradients: float
    optimizer: float
    """Moments, and in mixed precision the master weights."""
    working: float
    """DeepSpeed's buckets and flat copies; under ZeRO-3 the gathered weights."""
    activations: float
    logits: float
    other: float = 0.0
    """Reference, sampler's weights, keys and values."""
    offloaded: float = 0.0
    """On the CPU instead."""

    @property
    def total(self) -> float:
        """All of it but what is offloaded."""
        held: dict[str, float] = vars(self)
        return sum(value for name, value in held.items() if name != "offloaded")


def training_memory(
    shape: Shape,
    *,
    zero: int,
    processes: int,
    item: int,
    micro_tokens: int,
    trained: float | None = None,
    recompute: bool = False,
    offload: bool = False,
    touched_only: bool = False,
    other: float = 0.0,
) -> Memory:
    """Of one process. item: bytes of a number; trained: weights of adapters, where they alone are trained (None: all);
    offload: optimizer (and under ZeRO-3 weights) live on the CPU (ZeRO-Offload).

    touched_only: on a CPU, where memory counts when it is written to; a GPU's allocator takes whole buckets.
    """
    n, weights, held = processes, float(shape.parameters), float(shape.parameters * item)
    own = item  # bytes of a trained number
    if trained is None:
        trained = weights
    else:  # adapters are float32 beside weights of any format
        own, weights, held = 4, weights + trained, held + trained * 4
    mixed = own == 2
    states = {
        "weights": held / (n if zero == 3 else 1),
        "gradients": trained * 4 / (n if zero >= 2 else 1),
        "optimizer": trained * (12 if mixed else 8) / (n if zero >= 1 or mixed else 1),
    }
    if zero in (1, 2) and own == 4:
        states["optimizer"] += trained * 4 / n  # DeepSpeed clones its share of float32 weights all the same
    offloaded = 0.0
    if offload and zero:
        moved = ("optimizer", "weights") if zero == 3 else ("optimizer",)
        offloaded = sum(states[name] for name in moved)
        states |= dict.fromkeys(moved, 0.0)
    bucket = min(trained, REDUCED) if touched_only else REDUCED
    working = bucket * own if zero >= (2 if mixed else 1) else 0.0
    if zero in (1, 2) and not mixed:
        working += trained * own / n  # its share of the summed gradients once more, flat
    if zero <= 1 and mixed and n > 1:
        working += trained * 4  # ... and all of them, for their sum over the processes
    if zero == 3:
        # Weights as they are gathered and gathered; the bucket's copy, cut by process, that is scattered (gloo clones it).
        working += (min(weights, PREFETCHED) + min(weights, LIVE)) * item + bucket * (2 if touched_only else 1) * own
    kept = shape.kept(item) * micro_tokens
    if recompute:  # each layer's input, and one layer while it is computed again
        kept = round(shape.layers * shape.hidden * item * micro_tokens + kept / shape.layers)
    logits = float(min(micro_tokens, HEAD_ROWS) * shape.vocabulary * item)
    return Memory(**states, working=working, activations=float(kept), logits=logits, other=other, offloaded=offloaded)
