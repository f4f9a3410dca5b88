"""The supervised loop: packed documents, completion-only loss, AdamW under DeepSpeed, exact resume.

Which documents a step takes is a function of (seed, step), so a resumed run needs nothing but the step. The loss of a step is
the mean over its predicted tokens, all ranks and micro-batches together.
"""

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from stages.engine import ranks
from stages.engine.checkpoints import Checkpointer
from stages.engine.deepspeed_engine import Engine
from stages.engine.packed import Packed, Text, micro_batches
from stages.engine.profile import traced
from stages.store.clock import clock
from stages.store.errors import Interrupted
from stages.store.files import whole_folder
from stages.store.stage import StageContext
from stages.supervised.settings import Supervised
from stages.tracking.journal import Journal


def documents_of_step(count: int, places: int, batch: int, seed: int, step: int) -> list[int]:
    """Which of `count` documents step `step` (from 0) takes: epochs, each shuffled anew, cut into batches of `batch`.

    `places`: documents of all steps together; the last step takes what is left of them.
    """
    chosen: list[int] = []
    for place in range(step * batch, min((step + 1) * batch, places)):
        epoch, index = divmod(place, count)
        chosen.append(_order(count, seed, epoch)[index])
    return chosen


_orders: dict[tuple[int, int, int], list[int]] = {}


def _order(count: int, seed: int, epoch: int) -> list[int]:
    key = (count, seed, epoch)
    if key not in _orders:
        _orders.clear()
        _orders[key] = list(range(count))
        random.Random(f"documents-{seed}-{epoch}").shuffle(_orders[key])
    return _orders[key]


def train(
    context: StageContext[Any], engine: Engine, tokenizer: Any, documents: Sequence[Text], places: int, settings: Supervised
) -> dict[str, float]:
    """Train on `places` documents (more than there are: epochs) and write the model; returns the headline metrics.

    Raises Interrupted after a checkpoint when a stop was asked for.
    """
    folder, seed = context.folder, context.config.seed
    steps = -(-places // settings.batch)
    checkpoints = Checkpointer(folder.checkpoints, settings.checkpoints, context.rank)
    continues = context.inputs.get("continues")
    stored = checkpoints.restore(context.world_size, continues)
    first, loss, copy = 0, 0.0, None
    if stored:
        engine.restore(stored.part("policy"))
        first = stored.steps_done(steps, continued=stored.path == continues)
        loss = float(stored.state["loss"])
        copy = None if stored.path == continues else stored.journal
    journal = Journal(folder.journal, keep_through=first, copy=copy) if context.main else None
    clock.lap()
    for step in range(first, steps):
        lr = settings.lr_at(step, steps)
        profiled = context.main and step + 1 == context.config.compute.profile
        with clock.span("prepare"), traced(folder.path / f"trace-step-{step + 1:06d}.json" if profiled else None):
            chosen = [documents[i] for i in documents_of_step(len(documents), places, settings.batch, seed, step)]
            loss, tokens = _step(context, engine, chosen, settings)
            norm = engine.step(lr)
        with clock.span("checkpoint"):
            checkpoints.finish()  # it was written while this step was taken
        lap = clock.lap()
        if journal:
            with clock.span("tracking"):
                metrics = {"train/loss": loss, "train/lr": lr, "train/grad_norm": norm}
                metrics |= {f"time/{name}": seconds for name, seconds in lap.items()}
                journal.append(step + 1, steps, metrics | {"time/tokens_per_second": tokens / lap["step"]})
        stop = ranks.any_rank(context.stop.requested)
        if (step + 1) % settings.checkpoints.every == 0 or step + 1 == steps or stop:
            with clock.span("checkpoint"):
                checkpoints.begin(step + 1, {"loss": loss}, {"policy": engine.state()})
        if stop and step + 1 < steps:
            checkpoints.finish()
            raise Interrupted
    checkpoints.finish()
    save_output(engine, tokenizer, folder.output("model"), main=context.main)
    return {"loss": loss, "steps": float(steps)}


def _step(context: StageContext[Any], engine: Engine, chosen: list[Text], settings: Supervised) -> tuple[float, int]:
    """Accumulate the gradient of one step; returns the mean loss and the tokens computed, over all ranks."""
    total = sum(len(d.completion) for d in chosen)
    batches = micro_batches(chosen, settings.packing.micro_tokens, context.rank, context.world_size)
    losses: list[float] = []

    def closure(packed: Packed, weight: float) -> Tensor:
        logp, _ = engine.score(packed)
        loss = -logp.sum() * weight / total
        losses.append(float(loss.detach()))
        return loss

    filled = [(packed, float(i < len(batches))) for i, packed in enumerate(engine.equalise(batches, chosen[0]))]
    engine.accumulate([lambda p=packed, w=weight: closure(p, w) for packed, weight in filled])  # type: ignore[misc]
    summed = ranks.gather((sum(losses), sum(packed.size for packed in batches)))
    return sum(loss for loss, _ in summed), sum(tokens for _, tokens in summed)


def save_output(engine: Engine, tokenizer: Any, output: Path, *, main: bool) -> None:
    """Write the model as the stage's output. Every rank calls it."""
    if not main:
        engine.save_model(output, tokenizer, main=False)
        return
    shutil.rmtree(output, ignore_errors=True)
    with whole_folder(output) as temporary:
        engine.save_model(temporary, tokenizer, main=True)
