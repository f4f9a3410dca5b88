"""Room on disk, memory and time on this machine, held against the plan.

Refused is only what cannot work: models whose weights alone do not fit. What is merely too large by the cost model, or would
take months, is said and not decided.
"""

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from flows.doctor.finding import Finding
from flows.doctor.gpus import LocalGpu, local_gpus
from flows.doctor.scope import Scope
from flows.launch.launcher import launcher_of
from flows.plan.cost import Place, stage_cost, stage_memory
from flows.plan.counts import Counts
from flows.plan.shapes import Shapes
from stages.contract.config import StageConfig
from stages.costs.devices import Device, cpu_device, gpu_device, gpus, rates_of
from stages.runtime.platform import memory_limit

GIB = 1 << 30
LEAST_DISK = GIB / 2
"""Bytes for databases, logs, rollouts and the smallest models."""
HOURS_A_MONTH, HOURS_A_YEAR = 730.0, 8766.0
MOMENTS = 3
"""A checkpoint has three float32 numbers for each parameter: its weight and AdamW's two moments."""


@dataclass(frozen=True)
class Capacity:
    """What this machine has."""

    memory: float
    """Bytes, of the container where it has a limit."""
    gpus: tuple[LocalGpu, ...]

    def of(self, config: StageConfig) -> tuple[float, str]:
        """Bytes for a process's model, and what has them: a GPU, or the machine for all processes."""
        if self.gpus and config.compute.device != "cpu":
            gpu = min(self.gpus, key=lambda gpu: gpu.memory)
            return gpu.memory, f"its GPU ({gpu.name})"
        return self.memory, "this machine"


def local_capacity() -> Capacity:
    """Memory and GPUs of this machine."""
    total, limit = psutil.virtual_memory().total, memory_limit()
    return Capacity(float(total if limit is None else min(total, limit)), local_gpus())


def examine_capacity(scope: Scope, calibration: Path, machine: Capacity | None = None) -> Iterator[Finding]:
    """What does not fit this machine, or takes months on it; one finding where everything does.

    calibration: the file of this machine's measured speed, where there is one.
    """
    machine, shapes = machine or local_capacity(), scope.shapes[0]
    findings = [*_memory(scope, shapes, machine), *_time(scope, shapes, calibration, machine)]
    yield from findings
    yield _disk(scope, shapes)


def _memory(scope: Scope, shapes: Shapes, machine: Capacity) -> Iterator[Finding]:
    told: set[float] = set()
    for name, config in scope.stages.items():
        if name not in shapes or launcher_of(config.compute) != "local" or config.kind in ("gate", "dataset"):
            continue
        (shape, item), (room, owner) = shapes[name], machine.of(config)
        on_gpu = bool(machine.gpus) and config.compute.device != "cpu"
        shares = config.compute.processes if on_gpu else 1
        weights = shape.parameters * item / shares
        check = f"{name}: memory"
        if config.kind == "model":  # it is loaded in the machine's memory whatever there is besides
            weights, room, owner = float(shape.parameters * item), machine.memory, "this machine"
        if weights > room:
            if weights not in told:
                what = f"the weights alone take {_gb(weights)}, {owner} has {_gb(room)}"
                yield Finding(check, "fail", what, "take a smaller model, or another machine", scope.where(name, ""))
            told.add(weights)
            continue
        needed = _training_bytes(config, shapes[name], machine, on_gpu=on_gpu)
        if needed > room:
            what = f"an update takes about {_gb(needed)}, {owner} has {_gb(room)}"
            yield Finding(check, "warn", what, "see the table of `r1 plan`: another `deepspeed`, or smaller micro-batches")


def _training_bytes(config: Any, model: Any, machine: Capacity, *, on_gpu: bool) -> float:
    """At the peak of an update: of one process on a GPU, of all of them on a CPU; 0 for a stage that does not train."""
    device = _device(machine, {}, "") if on_gpu else cpu_device({}, machine.memory, "")
    if device is None:
        return 0.0
    memory = stage_memory(config, model, Place(device))
    layout = getattr(config, "deepspeed", "")
    if layout not in memory:
        return 0.0
    return float(memory[layout].total) * (1 if on_gpu else config.compute.processes)


def _time(scope: Scope, shapes: Shapes, calibration: Path, machine: Capacity) -> Iterator[Finding]:
    local = {name: config for name, config in scope.stages.items() if launcher_of(config.compute) == "local"}
    rates, source = rates_of(calibration)
    device = _device(machine, rates, source)
    if device is None:  # a GPU of which nothing is known
        return
    counts, place = Counts(scope.recipe, scope.finished), Place(device)
    hours = {name: stage_cost(name, c, shapes.get(name), counts, place).total / 3600 for name, c in local.items()}
    total = sum(hours.values())
    if total < HOURS_A_MONTH:
        return
    longest = max(hours, key=lambda name: hours[name])
    what = f"about {_long(total)} on this machine, by the cost model (`{longest}` alone {_long(hours[longest])})"
    yield Finding("time", "warn", what, "see `r1 plan`; take fewer steps, a smaller model, or a machine with GPUs")


def _device(machine: Capacity, rates: dict[str, float], source: str) -> Device | None:
    if not machine.gpus:
        return cpu_device(rates, machine.memory, source)
    words = machine.gpus[0].name.lower().replace(" ", "")
    name = next((name for name in gpus() if name in words), None)
    return None if name is None else gpu_device(name, rates)


def _disk(scope: Scope, shapes: Shapes) -> Finding:
    """The models and checkpoints of the stages that are to be computed."""
    total, least, unknown = 0.0, 0.0, []
    for name, config in scope.stages.items():
        stage: Any = config
        if stage.kind not in ("model", "toy_base", "rl", "sft"):
            continue
        if name not in shapes:
            unknown.append(name)
            continue
        shape, item = shapes[name]
        checkpoints = getattr(stage, "checkpoints", None)
        least += shape.parameters * item
        # The model, that of the best evaluation, and one checkpoint more than are kept, while it is written.
        best = 0 if checkpoints is None else shape.parameters * item
        kept = 0 if checkpoints is None else 4 * shape.parameters * MOMENTS * (checkpoints.keep + 1)
        total += shape.parameters * item + best + kept
    runs = scope.recipe.runs
    there = next((parent for parent in (runs, *runs.parents) if parent.is_dir()), Path("/"))
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        what = f"{runs}: the runs folder cannot be written ({error.strerror or error})"
        return Finding("disk", "fail", what, "set `runs` to a folder of yours")
    free = shutil.disk_usage(there).free
    if scope.stages and free < LEAST_DISK:
        what = f"{free / GIB:.2f} GiB are free for {runs}, a run needs {LEAST_DISK / GIB} and more"
        return Finding("disk", "fail", what, "`r1 gc` makes room; or set `runs` to a folder on another disk")
    found = f"models and checkpoints take up to {total / GIB:.1f} GiB, {free / GIB:.0f} GiB are free"
    if unknown:
        found += f" (not counted, for their size is not known yet: {', '.join(unknown)})"
    if total > free:
        return Finding("disk", "fail" if least > free else "warn", found, "`r1 gc` makes room; checkpoints.keep=1 wants less")
    return Finding("disk", "ok", found)


def fit_line(findings: list[Finding]) -> str:
    """What does not fit this machine, or takes months on it, in one line; empty where everything does."""
    texts = [f.found for f in findings if f.state != "ok" and (f.check in ("time", "disk") or f.check.endswith(": memory"))]
    refused = any(f.state == "fail" and f.check.endswith(": memory") for f in findings)
    return ("this machine: " + "; ".join(texts) + ("; `r1 run` refuses it" if refused else "")) if texts else ""


def _gb(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"


def _long(hours: float) -> str:
    if hours >= HOURS_A_YEAR:
        return f"{hours / HOURS_A_YEAR:,.1f} years"
    return f"{hours / HOURS_A_MONTH:.1f} months" if hours >= HOURS_A_MONTH else f"{hours:,.1f} hours"
