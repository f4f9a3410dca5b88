"""How much work there is: from counts of tokens to operations, bytes and passes. What is multiplied here is stated here.

An *amount* is a number with a name; `UNITS` says of what. All are of one process; `SHARED` ones add up where processes share a
processor (a CPU), and are divided where several GPUs hold one copy of the weights.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from stages.costs.shape import Shape

Amounts = dict[str, float]

UNITS = {
    "product_flop": "operations of matrix products and attention over whole texts: updates, log-probabilities, prompts",
    "activation_bytes": "bytes of activations and logits that such a pass writes and reads between its products",
    "passes": "calls of a layer with a micro-batch: a forward pass is one, a backward pass counts for two",
    "decode_flop": "operations of decoding, where a product has at most a column for each answer in flight",
    "decode_bytes": "bytes of weights, keys, values and logits that decoding reads",
    "token_steps": "steps of decoding: each gives every answer in flight a token",
    "optimizer_bytes": "bytes that clipping and AdamW read and write",
    "answers": "answers or documents prepared, judged and recorded",
    "steps": "steps of the stage's loop, or chunks",
    "exchange_bytes": "bytes that a process sends others",
    "stored_bytes": "bytes of models and checkpoints read, written and digested",
    "starts": "processes started",
}
SHARED = ("product_flop", "activation_bytes", "decode_flop", "decode_bytes", "optimizer_bytes")
ADAM_TRAFFIC = 40
"""Bytes of a float32 weight that an update moves: 28 by AdamW (weight, gradient and two moments read, three written), 4 for the
norm, 8 for clipping."""
LOGIT_PASSES = 4
"""How often a row of logits is read or written: written, its maximum, its exponentials, its sum."""


@dataclass(frozen=True)
class Texts:
    """What goes through a model in whole texts."""

    tokens: float = 0.0
    attended: float = 0.0
    """Keys seen, summed over all tokens."""
    predicted: float = 0.0
    """Tokens whose probability is asked for."""
    batches: float = 0.0
    """Micro-batches."""

    def times(self, factor: float) -> "Texts":
        """So many of them."""
        return Texts(self.tokens * factor, self.attended * factor, self.predicted * factor, self.batches * factor)


@dataclass(frozen=True)
class Sampled:
    """What is sampled."""

    prompts: float = 0.0
    prompt_tokens: float = 0.0
    prompt_attended: float = 0.0
    answers: float = 0.0
    tokens: float = 0.0
    context: float = 0.0
    """Keys seen, summed over all sampled tokens."""
    steps: float = 0.0
    """Steps of decoding."""


def packed_texts(prompts: Iterable[tuple[int, list[int]]], micro_tokens: int) -> Texts:
    """Prompts with the lengths of their answers, as the engine packs them: a prompt once, answers without their last token.

    At most: what prompts begin with in common, and answers that are the same, the engine computes once (packing/pack.py).
    """
    tokens = attended = predicted = 0.0
    for prompt, answers in prompts:
        tokens += prompt
        attended += prompt * (prompt + 1) / 2
        for answer in answers:
            computed = answer - 1
            tokens += computed
            attended += computed * prompt + computed * (computed + 1) / 2
            predicted += answer
    return Texts(tokens, attended, predicted, max(1.0, -(-tokens // micro_tokens)) if tokens else 0.0)


def forward_flop(shape: Shape, texts: Texts) -> float:
    """Operations of a forward pass: two for each weight a token goes through, attention, the head on predicted tokens."""
    return _weights_flop(shape, texts) + shape.seen() * texts.attended


def _weights_flop(shape: Shape, texts: Texts) -> float:
    return 2 * shape.body * texts.tokens + 2 * shape.head * texts.predicted


def pass_amounts(
    shape: Shape, trained: Texts, read: Texts, item: int, *, recompute: bool = False, adapters: int | None = None
) -> Amounts:
    """Of forward and backward over `trained`, and forward alone over `read`. Backward takes twice a forward's operations.

    item: bytes of a number; recompute: layers are computed again for their gradient; adapters: weights of low-rank adapters,
    where they alone are trained: the others' products need no gradient for their weights.
    """
    times = 4 if recompute else 3
    update = times * forward_flop(shape, trained)
    if adapters is not None:
        update += times * 2 * adapters * trained.tokens - _weights_flop(shape, trained)
    logits = shape.vocabulary * item * LOGIT_PASSES
    return {
        "product_flop": update + forward_flop(shape, read),
        "activation_bytes": shape.kept(item) * (times * trained.tokens + read.tokens)
        + logits * (2 * trained.predicted + read.predicted),
        "passes": shape.layers * (times * trained.batches + read.batches),
    }


def sample_amounts(shape: Shape, sampled: Sampled, item: int, *, steps: float | None = None) -> Amounts:
    """Of reading prompts and decoding answers; `steps`: of decoding, if not one for each token of the longest."""
    steps = sampled.steps if steps is None else steps
    rows = sampled.tokens / max(steps, 1.0)
    prompts = 2 * shape.body * sampled.prompt_tokens + shape.seen() * sampled.prompt_attended + 2 * shape.head * sampled.prompts
    return {
        "product_flop": prompts,
        "decode_flop": 2 * (shape.body + shape.head) * sampled.tokens + shape.seen(decoding=True) * sampled.context,
        "decode_bytes": steps * shape.touched(rows) * item
        + sampled.context * shape.context_bytes(item)
        + sampled.tokens * shape.vocabulary * 4 * LOGIT_PASSES,
        "token_steps": steps,
    }


def added(*parts: Amounts) -> Amounts:
    """Their sum."""
    return {name: sum(part.get(name, 0.0) for part in parts) for name in UNITS if any(name in part for part in parts)}


def scaled(amounts: Amounts, factor: float) -> Amounts:
    """So many times as much."""
    return {name: value * factor for name, value in amounts.items()}
