"""Rewards that have no value for any answer: the stage ends before it trains on nothing.

A single answer without a value is left out of training, whatever its text did to the function. When a function of the user's
has no value for any answer of a step, it is the function that is broken. When a verifier has none, its canaries say so or not.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stages.problems.episode import Episode
from stages.rewards.verifiers import canaries_missed, used
from stages.store.errors import UserError

if TYPE_CHECKING:
    from stages.rewards.settings import Rewards


def check_coverage(rewards: "Rewards", episodes: Sequence[Episode], where: str) -> None:
    """Raise UserError when a reward function or a verifier has no value for any of some scored answers.

    where: what the answers are of, such as `step 3`.
    """
    for name, reward in rewards.functions.items():
        faults = Counter(episode.faults[name] for episode in episodes if name in episode.faults)
        if episodes and faults.total() == len(episodes):
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
