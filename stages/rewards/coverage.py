"""Rewards that have no value for any answer: the stage ends before it trains on nothing.

A single answer without a value is left out of training, whatever its text did to the function. When there is a value for no
answer of a step, answers that no model wrote decide whether it is the texts, which must not end a run, or the rewards.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stages.contract.errors import UserError
from stages.problems.episode import Episode, Problem
from stages.problems.templates import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN
from stages.rewards.answers.verifiers import canaries_missed, used
from stages.rewards.functions import function_parts

if TYPE_CHECKING:
    from stages.rewards.settings import Rewards


def check_coverage(rewards: "Rewards", episodes: Sequence[Episode], where: str) -> None:
    """Raise UserError when a reward function or a verifier has no value for any of some scored answers.

    where: what the answers are of, such as `step 3`.
    """
    for name, reward in rewards.functions.items():
        faults = Counter(episode.faults[name] for episode in episodes if name in episode.faults)
        if episodes and faults.total() == len(episodes) and not _works(rewards, name, episodes[0].problem):
            what = f"`{reward.function}` has no value for any of the {len(episodes)} answers of {where}"
            mend = "fix the function, or take it out of `rewards.functions`"
            raise UserError(f"{what}: {faults.most_common(1)[0][0]}", where=f"rewards.functions.{name}", mend=mend)
    judged = [episode for episode in episodes if episode.problem.judged and not episode.faults]
    for name in used((episode.problem.verifier for episode in judged), rewards.verifier):
        verdicts = [e.scored.verdict for e in judged if (e.problem.verifier or rewards.verifier) == name]
        if set(verdicts) == {"none"} and (missed := canaries_missed(rewards, [name])):
            what = f"`{name}` has no verdict for any of the {len(verdicts)} answers of {where}, and fails on known ones"
            mend = "see `r1 doctor`, or take another verifier"
            raise UserError(f"{what}: {missed[0]}", where="rewards.verifier", mend=mend)


def _works(rewards: "Rewards", name: str, problem: Problem) -> bool:
    """Whether a function has a value for one of two plain answers to a problem: its reference answer, and `0`."""
    alone = rewards.model_copy(update={"functions": {name: rewards.functions[name]}})
    canaries = []
    for answer in (problem.answer, "0"):
        final = f"{ANSWER_OPEN}{answer}{ANSWER_CLOSE}" if rewards.answer_in == "tags" else rf"\boxed{{{answer}}}"
        text = f"{THINK_OPEN}It is {answer}.{THINK_CLOSE} {final}"
        canaries.append(Episode(problem, 0, "", [], [0], [0.0], text, "stop"))
    return any(parts is not None for parts in function_parts(alone, canaries))
