"""Collect: draw problems, sample a group of answers to each, score them, and draw again where a group carries no signal."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from stages.engine import distributed
from stages.problems.episode import Group, Problem
from stages.problems.templates import Template
from stages.rewards.score import Rewards, score
from stages.rl.advantages import zero_variance
from stages.rl.metrics import rewards_of
from stages.rl.problem_sampler import ProblemSampler
from stages.rollout.groups import sample_groups
from stages.rollout.protocol import Rollout, Sampling
from stages.runtime.clock import clock

Span = Callable[[str], AbstractContextManager[None]]


def untimed(_: str) -> AbstractContextManager[None]:
    """A span that nobody counts."""
    return nullcontext()


@dataclass
class Scene:
    """What sampling needs beside problems: the same on every rank but for `rank`."""

    rollout: Callable[[], Rollout]
    """Gives the engine, with the policy's weights of now."""
    template: Template
    sampling: Sampling
    rewards: Rewards
    seed: int
    rank: int = 0
    world_size: int = 1
    rest: Callable[[], None] = lambda: None
    """Called when sampling is over for a while."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Of this rank: what its threads use."""

    def sample(
        self, problems: Sequence[Problem], samples: int, purpose: str, step: int, rollout: Rollout | None = None
    ) -> list[Group]:
        """Scored groups, one per problem, in their order, the same list on every rank.

        Each rank samples its share, and a thread judges what is complete while the rest is sampled; ranks meet once afterwards,
        so they may decode unequally long. The random numbers of an answer depend on (seed, purpose, step, question, sample
        number) alone.
        """
        engine = rollout or self.rollout()
        groups = self.share(problems, samples, purpose, step, engine, clock.span)
        if rollout is None:
            self.rest()
        return self.together(groups, len(problems))

    def share(
        self, problems: Sequence[Problem], samples: int, purpose: str, step: int, engine: Rollout, span: Span = untimed
    ) -> list[Group]:
        """The scored groups of this rank. Ranks do not meet, so a thread may do it; `span` then names nothing."""
        key, judged = f"{self.seed}-{purpose}-{step}", list[Future[None]]()
        with ThreadPoolExecutor(1, initializer=distributed.bind_thread, initargs=(self.device,)) as judge:

            def judge_soon(group: Group) -> None:
                judged.append(judge.submit(score, self.rewards, group.episodes, max_tokens=self.sampling.max_tokens, key=key))

            groups: list[Group] = []
            if mine := list(problems[self.rank :: self.world_size]):
                with span("sample"):
                    groups = sample_groups(
                        engine,
                        mine,
                        self.template,
                        self.sampling,
                        samples,
                        seed=self.seed,
                        purpose=purpose,
                        step=step,
                        on_group=judge_soon,
                    )
            with span("score"):
                for verdicts in judged:
                    verdicts.result()
        return groups

    def together(self, groups: list[Group], count: int) -> list[Group]:
        """All `count` groups of all ranks' shares, in the order of their problems."""
        shares = distributed.gather(groups)
        return [shares[index % self.world_size][index // self.world_size] for index in range(count)]


@dataclass
class Collected:
    """The answers of a step."""

    groups: list[Group]
    """Those to be trained on."""
    drawn: list[Group]
    """All that were sampled, in order: what metrics and records are made of, for the choice would flatter them."""
    position: int
    """Where the sampler stands afterwards."""
    resamples: int = 0
    """Further draws."""

    @property
    def tokens(self) -> int:
        """Tokens that were sampled."""
        return sum(len(e.completion_ids) for group in self.drawn for e in group.episodes)


def collect(
    scene: Scene, sampler: ProblemSampler, position: int, *, questions: int, samples: int, step: int, max_resamples: int = 0
) -> Collected:
    """Sample `questions` groups from the sampler's `position` on.

    With `max_resamples` (DAPO's dynamic sampling, arXiv 2503.14476, section 3.2) groups whose rewards are all equal are left
    out and as many further problems drawn, so many times at most; what is then lacking is lacking. DAPO
    looks at right and wrong alone; here a difference in format or length is a signal too.
    """
    problems, position = sampler.draw(position, questions)
    rollout = scene.rollout()
    drawn = scene.sample(problems, samples, "train", step, rollout)
    if not max_resamples:
        scene.rest()
        return Collected(drawn, drawn, position)
    kept = [group for group in drawn if has_signal(group)]
    resamples = 0
    while len(kept) < questions and resamples < max_resamples:
        problems, position = sampler.draw(position, questions - len(kept), taken=[group.problem for group in drawn])
        if not problems:
            break
        resamples += 1
        more = scene.sample(problems, samples, "train", step, rollout)
        drawn = drawn + more
        kept += [group for group in more if has_signal(group)]
    scene.rest()
    return Collected(kept, drawn, position, resamples)


def has_signal(group: Group) -> bool:
    """Whether the rewards of a group differ."""
    return not bool(zero_variance(*rewards_of([group])))
