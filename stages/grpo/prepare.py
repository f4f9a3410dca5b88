"""Prepare: from scored groups to minibatches of packed answers with advantages and log-probabilities.

Every rank prepares the whole batch and computes the rows that are dealt to it, so a batch means the same for every number of
ranks.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.engine.deepspeed_engine import Engine
from stages.engine.rows import Rows, Text, micro_batches, pack_rows
from stages.grpo.advantages import group_advantages
from stages.grpo.metrics import rewards
from stages.grpo.settings import GRPO
from stages.problems.episode import Episode, Group


@dataclass
class Batch:
    """One minibatch: S answers, and this rank's share of them as micro-batches."""

    texts: list[Text]
    advantages: list[float]
    """(S,) one per answer."""
    weights: list[float]
    """(S,) weight of each token of an answer: 1 / (answers of the global minibatch × its length)."""
    sampler_logp: list[Tensor]
    """(S,) tensors of the sampler's log-probabilities."""
    micro: list[Rows]
    """This rank's micro-batches; filled up with weightless ones so that all ranks have equally many."""
    real: int
    """How many of `micro` count; the rest are fillers of weight zero."""
    old_logp: list[Tensor] | None = None
    """(S,) tensors under the policy that sampled; None when the update is on-policy and the ratio is 1 by construction."""
    ref_logp: list[Tensor] | None = None
    """(S,) tensors under the reference; None without one."""

    def flat(self, values: Sequence[Tensor], rows: Rows) -> Tensor:
        """Per-answer tensors laid out as the rows' predicted tokens: (N,)."""
        return torch.cat([values[owner] for owner in rows.owner.unique_consecutive().tolist()])


def prepare(
    groups: Sequence[Group], settings: GRPO, engine: Engine, *, seed: int, step: int, temperature: float, reference: Any = None
) -> list[Batch]:
    """Split the answers of a rollout at random into minibatches (R1, section 2.1) and compute what their updates need.

    Answers with advantage 0 have no gradient when there is no KL term, so they are counted in the weights but not computed.
    """
    pairs: list[tuple[Episode, float]] = []
    for group in groups:
        advantages = group_advantages(*rewards(group))[0].tolist()
        pairs.extend(zip(group.episodes, advantages, strict=True))
    order = list(range(len(pairs)))
    random.Random(f"minibatches-{seed}-{step}").shuffle(order)
    batches = []
    for number in range(settings.minibatches):
        # Sorted again: answers to one problem stand together and share its prompt.
        chosen = [pairs[i] for i in sorted(order[number :: settings.minibatches])]
        if chosen:
            batches.append(_batch(chosen, settings, engine))
    for batch in batches:
        if len(batches) > 1:
            batch.old_logp = _score(engine.score, batch, engine, temperature)
        if reference is not None:
            batch.ref_logp = _score(reference, batch, engine, temperature)
    return batches


def _batch(chosen: list[tuple[Episode, float]], settings: GRPO, engine: Engine) -> Batch:
    total = len(chosen)
    trained = [(e, a) for e, a in chosen if a != 0.0 or settings.kl > 0]
    texts = [Text(e.prompt_ids, e.completion_ids) for e, _ in trained]
    # Dealt out row by row: rows are about equally long, so ranks have about equal work.
    rows = pack_rows(texts, settings.packing.row_tokens)[engine.rank :: engine.world_size]
    micro = micro_batches(rows, settings.packing.micro_tokens)
    first = chosen[0][0]
    filler = Text(first.prompt_ids, first.completion_ids[:1])
    return Batch(
        texts=texts,
        advantages=[a for _, a in trained],
        weights=[1 / (total * len(e.completion_ids)) for e, _ in trained],
        sampler_logp=[torch.tensor(e.logprobs, dtype=torch.float32) for e, _ in trained],
        micro=engine.equalise(micro, [filler]),
        real=len(micro),
    )


def _score(scorer: Any, batch: Batch, engine: Engine, temperature: float) -> list[Tensor]:
    """Log-probabilities of this rank's answers under `scorer`, without gradient; empty tensors for other ranks' answers."""
    found = [torch.empty(0)] * len(batch.texts)
    with torch.no_grad():
        for index, rows in enumerate(batch.micro):
            logp, _ = scorer(rows.to(engine.device), temperature)
            if index < batch.real:
                for owner, part in _by_owner(rows, logp.cpu()):
                    found[owner] = part
    return found


def _by_owner(rows: Rows, values: Tensor) -> Iterator[tuple[int, Tensor]]:
    owners, counts = rows.owner.unique_consecutive(return_counts=True)
    yield from zip(owners.tolist(), values.split(counts.tolist()), strict=True)
