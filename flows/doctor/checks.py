"""All checks in their order, and the commands' use of them: stop at the first failure, or show everything."""

import argparse
import sys
from collections.abc import Iterator

from flows.doctor.capacity import examine_capacity
from flows.doctor.code import examine_code
from flows.doctor.data import examine_data
from flows.doctor.finding import Finding, mistake
from flows.doctor.machine import examine_machine
from flows.doctor.models import examine_models
from flows.doctor.scope import Scope, unfinished
from flows.doctor.start import examine_start
from flows.doctor.tasks import examine_tasks
from flows.doctor.training import examine_training
from flows.runs.selection import Selection
from stages.contract.errors import UserError
from stages.costs.shape import UnknownShape
from stages.recipe.resolve import ResolvedRecipe

CALIBRATION = "calibration.json"
"""In the runs folder: what `r1 plan --calibrate` wrote."""


def examine(scope: Scope) -> Iterator[Finding]:
    """One finding after the other: what no run can do without, the recipe's own mistakes, what this machine lacks for it.

    What several stages have in common (an evaluation's models, `shared:`) is said once.
    """
    told: set[tuple[str, str]] = set()
    for finding in _examined(scope):
        if finding.state == "ok" or (finding.where, finding.found) not in told:
            told.add((finding.where, finding.found))
            yield finding


def _examined(scope: Scope) -> Iterator[Finding]:
    """In the order of what they take: the shapes of models, which may be in GGUF files, come last."""
    yield from examine_start(scope)
    yield from examine_data(scope)
    yield from examine_tasks(scope)
    yield from examine_code(scope)
    yield from examine_training(scope)
    for name, error in scope.shapes[1].items():
        config = scope.recipe.stages[name]
        if name in scope.stages and (getattr(config, "gguf", None) or getattr(config, "path", None)):
            if isinstance(error, UnknownShape):
                what = f"its size is not known here ({error.what}): room and time are not looked at"
                yield Finding(f"{name}: model", "warn", what, "", scope.where(name, ""))
            else:
                yield mistake(f"{name}: model", error, scope.where(name, ""))
    yield from examine_models(scope)
    yield from examine_machine(scope)
    try:
        yield from examine_capacity(scope, scope.recipe.runs / CALIBRATION)
    except UserError as error:  # adapters that a model cannot have, a calibration that cannot be read
        yield mistake("plan", error)


def demand(recipe: ResolvedRecipe, selection: Selection, options: argparse.Namespace, *, elsewhere: bool = False) -> None:
    """Raise the first failure of what a run would meet; its warnings go to standard error.

    `options`: of the command: `config` (absent where a run is resumed), `no_code`. `elsewhere`: another machine runs it, so
    that what this one lacks is no fault.
    """
    stages, finished = unfinished(recipe, selection)
    file = str(getattr(options, "config", None) or "")
    scope = Scope(recipe, stages, finished, file, execute=not getattr(options, "no_code", False), note=_note)
    for finding in examine(scope):
        if finding.state == "fail" and not (elsewhere and finding.about == "machine"):
            raise finding.error()
        if finding.state != "ok" and not elsewhere:
            _note(f"warning: {finding.error()}")


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
