"""What one process does in a step of a stage's loop: its amounts by span, from the lengths of prompts and answers."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from stages.costs.amounts import ADAM_TRAFFIC, Amounts, Sampled, Texts, added, packed_texts, pass_amounts, sample_amounts
from stages.costs.shape import Shape

Groups = Sequence[tuple[int, list[int]]]
"""Prompts, each with the lengths of its answers, in tokens."""


@dataclass(frozen=True)
class Loop:
    """How a stage trains."""

    processes: int = 1
    micro_tokens: int = 1024
    zero: int = 0
    recompute: bool = False
    minibatches: int = 1
    epochs: int = 1
    readings: int = 0
    """Forward passes over all answers before the first update: old log-probabilities, the reference, a value model."""
    critics: int = 0
    """Further models that are trained beside it (PPO's value model)."""
    adapters: int | None = None
    """Weights of low-rank adapters, where they alone are trained."""


def train_spans(shape: Shape, item: int, groups: Groups, loop: Loop) -> dict[str, Amounts]:
    """`update` and `optimizer` of a step over these groups; item: bytes of a number."""
    size, models = loop.processes, 1 + loop.critics
    trained = Texts()
    for number in range(loop.minibatches):
        some = [(prompt, mine) for prompt, answers in groups if (mine := answers[number :: loop.minibatches])]
        trained = _sum(trained, _share(packed_texts(some, loop.micro_tokens), size))
    trained = trained.times(loop.epochs * models)
    read = _share(packed_texts(groups, loop.micro_tokens), size).times(loop.readings)
    updates = loop.epochs * loop.minibatches * models if trained.tokens else 0
    sent = {"exchange_bytes": exchanged(shape, item, loop, trained.batches, read.batches, updates)}
    moved = updates * (loop.adapters or shape.parameters) * ADAM_TRAFFIC / (size if loop.zero else 1)
    passes = pass_amounts(shape, trained, read, item, recompute=loop.recompute, adapters=loop.adapters)
    return {
        "update": added(passes, sent),
        "optimizer": {"optimizer_bytes": moved},
    }


def exchanged(shape: Shape, item: int, loop: Loop, trained: float, read: float, updates: float) -> float:
    """Bytes that a process sends. Without ZeRO and with 1 or 2 gradients and weights go round once an update.

    With ZeRO-3 weights are gathered for each forward and each backward pass of a micro-batch, and gradients scattered. Those go
    in float32 (stages/engine/deepspeed_engine.py), and twice round where every process wants all of them.
    """
    ring = (loop.processes - 1) / loop.processes
    gradients, weights = (ring * size * (loop.adapters or shape.parameters) for size in (4, item))
    if loop.zero < 3:
        return updates * (gradients * (2 if item == 2 and loop.zero < 2 else 1) + weights)
    return ring * item * shape.parameters * (2 * trained + read) + gradients * trained


def sample_span(shape: Shape, item: int, groups: Groups, rows: float) -> Amounts:
    """`sample` of a step: these groups, at most `rows` answers in flight."""
    return sample_amounts(shape, sampled(groups, rows), item)


def sampled(groups: Groups, rows: float) -> Sampled:
    """What sampling these groups takes."""
    answers = [answer for _, some in groups for answer in some]
    return Sampled(
        prompts=len(groups),
        prompt_tokens=sum(prompt for prompt, _ in groups),
        prompt_attended=sum(prompt * (prompt + 1) / 2 for prompt, _ in groups),
        answers=len(answers),
        tokens=sum(answers),
        context=sum(answer * prompt + answer * (answer + 1) / 2 for prompt, some in groups for answer in some),
        steps=decode_steps(len(answers), sum(answers) / max(1, len(answers)), max(answers, default=0), rows),
    )


def decode_steps(answers: float, mean: float, longest: float, rows: float) -> float:
    """Steps until all answers are there: while some wait all rows are busy; then the longest is waited for."""
    return max(0.0, answers - rows) * mean / max(rows, 1.0) + longest


def rows_in_flight(groups: Groups, budget: int, limit: int) -> float:
    """Answers that fly at once in `budget` tokens of keys and values, as the torch engine seats them."""
    answers = sum(len(some) for _, some in groups)
    prompts = sum(prompt for prompt, _ in groups)
    return max(1.0, min(float(answers), budget / (prompts / max(1, answers) + limit)))


def spread_lengths(count: int, mean: float, limit: int) -> list[int]:
    """So many lengths with this mean, the longest first, as if they fell off exponentially and were cut at the limit.

    (Of n such answers the longest has about mean × (ln n + 0.7) tokens, or the limit.)
    """
    return list(_spread_lengths(count, mean, limit))


@functools.lru_cache(maxsize=256)  # the arms of a study ask the same again and again
def _spread_lengths(count: int, mean: float, limit: int) -> tuple[int, ...]:
    mean = min(mean, 0.95 * limit)
    quantiles = [-math.log((index + 0.5) / count) for index in range(count)]
    low, high = mean / 4, 64.0 * limit
    for _ in range(60):  # the scale at which the cut lengths have the mean
        scale = (low + high) / 2
        short = sum(min(float(limit), scale * q) for q in quantiles) < mean * count
        low, high = (scale, high) if short else (low, scale)
    return tuple(max(1, round(min(float(limit), high * q))) for q in quantiles)


def dealt(lengths: list[int], questions: int, prompt: int) -> list[tuple[int, list[int]]]:
    """Groups of answers of like sums; the first has the longest."""
    return [(prompt, lengths[number::questions]) for number in range(questions)]


def _share(texts: Texts, processes: int) -> Texts:
    """Of one of the processes; all make equally many passes."""
    return Texts(
        texts.tokens / processes, texts.attended / processes, texts.predicted / processes, float(-(-texts.batches // processes))
    )


def _sum(a: Texts, b: Texts) -> Texts:
    return Texts(a.tokens + b.tokens, a.attended + b.attended, a.predicted + b.predicted, a.batches + b.batches)
