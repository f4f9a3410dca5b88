"""lm-eval tasks of evaluations: names looked up, YAML files of the user's read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flows.doctor.finding import Finding, mistake
from flows.doctor.scope import Scope
from stages.contract.errors import UserError
from stages.contract.suggest import nearest
from stages.evals.task_file import check_task_file
from stages.evals.task_index import builtin_tasks


def examine_tasks(scope: Scope) -> Iterator[Finding]:
    """A finding for each stage that names tasks, or for each mistake."""
    for name, config in scope.stages.items():
        for key, holder in (("", config), ("decontaminate.", getattr(config, "decontaminate", None))):
            names, files = getattr(holder, "tasks", None) or (), getattr(holder, "task_files", None) or ()
            if names or files:
                yield from _tasks(scope, name, key, names, files)


def _tasks(scope: Scope, name: str, key: str, names: Any, files: Any) -> Iterator[Finding]:
    check, good = f"{name}: tasks", True
    if names:
        try:
            known = builtin_tasks(scope.note)
        except UserError as error:
            yield Finding(check, "fail", error.what, error.mend)
            return
        for task in names:
            if task not in known:
                good = False
                where = scope.where(name, f"{key}tasks")
                yield Finding(check, "fail", f"lm-eval has no task `{task}`", nearest(task, known)[:300], where, "recipe")
    for file in files:
        try:
            check_task_file(Path(file))
        except UserError as error:
            good = False
            yield mistake(check, error, scope.where(name, f"{key}task_files"))
    if good:
        yield Finding(check, "ok", f"{', '.join([*names, *files])}: known to lm-eval", about="recipe")
