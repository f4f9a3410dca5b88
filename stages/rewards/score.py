"""The scoring of sampled answers: parts, verdict, total (DeepSeek-R1, sections 2.2 and 3.2).

R1-Zero adds accuracy and format with equal weight; the reasoning RL adds language consistency. In the RL for all scenarios
general prompts are `unjudged`: their answers have no accuracy, and train on the preference and what else is asked for.
"""

import math
import random

from stages.problems.episode import Episode, Problem, Reward, Verdict, Verifier
from stages.rewards.answers.verifiers import VERIFIERS, Asked, judge
from stages.rewards.format import well_formed
from stages.rewards.functions import function_parts
from stages.rewards.language import language_share
from stages.rewards.penalties import overlong
from stages.rewards.repetition import repetition
from stages.rewards.settings import Rewards
from stages.rewards.tags import final_answer, thinking

__all__ = ["Rewards", "final_answer", "same_answer", "score", "thinking"]


def score(rewards: Rewards, episodes: list[Episode], *, max_tokens: int, key: str) -> None:
    """Give every episode its `reward`. All of them at once, because the verifiers' processes share the work.

    max_tokens: the longest answer that was allowed; key: what the control arm's coin depends on beside question and sample.
    An answer of which one of the user's functions has nothing to say in time, or whose preference is not a finite number, has
    no verdict: its reward is not known. An answer to an unjudged problem has no part `accuracy`, cut or not.
    """
    answers = [None if episode.truncated else final_answer(episode.text, rewards.answer_in) for episode in episodes]
    asked = [Asked(e.problem, a) for e, a in zip(episodes, answers, strict=True) if a is not None]
    judged = iter(judge(asked, rewards))
    own = function_parts(rewards, episodes)
    preferred = _preferences(rewards, episodes)
    for number, (episode, answer) in enumerate(zip(episodes, answers, strict=True)):
        verdict: Verdict = ("wrong" if episode.problem.judged else "unjudged") if answer is None else next(judged)
        accuracy = {"accuracy": float(verdict == "right")} if episode.problem.judged else {}
        parts = accuracy | _parts(rewards, episode, max_tokens, key)
        preference = preferred.get(number, 0.0)
        if number in preferred and math.isfinite(preference):
            parts["preference"] = preference
        mine = own[number]
        episode.reward = Reward(
            total=rewards.total(parts | (mine or {})),
            parts=parts | (mine or {}),
            verdict=verdict if mine is not None and math.isfinite(preference) else "none",
        )


def _preferences(rewards: Rewards, episodes: list[Episode]) -> dict[int, float]:
    """Number of an episode -> what the reward model says.

    An answer cut at the limit is not shown to it and has what the least liked of its group has: the model's numbers may all be
    below 0, and then nothing at all would be better than any answer. Of a group that is cut throughout, all have 0.
    """
    whole = [number for number, episode in enumerate(episodes) if not episode.truncated]
    if rewards.preference_model is None or not whole:
        return {}
    from stages.rewards.preference import preferences

    found = dict(zip(whole, preferences(rewards.preference_model, [episodes[n] for n in whole]), strict=True))
    least: dict[str, float] = {}
    for number in (n for n in whole if math.isfinite(found[n])):
        problem = episodes[number].problem.id
        least[problem] = min(found[number], least.get(problem, found[number]))
    return found | {n: least.get(e.problem.id, 0.0) for n, e in enumerate(episodes) if n not in found}


def _parts(rewards: Rewards, episode: Episode, max_tokens: int, key: str) -> dict[str, float]:
    """The parts that rules tell from the text alone."""
    formed = not episode.truncated and well_formed(episode.text, require_thinking=rewards.require_thinking)
    parts = {"format": float(formed)}
    # Truncated thinking earns nothing, in whatever language: an answer cut at the limit scores 0.
    thought = None if episode.truncated else thinking(episode.text)
    share = None if thought is None else language_share(thought, rewards.language_target, rewards.language_by)
    if share is not None:
        parts["language"] = share
    if rewards.overlong_buffer is not None:
        parts["overlong"] = overlong(len(episode.completion_ids), max_tokens, rewards.overlong_buffer)
    if rewards.repetition:
        parts["repetition"] = repetition(episode.text, rewards.repetition_words)
    if rewards.random:
        parts["random"] = float(random.Random(f"coin-{key}-{episode.problem.question}-{episode.sample}").random() < 0.5)
    return parts


def same_answer(a: str, b: str, rewards: Rewards, verifier: Verifier | None = None) -> bool:
    """Whether two final answers state the same thing, for majority votes. Without a verdict they are different.

    verifier: the problem's own; None: the rewards'.
    """
    if " ".join(a.split()) == " ".join(b.split()):
        return True
    name = verifier or rewards.verifier
    return VERIFIERS[name].values and judge([Asked(Problem("", "", a, "", verifier=name), b)], rewards) == ["right"]
