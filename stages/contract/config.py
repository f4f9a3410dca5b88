"""Typed configuration: pydantic models, and what of a configuration decides a stage's result.

Every field has its doc string under it. A field is *semantic* (part of the stage's fingerprint) unless it is marked with
`EXECUTION` (launcher, threads, checkpoint interval), or names an input (`ModelRef`, `DatasetRef`, `ReportRef`) or a file
(`ExternalPath`), whose content's digest takes its place. The name of a function of the user's (`UserFunction`) is semantic, and
so are the files that it is imported from (stages/store/user_files.py).
"""

import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

OutputKind = Literal["model", "dataset", "report"]
InputKind = OutputKind | Literal["checkpoint"]


@dataclass(frozen=True)
class Execution:
    """Marks a field that changes how a stage runs but not what it computes."""


@dataclass(frozen=True)
class StageInput:
    """Marks a field that names another stage of the recipe, whose output, or one of whose checkpoints, is an input."""

    output: InputKind


@dataclass(frozen=True)
class ExternalFile:
    """Marks a field that names a file or folder of the user's; its content's digest goes into the fingerprint."""

    parts: Callable[[Path, Sequence[str]], Mapping[str, Path]] = lambda *_: {}
    """Further files and folders that the file stands for (what it includes): name -> path. Takes its path and the code folders;
    raises UserError for one that is missing."""
    only: Callable[[str], bool] = lambda _: True
    """Whether a value names a file of the user's, and not something that the program brings."""
    settings: bool = False
    """Whether it says how something is computed. What is computed from, data and models, is all else."""


@dataclass(frozen=True)
class ImportedFunction:
    """Marks a semantic field that names a function, `module:function`; the user's files that its import reads count too."""


@dataclass(frozen=True)
class Added:
    """Marks a semantic field that came later: at its default it is no part of the fingerprint, which stays as it was."""


def _checkpoint(text: str) -> str:
    stage, _, step = text.partition("@")
    if not (stage and re.fullmatch("0*[1-9][0-9]{0,17}", step)):
        raise ValueError("should be STAGE@STEP, such as `reasoning@60`")
    return text


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not (host and re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 2**16):
        raise ValueError("should be HOST:PORT, such as `node1:29400`")
    return text


EXECUTION = Execution()
ADDED = Added()
Address = Annotated[str, AfterValidator(_address)]
"""`HOST:PORT`."""
ModelRef = Annotated[str, StageInput("model")]
DatasetRef = Annotated[str, StageInput("dataset")]
ReportRef = Annotated[str, StageInput("report")]
CheckpointRef = Annotated[str, StageInput("checkpoint"), AfterValidator(_checkpoint)]
"""`STAGE@STEP`."""


_VARIABLE = re.compile(r"\$(?:\{[A-Za-z_][A-Za-z0-9_]*\}|[A-Za-z_][A-Za-z0-9_]*)")


def expanded_path(text: str) -> str:
    """Expand a leading `~` or `~user`, and `$NAME` and `${NAME}` of the environment, as a shell does.

    A path that exists as it is written stays as it is.

    Raises:
        ValueError: There is no such home, or no such variable: a folder called `~` or `$HOME` is never meant.

    """
    path = os.path.expanduser(text)  # noqa: PTH111 - leaves the rest of the text as it is
    if os.path.lexists(path):
        return path
    if path.startswith("~"):
        raise ValueError(f"`{path.partition('/')[0]}` is not a home folder known here; write the path in full")
    if missing := [name for name in _VARIABLE.findall(path) if name.strip("${}") not in os.environ]:
        raise ValueError(f"the variable `{missing[0]}` is not set; write the path in full")
    return os.path.expandvars(path)


Expanded = AfterValidator(expanded_path)
"""For fields that name a file."""
ExternalPath = Annotated[str, Expanded, ExternalFile()]
UserFunction = Annotated[str, ImportedFunction()]
"""`module:function`."""


def _types_in(annotation: Any) -> Iterator[Any]:
    """An annotation's types, such as those of a union."""
    yield annotation
    for argument in get_args(annotation):
        yield from _types_in(argument)


class Config(BaseModel):
    """Base of every configuration model: unknown keys are refused, values cannot be changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, values: Any) -> Any:
        """Pydantic would read `steps: true` as 1."""
        booleans = (
            {name: value for name, value in values.items() if isinstance(value, bool)} if isinstance(values, dict) else {}
        )
        for name, value in booleans.items():
            types = set(_types_in(cls.model_fields[name].annotation)) if name in cls.model_fields else set()
            if types & {int, float} and not types & {bool, Any}:
                error = PydanticCustomError("boolean_for_number", "true and false are not numbers")
                raise ValidationError.from_exception_data(cls.__name__, [{"type": error, "loc": (name,), "input": value}])
        return values


class Compute(Config):
    """Where and how widely a stage runs. None of it changes the result beyond rounding."""

    processes: int = Field(default=1, ge=1)
    """Processes (ranks) on each machine; more than one runs under torchrun. Generation and evaluation use one."""
    hosts: int = Field(default=1, ge=1)
    """Machines that train together, each with as many processes."""
    launcher: Literal["local", "slurm", "kubernetes"] = "local"
    """What starts them. `local`: `r1 run` starts its own machine's processes, and `r1 join` every other one's; `slurm`: a step
    of the allocation that `r1` runs in; `kubernetes`: a JobSet, for stages on one machine too."""
    rendezvous: Address | None = None
    """HOST:PORT of the first machine, as the others reach it: needed by several hosts under `local`, known to the others."""
    interface: str | None = None
    """Network interface between the machines, such as `eth0`; null: that of the way to `rendezvous` (NCCL chooses its own)."""
    join_s: float = Field(default=600.0, gt=0)
    """Seconds that machines wait for each other before a stage begins."""
    manifest: Annotated[str, Expanded] | None = None
    """The JobSet that the launcher `kubernetes` fills in: image, volumes, GPUs; null: infra/kubernetes/stage.yaml."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of each process; by default the machine's cores divided by `processes`."""
    profile: int | None = Field(default=None, ge=1)
    """The training step of which a trace is written into the stage's folder (for chrome://tracing or Perfetto); null: none."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA when PyTorch sees it."""
    slots: str | None = Field(default=None, min_length=1)
    """Prefect global concurrency limit of which the stage holds as many slots as it has processes while it runs, so that
    pipelines that share GPUs wait for each other; null: none. `r1 deploy --slots gpu=8` makes one of eight."""
    frozen_s: float = Field(default=120.0, gt=0)
    """Seconds that a process or a machine may give no sign of life before the stage is ended (a sign comes every two)."""
    silent_s: float = Field(default=1800.0, gt=0)
    """Seconds that the stage may get nowhere (no forward pass, token or chunk on any process) before it is ended; they begin
    with the imports and the loading of the model."""

    @model_validator(mode="after")
    def _found_by_the_others(self) -> Self:
        if self.hosts > 1 and self.launcher == "local" and self.rendezvous is None:
            raise ValueError("several hosts need `rendezvous: HOST:PORT` of the first of them, or the launcher `slurm`")
        return self


class StageConfig(Config):
    """What every kind of stage has."""

    kind: str
    """The kind of stage: one module under stages/."""
    seed: int = Field(default=0, ge=0)
    """Every random choice is derived from it: (seed, purpose, step, problem, sample)."""
    compute: Annotated[Compute, EXECUTION] = Compute()
    """Processes, threads and device."""


Marker = Execution | StageInput | ExternalFile | ImportedFunction


def _marker(metadata: Any) -> Marker | None:
    return next((m for m in metadata if isinstance(m, Marker)), None)


def _annotation_marker(annotation: Any) -> Marker | None:
    """The marker anywhere inside an annotation, such as `dict[str, ReportRef]` or `ExternalPath | None`."""
    if (found := _marker(getattr(annotation, "__metadata__", ()))) is not None:
        return found
    return next((m for m in map(_annotation_marker, get_args(annotation)) if m is not None), None)


@functools.cache  # asked for every field of every stage, again and again
def field_marker(model: type[BaseModel], name: str) -> Marker | None:
    """How the field `name` of `model` is marked; None means semantic."""
    field = model.model_fields[name]
    return _marker(field.metadata) or _annotation_marker(field.annotation)


def semantic(value: Any) -> Any:
    """The part of a configuration that decides the result, as plain JSON values."""
    if isinstance(value, BaseModel):
        names = (n for n in type(value).model_fields if isinstance(field_marker(type(value), n), ImportedFunction | None))
        return {name: semantic(getattr(value, name)) for name in names if not _added_and_unsaid(value, name)}
    if isinstance(value, dict):
        return {key: semantic(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [semantic(item) for item in value]
    return value


def _added_and_unsaid(value: BaseModel, name: str) -> bool:
    field = type(value).model_fields[name]
    return ADDED in field.metadata and getattr(value, name) == field.get_default(call_default_factory=True)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}.{index}")


def marked(value: Any, kind: type, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """Every (dotted path, text, marker) below `value` whose field carries a marker of `kind`."""
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            marker, below = field_marker(type(value), name), f"{path}.{name}" if path else name
            if isinstance(marker, kind):
                for leaf, text in _leaves(getattr(value, name), below):
                    yield leaf, text, marker
            elif marker is None:
                yield from marked(getattr(value, name), kind, below)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from marked(item, kind, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from marked(item, kind, f"{path}.{index}")


def stage_inputs(config: StageConfig) -> dict[str, tuple[str, InputKind]]:
    """Role (dotted path of the field) -> (name of the stage, what of it is needed)."""
    return {path: (text.partition("@")[0], marker.output) for path, text, marker in marked(config, StageInput)}


def checkpoint_inputs(config: StageConfig) -> dict[str, int]:
    """Role -> the step whose checkpoint is needed."""
    found = ((path, text, marker) for path, text, marker in marked(config, StageInput) if marker.output == "checkpoint")
    return {path: int(text.partition("@")[2]) for path, text, _ in found}


def external_paths(config: StageConfig) -> dict[str, str]:
    """Role (dotted path of the field) -> path of a file or folder of the user's."""
    return {path: text for path, text, marker in marked(config, ExternalFile) if marker.only(text)}


def external_files(config: StageConfig) -> dict[str, tuple[Path, ExternalFile]]:
    """The same with what is known of the field."""
    return {path: (Path(text), marker) for path, text, marker in marked(config, ExternalFile) if marker.only(text)}


def user_functions(config: StageConfig) -> dict[str, str]:
    """Role (dotted path of the field) -> `module:function` of a reward of the user's."""
    return {path: text for path, text, _ in marked(config, ImportedFunction)}
