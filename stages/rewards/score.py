"""Rewards of a stage: their weights, and the scoring of sampled answers (DeepSeek-R1, sections 2.2 and 3.2).

R1-Zero adds accuracy and format with equal weight; the reasoning RL adds language consistency.
"""

import random
from typing import Annotated, Self

from pydantic import Field, model_validator

from stages.problems.episode import Episode, Reward, Verdict
from stages.rewards.accuracy import Verifier, verdicts
from stages.rewards.format import well_formed
from stages.rewards.language import Language, language_share
from stages.rewards.length import overlong
from stages.rewards.tags import final_answer, thinking
from stages.store.config import EXECUTION, Config

__all__ = ["Rewards", "final_answer", "same_answer", "score", "thinking"]


class Rewards(Config):
    """What an answer can earn. The weights are relative to each other: GRPO divides by the group's standard deviation."""

    accuracy: float = Field(default=1.0, ge=0)
    """Weight of a right final answer (0 or 1). The paper: equal to format."""
    format: float = Field(default=1.0, ge=0)
    """Weight of the tags in order (0 or 1). Small models may trade accuracy for it: then weigh it less."""
    language: float = Field(default=0.0, ge=0)
    """Weight of the share of the thinking in the target language (0 to 1). R1-Zero has none; the reasoning RL 1."""
    overlong: float = Field(default=0.0, ge=0)
    """Weight of the soft punishment of answers near `max_tokens` (−1 to 0; DAPO: 1)."""
    overlong_buffer: int | None = Field(default=None, ge=1)
    """Tokens before `max_tokens` in which it grows (DAPO: 4,096 before 20,480)."""
    random: float = Field(default=0.0, ge=0)
    """Weight of a fair coin that has nothing to do with the answer. A control arm: what a policy gains from it, its base had
    (Spurious Rewards, arXiv 2506.10947)."""
    verifier: Verifier = "math"
    """How a final answer is compared: `exact` text, `numeric` value, or `math` (math-verify)."""
    require_thinking: bool = True
    """Whether the format wants something inside `<think> </think>`."""
    language_target: Language = "english"
    """`english` counts words by script; `digits` is for the toy's two scripts."""
    verify_timeout_s: Annotated[float, EXECUTION] = Field(default=5.0, gt=0)
    """Seconds math-verify may take for an answer; beyond it there is no verdict."""

    @model_validator(mode="after")
    def _something_is_rewarded(self) -> Self:
        if not (self.accuracy or self.format or self.language or self.random):
            raise ValueError("every weight is 0: nothing is rewarded")
        if bool(self.overlong) != (self.overlong_buffer is not None):
            raise ValueError("overlong and overlong_buffer go together: set both, or neither")
        return self


def score(rewards: Rewards, episodes: list[Episode], *, max_tokens: int, key: str) -> None:
    """Give every episode its `reward`. All of them at once, because math-verify's processes share the work.

    max_tokens: the longest answer that was allowed; key: what the control arm's coin depends on beside question and sample.
    """
    answers = [None if episode.truncated else final_answer(episode.text) for episode in episodes]
    pairs = [(e.problem.answer, a) for e, a in zip(episodes, answers, strict=True) if a is not None]
    judged = iter(verdicts(pairs, rewards.verifier, timeout_s=rewards.verify_timeout_s))
    for episode, answer in zip(episodes, answers, strict=True):
        verdict: Verdict = "wrong" if answer is None else next(judged)
        parts = {"accuracy": float(verdict == "right")} | _parts(rewards, episode, max_tokens, key)
        total = sum(getattr(rewards, name) * part for name, part in parts.items())
        episode.reward = Reward(total=total, parts=parts, verdict=verdict)


def _parts(rewards: Rewards, episode: Episode, max_tokens: int, key: str) -> dict[str, float]:
    """All parts but accuracy."""
    formed = not episode.truncated and well_formed(episode.text, require_thinking=rewards.require_thinking)
    parts = {"format": float(formed)}
    # Truncated thinking earns nothing, in whatever language: an answer cut at the limit scores 0.
    thought = None if episode.truncated else thinking(episode.text)
    share = None if thought is None else language_share(thought, rewards.language_target)
    if share is not None:
        parts["language"] = share
    if rewards.overlong_buffer is not None:
        parts["overlong"] = overlong(len(episode.completion_ids), max_tokens, rewards.overlong_buffer)
    if rewards.random:
        parts["random"] = float(random.Random(f"coin-{key}-{episode.problem.question}-{episode.sample}").random() < 0.5)
    return parts


def same_answer(a: str, b: str, rewards: Rewards) -> bool:
    """Whether two final answers state the same thing, for majority votes. Without a verdict they are different."""
    if " ".join(a.split()) == " ".join(b.split()):
        return True
    return verdicts([(a, b)], rewards.verifier, timeout_s=rewards.verify_timeout_s) == ["right"]
