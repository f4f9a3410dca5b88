"""The kinds of stages: what a recipe's `kind:` may name, and the module that has it. Modules are imported when asked for."""

import importlib
from typing import Any

from stages.store.errors import UserError
from stages.store.stage import StageKind
from stages.store.suggest import nearest

MODULES = {
    "model": "stages.model",
    "dataset": "stages.dataset",
    "toy_base": "stages.toy_base",
    "rl": "stages.rl",
    "curate": "stages.curate",
    "sft": "stages.sft",
    "evaluate": "stages.evaluate",
    "evaluate_model": "stages.evaluate_model",
    "summary": "stages.summary",
    "gate": "stages.gate",
    "study": "stages.study",
}
"""`evaluate` expands into one `evaluate_model` per model and a `summary`; a section `study:` into arms and a `study`."""


def stage_kind(name: str, where: str = "kind") -> StageKind[Any]:
    """The kind called `name`.

    Raises UserError, naming the nearest known kind, when there is none.
    """
    if name not in MODULES:
        raise UserError(f"unknown kind of stage `{name}`", where=where, mend=nearest(name, MODULES))
    kind: StageKind[Any] = importlib.import_module(MODULES[name]).KIND
    return kind
