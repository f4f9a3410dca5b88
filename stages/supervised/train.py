"""The supervised loop: packed documents, completion-only loss, AdamW under DeepSpeed, held-out loss, exact resume.

Which documents a step takes is a function of (seed, step), so a resumed run needs nothing but the step. The loss of a step is
the mean over its predicted tokens, all ranks and micro-batches together: a long answer counts for more than a short one. The
paper does not say how its loss is averaged.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.contract.errors import Interrupted
from stages.engine import distributed
from stages.engine.checkpoint.checkpointer import Checkpointer
from stages.engine.deepspeed_engine import Engine
from stages.engine.packing.pack import Packed, Text
from stages.runtime.clock import clock
from stages.runtime.profile import traced
from stages.store.files import whole_folder
from stages.store.stage import StageContext
from stages.supervised.held_out import HeldOut
from stages.supervised.order import Order
from stages.supervised.settings import Supervised
from stages.tracking.journal import Journal


def train(
    context: StageContext[Any],
    engine: Engine,
    tokenizer: Any,
    documents: Sequence[Text],
    order: Order,
    settings: Supervised,
    held_out: HeldOut | None = None,
    every: int = 1,
    merge: bool = False,
) -> dict[str, float]:
    """Train on `documents` in their `order` and write the model; returns the headline metrics.

    `held_out`: documents whose loss is measured before the first step, each `every` steps and after the last.
    merge: write the model with its adapters merged. Raises Interrupted after a checkpoint when a stop was asked for.
    """
    folder, steps = context.folder, order.steps
    checkpoints = Checkpointer(folder.checkpoints, settings.checkpoints, context.rank)
    continues = context.inputs.get("continues")
    stored = checkpoints.restore(context.world_size, continues)
    first, loss, copy = 0, 0.0, None
    before: dict[str, float] = {}
    measured: dict[str, float] = {}
    if stored:
        engine.restore(stored.part("policy"))
        first = stored.steps_done(steps, continued=stored.path == continues)
        loss = float(stored.state["loss"])
        if stored.path != continues:
            copy = stored.journal
            before, measured = stored.state.get("before", {}), stored.state.get("measured", {})
    journal = Journal(folder.journal, keep_through=first, copy=copy) if context.main else None
    unsaid: dict[str, float] = {}
    if held_out and not before:
        before = {name.replace("eval/loss", "eval/loss_before", 1): x for name, x in held_out.measure(engine).items()}
        unsaid = before  # the journal's lines are of finished steps: the first one tells it
    clock.lap()
    for step in range(first, steps):
        lr = settings.lr_at(step, steps)
        profiled = context.main and step + 1 == context.config.compute.profile
        with traced(folder.path / f"trace-step-{step + 1:06d}.json" if profiled else None):
            chosen = [documents[number] for number in order.of_step(step)]
            loss, tokens = accumulate(engine, chosen, settings.packing.micro_tokens)
            norm = engine.step(lr)
        with clock.span("checkpoint"):
            checkpoints.finish()  # it was written while this step was taken
        now = held_out is not None and ((step + 1) % every == 0 or step + 1 == steps)
        if held_out and now:
            with clock.span("eval", whole=True):
                measured = held_out.measure(engine)
        lap = clock.lap()
        if journal:
            with clock.span("tracking"):
                metrics = {"train/loss": loss, "train/lr": lr, "train/grad_norm": norm}
                metrics |= (unsaid if step == first else {}) | (measured if now else {})
                metrics |= {f"time/{name}": seconds for name, seconds in lap.items()}
                journal.append(step + 1, steps, metrics | {"time/tokens_per_second": tokens / lap["step"]})
        stop = distributed.any_rank(context.stop.requested)
        if (step + 1) % settings.checkpoints.every == 0 or step + 1 == steps or stop:
            with clock.span("checkpoint"):
                checkpoints.begin(step + 1, {"loss": loss, "before": before, "measured": measured}, {"policy": engine.state()})
        if stop and step + 1 < steps:
            checkpoints.finish()
            raise Interrupted
    checkpoints.finish()
    save_output(engine, tokenizer, folder.output("model"), main=context.main, merge=merge)
    return {"loss": loss, "steps": float(steps), **before, **measured}


def accumulate(engine: Engine, chosen: list[Text], micro_tokens: int) -> tuple[float, int]:
    """Accumulate the gradient of one step; returns the mean loss (nats a predicted token) and the tokens computed.

    Both are over all ranks; every rank calls it with the same documents.
    """
    total = sum(len(d.completion) for d in chosen)
    batches = engine.micro_batches(chosen, micro_tokens)
    losses: list[float] = []

    def closure(packed: Packed, weight: float) -> Tensor:
        logp, _ = engine.score(packed)
        loss = -logp.sum() * weight / total
        losses.append(float(loss.detach()))
        return loss

    filled = [(packed, float(i < len(batches))) for i, packed in enumerate(engine.equalise(batches, chosen[0]))]
    engine.accumulate([lambda p=packed, w=weight: closure(p, w) for packed, weight in filled])  # type: ignore[misc]
    summed = distributed.gather((sum(losses), sum(packed.size for packed in batches)))
    return sum(loss for loss, _ in summed), sum(tokens for _, tokens in summed)


def save_output(engine: Engine, tokenizer: Any, output: Path, *, main: bool, merge: bool = False) -> None:
    """Write the model as the stage's output, with `merge` without adapters in float32. Every rank calls it."""
    dtype = torch.float32 if merge else None
    if not main:
        engine.save_model(output, tokenizer, main=False, merge=dtype)
        return
    shutil.rmtree(output, ignore_errors=True)
    with whole_folder(output) as temporary:
        engine.save_model(temporary, tokenizer, main=True, merge=dtype)
