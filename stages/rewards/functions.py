"""Rewards of the user's own: any `module:function`, in a killable process of its own.

The function is given one answer as a dict: `question`, `reference`, `text` (thinking and all), `answer` (the final one, or
None), `truncated`, `tokens` (how many), `metadata` (of the problem, or None). It returns a number, or None where there is
nothing to be measured. The fingerprint knows its name, not its code: after a change run the stage with `--fresh`.
"""

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from stages.problems.episode import Episode
from stages.rewards.pool import Reply, shared_pool
from stages.rewards.settings import Rewards
from stages.rewards.tags import final_answer

_told: set[str] = set()
"""Functions of which a fault was told already."""


def function_parts(rewards: Rewards, episodes: Sequence[Episode]) -> list[dict[str, float] | None]:
    """The parts of each answer by name; None for an answer for which a function raised, or had no number within its limit.

    Why is put into the answer's `faults`.
    Raises UserError when a function cannot be loaded.
    """
    found: list[dict[str, float] | None] = [{} for _ in episodes]
    requests = [[_given(rewards, episode)] for episode in episodes]
    for name, reward in rewards.functions.items():
        pool = shared_pool(reward.function, rewards.limits(), rewards.verify_processes)
        for index, reply in enumerate(pool.ask(requests)):
            value, fault = _number(reply)
            if fault:
                _tell(name, fault)
                episodes[index].faults[name] = fault
                found[index] = None
            elif value is not None and (parts := found[index]) is not None:
                parts[name] = value
    return found


def _given(rewards: Rewards, episode: Episode) -> dict[str, Any]:
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


def _number(reply: Reply) -> tuple[float | None, str]:
    """A finite number or None, and what is wrong when it is neither."""
    if reply.fault or reply.value is None:
        return None, reply.fault
    if not isinstance(reply.value, int | float) or not math.isfinite(reply.value):
        return None, f"{reply.value!r} is not a number"
    return float(reply.value), ""


def _tell(name: str, fault: str) -> None:
    if name not in _told:
        _told.add(name)
        print(f"rewards.functions.{name}: an answer has no reward ({fault}); told once", file=sys.stderr, flush=True)
