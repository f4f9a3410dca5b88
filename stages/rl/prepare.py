"""Prepare: from scored groups to minibatches of packed answers with advantages, log-probabilities and values.

Every rank prepares the whole rollout and computes the share that is dealt to it, so a batch means the same for every number of
ranks. What is computed here, before the first update, is of the policy that sampled: old log-probabilities, values, returns.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stages.engine import distributed
from stages.engine.deepspeed_engine import Engine
from stages.engine.packing.pack import Packed, Text
from stages.problems.episode import Episode, Group
from stages.rl import gae
from stages.rl.advantages import ADVANTAGES
from stages.rl.algorithms import ALGORITHMS
from stages.rl.kl import ESTIMATORS
from stages.rl.losses import token_weights
from stages.rl.metrics import rewards_of
from stages.rl.reference import Reference
from stages.rl.settings import GRPO

TOGETHER = 256
"""Answers whose advantages are worked out at once."""


class Answer:
    """An answer and what its update needs. Tensors have one entry per token, (T,) float32."""

    def __init__(self, episode: Episode) -> None:
        self.episode = episode
        self.sampler_logp = torch.tensor(episode.logprobs, dtype=torch.float32)
        self.advantages = torch.zeros_like(self.sampler_logp)
        self.penalty = torch.zeros_like(self.sampler_logp)
        """β × KL estimate, where the KL is taken off the reward."""
        self.old_logp: Tensor | None = None
        """Under the policy that sampled; None when the update is on-policy and the ratio 1 by construction."""
        self.ref_logp: Tensor | None = None
        """Under the reference; None without one."""
        self.values: Tensor | None = None
        """Of the value model before the update; None without one."""
        self.returns: Tensor | None = None
        """What the value model is to learn."""

    @property
    def text(self) -> Text:
        """Its tokens, to be packed."""
        return Text(self.episode.prompt_ids, self.episode.completion_ids)

    @property
    def length(self) -> int:
        """Tokens of the answer."""
        return len(self.episode.completion_ids)


@dataclass
class Batch:
    """One minibatch: this rank's share as micro-batches, whose `owner` counts `answers`."""

    answers: list[Answer]
    weights: list[float]
    """Weight of each token of an answer in the policy's loss."""
    value_weight: float
    """Weight of each token in the value loss: its mean over the tokens of the global minibatch."""
    micro: list[Packed]
    """This rank's micro-batches; filled up with weightless ones so that all ranks have equally many."""
    real: int
    """How many of `micro` count; the rest are fillers of weight zero."""

    def flat(self, of: Callable[[Answer], Tensor | None], packed: Packed) -> Tensor | None:
        """A tensor of each answer laid out as the predicted tokens, (N,); None where answers have none."""
        found = [of(self.answers[owner]) for owner in packed.owner.unique_consecutive().tolist()]
        return None if any(part is None for part in found) else torch.cat(found)  # type: ignore[arg-type]


@dataclass
class Prepared:
    """The minibatches of a rollout, in the order of their updates, and what was seen on the way."""

    minibatches: Iterator[Batch]
    """Packed one at a time, when its turn comes."""
    metrics: dict[str, float]


def prepare(
    groups: Sequence[Group],
    settings: GRPO,
    policy: Engine,
    *,
    seed: int,
    step: int,
    temperature: float,
    max_tokens: int,
    reference: Reference | None = None,
    critic: Engine | None = None,
) -> Prepared:
    """Advantages of a rollout's answers, and the minibatches into which they are split at random (R1, section 2.1).

    Answers without verdict, and with `mask_truncated` those cut at the limit, are left out as if they had not been sampled (but
    a cut one keeps its reward in its group). Unjudged ones have a reward and stay. Answers that have no gradient count in the
    weights and are not computed.
    critic: PPO's own value model; with a shared one the policy says the values.
    """
    answers = [Answer(episode) for group in groups for episode in group.episodes]
    kept = [a for a in answers if a.episode.scored.verdict != "none" and not (settings.mask_truncated and a.episode.truncated)]
    metrics: dict[str, float] = {}
    if settings.algorithm == "ppo" or settings.taxed:
        _score(answers, settings, policy, reference, critic, temperature)
        computed = kept
        if settings.taxed:
            metrics["reward/kl_penalty"] = _tax(answers, settings)
        if settings.algorithm == "ppo":
            metrics |= _token_advantages(kept, settings)
        else:
            _answer_advantages(answers, groups, settings)
    else:
        # Advantages first: what has none needs no pass through any model.
        _answer_advantages(answers, groups, settings)
        computed = [a for a in kept if settings.kl > 0 or bool(a.advantages.any())]
        _score(computed, settings, policy, reference, critic, temperature)
    alive = set(map(id, computed))
    cut = _minibatches(kept, settings, seed, step)
    return Prepared((_batch(chosen, alive, settings, policy, max_tokens) for chosen in cut), metrics)


def _answer_advantages(answers: list[Answer], groups: Sequence[Group], settings: GRPO) -> None:
    """One advantage per answer, from its group (GRPO and its variants)."""
    if not groups:
        return
    rewards, valid = rewards_of(groups)
    penalties = torch.stack([a.penalty.sum() for a in answers]).to(rewards.dtype)
    found = ADVANTAGES[ALGORITHMS[settings.algorithm].advantage](rewards - penalties.reshape(rewards.shape), valid)
    for answer, advantage in zip(answers, found.flatten().tolist(), strict=True):
        answer.advantages = torch.full_like(answer.sampler_logp, advantage)


def _tax(answers: list[Answer], settings: GRPO) -> float:
    """Give each token its KL penalty; returns the mean over answers of what an answer pays."""
    for answer in answers:
        assert answer.old_logp is not None
        assert answer.ref_logp is not None
        answer.penalty = settings.kl * ESTIMATORS[settings.kl_estimator](answer.old_logp, answer.ref_logp)
    return float(torch.stack([a.penalty.sum() for a in answers]).mean()) if answers else 0.0


def _token_advantages(answers: list[Answer], settings: GRPO) -> dict[str, float]:
    """An advantage and a return for each token, by GAE (PPO)."""
    if not answers:
        return {}
    critic = settings.critic
    by_length = sorted(answers, key=lambda a: a.length)
    for start in range(0, len(by_length), TOGETHER):  # like lengths together: little is filled up
        some = by_length[start : start + TOGETHER]
        lengths = torch.tensor([a.length for a in some])
        rewards = torch.tensor([a.episode.scored.total for a in some], dtype=torch.float64)
        values = _padded([a.values for a in some])
        earned = gae.token_rewards(rewards, _padded([a.penalty for a in some]), lengths)
        lam = critic.lam if critic.length_adaptive is None else gae.length_adaptive_lambda(lengths, critic.length_adaptive)
        advantages = gae.gae(earned, values, critic.gamma, lam)
        returns = values + gae.gae(earned, values, critic.gamma, critic.lam_critic)
        for answer, row, back in zip(some, advantages, returns.float(), strict=True):
            answer.advantages, answer.returns = row[: answer.length].clone(), back[: answer.length].clone()
    every = torch.cat([a.advantages for a in answers])
    whole = gae.whiten(every) if critic.whiten else every
    for answer, part in zip(answers, whole.float().split([a.length for a in answers]), strict=True):
        answer.advantages = part
    values, returns = (torch.cat([t for t in parts if t is not None]).double() for parts in _said(answers))
    metrics = {"value/mean": float(values.mean()), "value/return": float(returns.mean())}
    third = torch.cat([gae.thirds(answer.length) for answer in answers])
    parts = {"": torch.ones_like(third, dtype=torch.bool)} | {f"_{name}": third == n for n, name in enumerate(gae.THIRDS)}
    for name, among in parts.items():
        if (explained := gae.explained_variance(values[among], returns[among])) is not None:
            metrics[f"value/explained_variance{name}"] = explained
    return metrics


def _said(answers: list[Answer]) -> tuple[list[Tensor | None], list[Tensor | None]]:
    return [a.values for a in answers], [a.returns for a in answers]


def _padded(parts: Sequence[Tensor | None]) -> Tensor:
    return pad_sequence([part.double() for part in parts if part is not None], batch_first=True)


def _score(
    answers: list[Answer],
    settings: GRPO,
    policy: Engine,
    reference: Reference | None,
    critic: Engine | None,
    temperature: float,
) -> None:
    """Fill in what the models say of answers before the first update, on every rank for all of them."""
    old = settings.taxed or not settings.on_policy
    shared = settings.algorithm == "ppo" and critic is None
    if not answers or not (old or shared or reference or critic):
        return
    micro = _mine([a.text for a in answers], settings, policy)
    found: dict[str, dict[int, Tensor]] = {"old_logp": {}, "ref_logp": {}, "values": {}}
    with torch.no_grad():
        for index, packed in enumerate(policy.equalise(micro, answers[0].text)):
            said: dict[str, Tensor] = {}
            if old or shared:
                scored = policy.score(packed, temperature)
                said |= {"old_logp": scored[0]} if old else {}
                said |= {"values": scored[2]} if shared else {}
            if reference is not None:
                said["ref_logp"] = reference.logp(packed, temperature)
            if critic is not None:
                said["values"] = critic.score(packed)[0]
            if index < len(micro):
                owners, counts = packed.owner.unique_consecutive(return_counts=True)
                for name, values in said.items():
                    # Copies: a view would take the whole micro-batch along wherever it goes.
                    copies = [part.clone() for part in values.cpu().split(counts.tolist())]
                    found[name] |= zip(owners.tolist(), copies, strict=True)
    for share in distributed.gather(found):
        for name, parts in share.items():
            for owner, part in parts.items():
                setattr(answers[owner], name, part)


def _mine(texts: list[Text], settings: GRPO, policy: Engine) -> list[Packed]:
    """The micro-batches of this rank."""
    return policy.micro_batches(texts, settings.packing.micro_tokens)


def _minibatches(answers: list[Answer], settings: GRPO, seed: int, step: int) -> list[list[Answer]]:
    """The answers of each update: every epoch splits them anew."""
    found = []
    for epoch in range(settings.epochs):
        order = list(range(len(answers)))
        random.Random(f"minibatches-{seed}-{step}" + (f"-{epoch}" if epoch else "")).shuffle(order)
        # Sorted again: answers to one problem stand together and share its prompt.
        cut = [[answers[i] for i in sorted(order[n :: settings.minibatches])] for n in range(settings.minibatches)]
        found += [chosen for chosen in cut if chosen]
    return found


def _batch(chosen: list[Answer], alive: set[int], settings: GRPO, policy: Engine, max_tokens: int) -> Batch:
    lengths = [answer.length for answer in chosen]
    weights = token_weights(lengths, settings.aggregation, max_tokens)
    computed = [(a, w) for a, w in zip(chosen, weights, strict=True) if id(a) in alive]
    micro = _mine([a.text for a, _ in computed], settings, policy)
    first = chosen[0].episode
    return Batch(
        answers=[a for a, _ in computed],
        weights=[w for _, w in computed],
        value_weight=1 / sum(lengths),
        micro=policy.equalise(micro, Text(first.prompt_ids, first.completion_ids[:1])),
        real=len(micro),
    )
