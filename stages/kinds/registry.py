"""The kinds of stages: what a recipe's `kind:` may name, and the module that has it. Modules are imported when asked for."""

import importlib
from typing import Any

from stages.contract.errors import UserError
from stages.contract.suggest import nearest
from stages.store.stage import StageKind

MODULES = {
    "model": "stages.kinds.model",
    "dataset": "stages.kinds.dataset",
    "toy_base": "stages.kinds.toy_base",
    "rl": "stages.kinds.rl",
    "curate": "stages.kinds.curate",
    "sft": "stages.kinds.sft",
    "evaluate": "stages.kinds.evaluate",
    "evaluate_model": "stages.kinds.evaluate_model",
    "summary": "stages.kinds.summary",
    "gate": "stages.kinds.gate",
    "study": "stages.kinds.study",
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
