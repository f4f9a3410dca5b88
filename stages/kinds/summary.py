"""`summary`: the models of an evaluation beside each other, with the error of each difference.

Its report: `summary.json` and the same as a table, `summary.md`. It starts fast: no model is loaded.
"""

from typing import Any, Literal

from pydantic import Field

from stages.contract.config import ReportRef, StageConfig
from stages.evals.reports import read_report
from stages.evals.statistics import paired_difference
from stages.store.files import whole_folder, write_bytes, write_json
from stages.store.stage import Result, StageContext, StageKind

HEADLINE = (
    "accuracy",
    "accuracy_stderr",
    "accuracy_lenient",
    "cons_at_k",
    "mean_length",
    "format",
    "language",
    "truncated",
    "problems",
    "samples",
)
"""Numbers every model has in the summary; null where nothing could be measured (no answer thinks: no language)."""
COUNTS = ("problems", "samples")


class SummaryConfig(StageConfig):
    """Which reports stand beside each other."""

    kind: Literal["summary"]
    """This kind."""
    reports: dict[str, ReportRef] = Field(min_length=1)
    """Label -> stage with the report of an `evaluate_model`, in the order in which they are shown."""


def run(context: StageContext[SummaryConfig]) -> Result:
    """Read the reports and compare them."""
    folders = {label: context.inputs[f"reports.{label}"] for label in context.config.reports}
    models = {label: _headline(read_report(folder / "metrics.json")) for label, folder in folders.items()}
    problems = {label: read_report(folder / "problems.json") for label, folder in folders.items()}
    labels = list(folders)
    document = {
        "models": models,
        "paired": _paired(problems, "accuracy"),
        "paired_lenient": _paired(problems, "accuracy_lenient"),
    }
    with whole_folder(context.folder.output("report")) as report:
        write_json(report / "summary.json", document)
        write_bytes(report / "summary.md", markdown(document, labels).encode())
    numbers = {
        f"{label}/{key}": float(value) for label, row in models.items() for key, value in row.items() if value is not None
    }
    return Result(metrics=numbers)


def _headline(metrics: dict[str, float]) -> dict[str, float | None]:
    row = {key: metrics.get(key) for key in HEADLINE} | metrics
    return {key: int(value) if key in COUNTS and value is not None else value for key, value in row.items()}


def _paired(problems: dict[str, dict[str, dict[str, float]]], metric: str) -> dict[str, dict[str, float | None]]:
    """`later - earlier` -> the difference of every two models."""
    means = {label: {name: row[metric] for name, row in rows.items()} for label, rows in problems.items()}
    labels = list(means)
    return {
        f"{later} - {earlier}": _difference(means[later], means[earlier])
        for index, later in enumerate(labels)
        for earlier in labels[:index]
    }


def _difference(later: dict[str, float], earlier: dict[str, float]) -> dict[str, float | None]:
    difference, error = paired_difference(later, earlier)
    return {"difference": difference, "stderr": error, "problems": len(later.keys() & earlier.keys())}


def markdown(document: dict[str, Any], labels: list[str]) -> str:
    """The summary as tables: a model per row, then the paired differences of accuracy."""
    head = ["model", "accuracy", "lenient", "cons@k", "mean length", "format", "language", "truncated"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for label in labels:
        row = document["models"][label]
        error = row["accuracy_stderr"]
        cells = [_percent(row["accuracy"]) + (f" ± {100 * error:.1f}" if error is not None else "")]
        cells += [_percent(row["accuracy_lenient"]), _percent(row["cons_at_k"]), f"{row['mean_length']:.1f}"]
        cells += [_percent(row[key]) for key in ("format", "language", "truncated")]
        lines.append(" | ".join([label, *cells]))
    some = document["models"][labels[0]]
    lines += ["", f"{some['problems']} problems × {some['samples']} samples; accuracy ± standard error over problems."]
    lines += ["lenient: the last number of an answer counts, wherever it stands."]
    if document["paired"]:
        lines += ["", "difference, points ± standard error | accuracy | lenient", "--- | --- | ---"]
    for pair, values in document["paired"].items():
        lines.append(f"{pair} | {_points(values)} | {_points(document['paired_lenient'][pair])}")
    return "\n".join(f"| {line} |" if " | " in line else line for line in lines) + "\n"


def _points(difference: dict[str, Any]) -> str:
    error = f" ± {100 * difference['stderr']:.1f}" if difference["stderr"] is not None else ""
    return f"{100 * difference['difference']:+.1f}{error}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


KIND = StageKind(name="summary", version=2, config=SummaryConfig, output="report", run=run)
