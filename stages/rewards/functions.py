"""Rewards of the user's own: any `module:function`, in a killable process of its own.

The function is given one answer as a dict: `question`, `reference`, `text` (thinking and all), `answer` (the final one, or
None), `truncated`, `tokens` (how many), `metadata` (of the problem, or None). It returns a number of any kind (a NumPy scalar
and a tensor of no dimension too), or None where there is nothing to be measured. Its file, and what that imports beside it, are
part of the stage's fingerprint.
"""

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from stages.problems.episode import Episode
from stages.rewards.settings import Rewards
from stages.rewards.tags import final_answer
from stages.rewards.verifier_pool.pool import Reply, shared_pool

LARGEST = 1e12
"""Largest number that a function may return: the variance of a group's rewards is computed from squares."""
_told: set[str] = set()
"""Functions of which a fault was told already."""


def function_parts(rewards: Rewards, episodes: Sequence[Episode]) -> list[dict[str, float] | None]:
    """The parts of each answer by name; None for an answer for which a function raised, or had no number within its limit.

    Why is put into the answer's `faults`.
    Raises UserError when a function cannot be loaded.
    """
    found: list[dict[str, float] | None] = [{} for _ in episodes]
    requests = [[answer_fields(rewards, episode)] for episode in episodes]
    for name, reward in rewards.functions.items():
        pool = shared_pool(reward.function, rewards.limits(), rewards.verify_processes)
        for index, reply in enumerate(pool.ask(requests)):
            value, fault = number_of(reply)
            if fault:
                _tell(name, fault)
                episodes[index].faults[name] = fault
                found[index] = None
            elif value is not None and (parts := found[index]) is not None:
                parts[name] = value
    return found


def answer_fields(rewards: Rewards, episode: Episode) -> dict[str, Any]:
    """What a function is called with."""
    problem = episode.problem
    return {
        "question": problem.question,
        "reference": problem.answer,
        "text": episode.text,
        "answer": None if episode.truncated else final_answer(episode.text, rewards.answer_in),
        "truncated": episode.truncated,
        "tokens": len(episode.completion_ids),
        "metadata": None if problem.metadata is None else json.loads(problem.metadata),
    }


def number_of(reply: Reply) -> tuple[float | None, str]:
    """A finite number or None, and what is wrong when it is neither."""
    if reply.fault or reply.value is None:
        return None, reply.fault
    try:
        value = float(reply.value) if isinstance(reply.value, int | float) else math.nan
    except OverflowError:  # an integer beyond the largest float
        value = math.inf
    if not math.isfinite(value):
        return None, f"{_shown(reply.value)} is not a number"
    if abs(value) > LARGEST:
        return None, f"{value:g} is too large for a reward (more than {LARGEST:g})"
    return value, ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]} …"


def _tell(name: str, fault: str) -> None:
    if name not in _told:
        _told.add(name)
        print(f"rewards.functions.{name}: an answer has no reward ({fault}); told once", file=sys.stderr, flush=True)
