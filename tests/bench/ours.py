"""Our side: all that the bench knows of the engine and the loop is here. Imported in workers only."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.engine.deepspeed_engine import Engine
from stages.engine.scorer import TokenScorer, TokenValueScorer, ValueScorer
from stages.problems.episode import Episode, Group, Problem, Reward
from stages.problems.templates import Template
from stages.rewards.score import Rewards
from stages.rl.collect import Collected, Scene, collect
from stages.rl.one_step_off import Ahead
from stages.rl.prepare import prepare
from stages.rl.problem_sampler import ProblemSampler
from stages.rl.reference import Reference
from stages.rl.settings import GRPO
from stages.rl.update import update
from stages.rollout.protocol import Completion, Request, Rollout, Sampling
from stages.rollout.torch_engine import TorchRollout, load_model, load_tokenizer
from tests.bench.material import reward_of

LR = 1e-6


def load(folder: str) -> tuple[Any, Any]:
    """Model in float32, and tokenizer."""
    return load_model(Path(folder), dtype="float32"), load_tokenizer(Path(folder))


def endless(model: Any, tokenizer: Any) -> TorchRollout:
    """A rollout whose answers never end before the limit."""
    rollout = TorchRollout(model, tokenizer)
    rollout.end_tokens = frozenset()
    return rollout


def sample(
    rollout: Rollout, prompts: Sequence[tuple[int, ...]], samples: int, tokens: int, *, step: int, temperature: float = 1.0
) -> list[list[Completion]]:
    """Answers to some prompts."""
    requests = [Request(str(number), ids, samples=samples) for number, ids in enumerate(prompts)]
    return rollout.sample(requests, Sampling(max_tokens=tokens, temperature=temperature), seed=0, purpose="bench", step=step)


def sample_with_lengths(
    model: Any, tokenizer: Any, prompts: Sequence[tuple[int, ...]], samples: int, lengths: Sequence[int], *, step: int
) -> int:
    """Sample answers of which each ends at a length of its own; returns the tokens sampled.

    The engine has one limit for all, so its question for it is answered here.
    """

    class Lengths(TorchRollout):
        def _limit(self, request: Request, number: int, sampling: Sampling) -> int:
            return lengths[int(request.key) * samples + number]

    rollout = Lengths(model, tokenizer)
    rollout.end_tokens = frozenset()
    found = sample(rollout, prompts, samples, max(lengths), step=step)
    return sum(len(c.ids) for group in found for c in group)


class InOrder(ProblemSampler):
    """Draws problems in their order, as the peer is told to."""

    def _order(self, epoch: int) -> list[int]:
        return list(range(len(self.problems)))


class TokenRewards(Scene):
    """Scores as always, then gives the reward that both sides agree on."""

    def together(self, groups: list[Group], count: int) -> list[Group]:
        """Groups in which every answer has a verdict and the reward of its tokens."""
        found = super().together(groups, count)
        for group in found:
            for episode in group.episodes:
                episode.reward = Reward(total=reward_of(episode.completion_ids), parts={"format": 0.0}, verdict="right")
        return found


class Stepper:
    """The loop's step as the stage takes it: collect, prepare, update."""

    def __init__(
        self, folder: str, asked: Sequence[str], *, questions: int, samples: int, tokens: int, forced: bool, **settings: Any
    ) -> None:
        """`asked`: the problems, in the order of their steps; `forced`: whether every answer has all `tokens`."""
        model, tokenizer = load(folder)
        self.settings = GRPO(lr=LR, kl=settings.pop("kl", 0.0), questions=questions, samples=samples, **settings)
        ppo, shared = self.settings.algorithm == "ppo", self.settings.critic.model == "shared"
        scorer = TokenValueScorer if ppo and shared else TokenScorer
        self.policy = Engine(scorer(model), self.settings, "zero0", "cpu")
        own = ppo and not shared
        self.critic = Engine(ValueScorer(load(folder)[0]), self.settings, "zero0", "cpu") if own else None
        self.reference = Reference(load(folder)[0], self.policy.device) if self.settings.kl else None
        self.tokens = tokens
        engine = endless if forced else TorchRollout
        self.scene = TokenRewards(
            rollout=lambda: engine(self.policy.sampling_model(apart=self.settings.one_step_off), tokenizer),
            template=Template(name="question"),
            sampling=Sampling(max_tokens=tokens),
            rewards=Rewards(),
            seed=0,
            rank=self.policy.rank,
            world_size=self.policy.world_size,
        )
        problems = [Problem(id=f"{number}", question=q, answer="0", source="bench") for number, q in enumerate(asked)]
        self.sampler, self.position, self.step_number = InOrder(problems, questions, 0), 0, 0
        self.ahead = Ahead(self.scene, self.sampler, questions, samples) if self.settings.one_step_off else None

    def step(self) -> dict[str, Any]:
        """Take a step; returns how many tokens and samples it had."""
        collected = self._collected()
        self.position, self.step_number = collected.position, self.step_number + 1
        others = {"reference": self.reference, "critic": self.critic}
        train(self.policy, collected.groups, self.settings, self.tokens, self.step_number, **others)
        episodes = [episode for group in collected.groups for episode in group.episodes]
        return {"tokens": sum(len(e.completion_ids) for e in episodes), "samples": len(episodes)}

    def settle(self) -> None:
        """Wait for what is sampled ahead: between turns nothing may run."""
        if self.ahead is not None:
            self.ahead.complete()

    def _collected(self) -> Collected:
        if self.ahead is not None:
            collected = self.ahead.take(self.step_number, self.position)
            self.ahead.begin(self.step_number + 1, collected.position)
            return collected
        return collect(
            self.scene,
            self.sampler,
            self.position,
            questions=self.settings.questions,
            samples=self.settings.samples,
            step=self.step_number,
        )


def train(
    policy: Engine,
    groups: Sequence[Group],
    settings: GRPO,
    tokens: int,
    step: int,
    *,
    critic: Engine | None = None,
    **more: Any,
) -> None:
    """Prepare a rollout's minibatches and update on each, the value model too. `more`: goes on to `prepare`."""
    more |= {"seed": 0, "step": step, "temperature": 1.0, "max_tokens": tokens, "critic": critic}
    for batch in prepare(groups, settings, policy, **more).minibatches:
        update(policy, batch, settings, lr=LR, temperature=1.0, critic=critic)


def policy_of(model: Any) -> tuple[Engine, GRPO]:
    """A model under the engine, with the settings of a step on-policy without KL."""
    settings = GRPO(lr=LR, kl=0.0)
    return Engine(TokenScorer(model), settings, "zero0", "cpu"), settings


def recorded_groups(recorded: Sequence[dict[str, Any]]) -> list[Group]:
    """Recorded answers as scored groups."""
    groups = []
    for number, item in enumerate(recorded):
        group = Group(Problem(id=f"{number}", question=f"{number}", answer="0", source="bench"))
        for sample_number, answer in enumerate(item["answers"]):
            reward = Reward(total=reward_of(answer["ids"]), parts={"format": 0.0}, verdict="right")
            group.episodes.append(
                Episode(
                    group.problem,
                    sample_number,
                    "",
                    item["prompt"],
                    answer["ids"],
                    answer["logprobs"],
                    "",
                    "stop",
                    reward,
                )
            )
        groups.append(group)
    return groups


def random_groups(tokens: int, vocabulary: int) -> list[Group]:
    """Groups of 1,024 distinct tokens each: a prompt of 32, and 8 answers of 125 whose last token is never computed."""
    rng = random.Random(0)

    def some(count: int) -> list[int]:
        return [rng.randrange(2, vocabulary) for _ in range(count)]

    recorded = [
        {"prompt": some(32), "answers": [{"ids": some(125), "logprobs": [-1.0] * 125} for _ in range(8)]}
        for _ in range(max(1, tokens // 1024))
    ]
    return recorded_groups(recorded)
