"""Calls of a user's reward functions on made-up answers, before anything is sampled.

A module that cannot be imported, or a function that raises on a right answer, would otherwise show after the first rollout.
The module runs in a process of the verifiers' pool, under its limits and without key variables.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stages.contract.errors import UserError
from stages.problems.episode import Episode, Problem
from stages.rewards.functions import answer_fields, number_of
from stages.rewards.settings import Rewards
from stages.rewards.verifier_pool.pool import Pool

SOME = Problem("canary:0", "What is 1 + 1?", "2", "canary")
"""The problem of a stage of which no problem is known yet."""


@dataclass(frozen=True)
class Canary:
    """How a function did."""

    name: str
    """Of the reward."""
    function: str
    place: str = ""
    """File and line, where the fault has one."""
    fault: str = ""
    """Why the right answer has no value; empty when it has one, or None."""
    cut_fault: str = ""
    """Why an answer cut at the limit, which has no final answer, has no value."""


def try_functions(rewards: Rewards, problem: Problem = SOME, folders: Sequence[str] | None = None) -> Iterator[Canary]:
    """Call every function on a right answer to the problem and on one that was cut.

    `folders`: the recipe's code folders; None: those of this process.
    """
    whole, cut = _answers(rewards, problem)
    for name, reward in rewards.functions.items():
        pool = Pool(reward.function, rewards.limits(), processes=1, folders=folders)
        try:
            faults = [number_of(reply)[1] for reply in pool.ask([[whole], [cut]])]
        except UserError as error:
            place = "" if error.where == "rewards" else error.where
            yield Canary(name, reward.function, place, error.what)
        except RuntimeError:
            yield Canary(name, reward.function, fault="its process ends or hangs while the module is imported")
        else:
            yield Canary(name, reward.function, "", *faults)
        finally:
            pool.end()


def _answers(rewards: Rewards, problem: Problem) -> tuple[dict[str, object], dict[str, object]]:
    final = problem.answer if rewards.answer_in == "tags" else rf"\boxed{{{problem.answer}}}"
    answered = f"<answer> {final} </answer>" if rewards.answer_in == "tags" else final
    thinking = f"<think> The answer is {problem.answer}. </think>"
    whole = Episode(problem, 0, problem.question, [], [0] * 16, [0.0] * 16, f"{thinking} {answered}", "stop")
    cut = Episode(problem, 1, problem.question, [], [0] * 16, [0.0] * 16, "<think> The answer", "length")
    return answer_fields(rewards, whole), answer_fields(rewards, cut)
