"""An arm of a study: what its evaluation and the journal of its training say."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from stages.evals.reports import read_report
from stages.store.folders import StageFolder
from stages.tracking.journal import Line, read

LATE = 0.25
"""A journal's metric is its mean over this last share of the steps."""
COSTS = ("seconds_per_step", "peak_memory_mib")
"""What an arm cost: measured on the machine, another time otherwise."""
_CURVES = {"accuracy": "eval/accuracy", "length": "eval/length"}
_MIB = 2**20


@dataclass(frozen=True)
class Point:
    """A held-out evaluation during training."""

    step: int
    tokens: float | None
    """Tokens sampled until then."""
    accuracy: float
    length: float


@dataclass
class Arm:
    """One variant with one seed."""

    variant: str
    seed: int
    start: str
    """The model it started from."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of its evaluation, of its journal, its costs."""
    curve: list[Point] = field(default_factory=list)


def read_arm(variant: str, seed: int, start: str, trained: Path, report: Path) -> Arm:
    """An arm. `trained`: the model's folder, beside which journal and manifest of the training lie; `report`: its evaluation's.

    Raises UserError when one of them cannot be read.
    """
    folder = StageFolder(trained.parent)
    lines = read(folder.journal)
    arm = Arm(variant, seed, start, metrics={**late(lines), **read_metrics(report)})
    arm.metrics |= _costs(lines, read_report(folder.manifest))
    for line in lines:
        if all(name in line.metrics for name in _CURVES.values()):
            found = {name: line.metrics[metric] for name, metric in _CURVES.items()}
            arm.curve.append(Point(line.step, line.metrics.get("rollout/sampled_tokens"), **found))
    return arm


def read_metrics(report: Path) -> dict[str, float]:
    """The headline numbers of an `evaluate_model`'s report."""
    metrics: dict[str, float] = read_report(report / "metrics.json")
    return metrics


def late(lines: Iterable[Line]) -> dict[str, float]:
    """Every metric of a journal but its times, as the mean over the last quarter of the steps, of those that have it."""
    lines = list(lines)
    last = lines[-max(1, round(LATE * len(lines))) :]
    names = {name for line in last for name in line.metrics if not name.startswith("time/")}
    return {name: fmean(line.metrics[name] for line in last if name in line.metrics) for name in sorted(names)}


def _costs(lines: list[Line], manifest: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {"sampled_tokens": float(manifest.get("tokens") or 0)}
    if lines:
        found["steps"] = float(lines[-1].step)
    steps = [x.metrics["time/step"] - x.metrics.get("time/eval", 0.0) for x in lines if "time/step" in x.metrics]
    if steps:
        found["seconds_per_step"] = median(steps)
    if memory := manifest.get("peak_memory"):
        found["peak_memory_mib"] = memory / _MIB
    return found
