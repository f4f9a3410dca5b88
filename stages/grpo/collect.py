"""Collect: draw problems, sample a group of answers to each, score them."""

from collections.abc import Sequence

from stages.engine import ranks
from stages.problems.episode import Group, Problem
from stages.problems.templates import Template
from stages.rewards.score import Rewards, score
from stages.rollout.groups import sample_groups
from stages.rollout.protocol import Rollout, Sampling


def collect(
    rollout: Rollout,
    problems: Sequence[Problem],
    template: Template,
    sampling: Sampling,
    rewards: Rewards,
    samples: int,
    *,
    seed: int,
    purpose: str,
    step: int,
    rank: int = 0,
    world_size: int = 1,
) -> list[Group]:
    """Scored groups, one per problem, in their order, the same list on every rank.

    Each rank samples its share; ranks meet once afterwards, so they may decode unequally long.
    """
    mine = list(problems[rank::world_size])
    groups = sample_groups(rollout, mine, template, sampling, samples, seed=seed, purpose=purpose, step=step) if mine else []
    score(rewards, [episode for group in groups for episode in group.episodes])
    shares = ranks.gather(groups)
    return [shares[index % world_size][index // world_size] for index in range(len(problems))]
