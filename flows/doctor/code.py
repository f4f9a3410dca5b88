"""The recipe's own code: reward functions called on made-up answers, in the verifiers' processes."""

from collections.abc import Iterator
from typing import Any

from flows.doctor.data import first_of
from flows.doctor.finding import Finding
from flows.doctor.scope import Scope
from stages.rewards.canary import SOME, Canary, try_functions

FUNCTIONS = "rewards.functions"


def examine_code(scope: Scope) -> Iterator[Finding]:
    """A finding for each reward function of each stage; the same function is called once."""
    tried: dict[str, Canary] = {}
    for name, config in scope.stages.items():
        rewards: Any = getattr(config, "rewards", None)
        for reward, settings in (rewards.functions if rewards is not None else {}).items():
            check, where = f"{name}: reward {reward}", scope.where(name, f"{FUNCTIONS}.{reward}")
            if not scope.execute:
                yield Finding(check, "ok", f"`{settings.function}` was not called (--no-code)", about="recipe")
                continue
            if settings.function not in tried:
                only = rewards.model_copy(update={"functions": {reward: settings}})
                problem = first_of(scope, config) or SOME
                (tried[settings.function],) = try_functions(only, problem, scope.recipe.code_folders or None)
            yield _told(check, where, tried[settings.function])


def _told(check: str, where: str, canary: Canary) -> Finding:
    if canary.fault:
        place = f"{canary.place}: " if canary.place else ""
        raised = "cannot be loaded" in canary.fault
        what = f"{place}{canary.fault}" if raised else f"`{canary.function}` gives a right answer no number ({canary.fault})"
        mend = "correct it" if canary.place else "it gets one answer as a dict and returns a number, or None"
        return Finding(check, "fail", what, mend, where, "recipe")
    if canary.cut_fault:
        what = f"`{canary.function}` gives an answer that was cut no number ({canary.cut_fault})"
        return Finding(check, "warn", what, "its `answer` is None there; such answers would not be trained on", where, "recipe")
    return Finding(check, "ok", f"`{canary.function}` was called", about="recipe")
