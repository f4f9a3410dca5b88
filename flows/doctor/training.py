"""Settings of training stages: the DeepSpeed file merged as the engine merges it."""

from collections.abc import Iterator
from typing import Any, Literal

from flows.doctor.finding import Finding, mistake
from flows.doctor.gpus import local_gpus
from flows.doctor.scope import Scope
from flows.launch.launcher import launcher_of
from stages.contract.errors import UserError
from stages.engine.deepspeed_file import merge, stage_training
from stages.engine.settings import deepspeed_file, deepspeed_settings


def examine_training(scope: Scope) -> Iterator[Finding]:
    """A finding for each training stage with a DeepSpeed file of the user's."""
    for name, config in scope.stages.items():
        settings: Any = config
        file = getattr(settings, "deepspeed", None)
        if file is None or not file.endswith(".json"):
            continue
        check, where = f"{name}: DeepSpeed", scope.where(name, "deepspeed")
        shape, item = scope.shapes[0].get(name, (None, None))
        formats: dict[int | None, Literal["float32", "bfloat16"]] = {4: "float32", 2: "bfloat16"}
        try:
            stage = stage_training(
                settings, dtype=formats.get(item), on_cpu=_on_cpu(settings), hidden=shape.hidden if shape else None
            )
            merged = merge(deepspeed_settings(file), stage, str(deepspeed_file(file)))
        except UserError as error:
            yield mistake(check, error, where)
            continue
        place = str(deepspeed_file(file))
        for warning in merged.warnings:
            yield Finding(check, "warn", warning, where=place, about="recipe")
        if not merged.warnings:
            yield Finding(check, "ok", place, about="recipe")


def _on_cpu(config: Any) -> bool | None:
    """None where another machine runs the stage."""
    if config.compute.device == "cpu":
        return True
    if launcher_of(config.compute) != "local":
        return None
    return not local_gpus()
