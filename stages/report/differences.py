"""What a model of one run has above the same model of another, and whether that is more than sampling makes by chance."""

from collections.abc import Sequence
from typing import Any

from stages.evals.reports import read_report
from stages.evals.statistics import paired_difference
from stages.report.evaluated import reports
from stages.report.facts import Run, Stage
from stages.report.models import BEYOND

PAIRED = ("accuracy", "accuracy_lenient", "cons_at_k", "mean_length", "format", "truncated")
"""Headline numbers that the reports have for each problem."""
Differences = dict[str, dict[str, dict[str, dict[str, Any]]]]


def differences(runs: Sequence[Run]) -> Differences:
    """Model -> number -> run -> its difference to the first run: `difference`, `stderr`, `problems`, `beyond_error`.

    Problem by problem, so only where both runs have put the same held-out problems to the model; `beyond_error` is whether the
    difference is more than two standard errors, None when there is no error to compare it with. Raises UserError when a report
    cannot be read.
    """
    first, *others = [(run.name, _models(run)) for run in runs]
    found: Differences = {}
    for label, (problems, rows) in first[1].items():
        for name, models in others:
            if label not in models or models[label][0] != problems:
                continue
            for number in PAIRED:
                if (difference := _difference(models[label][1], rows, number)) is not None:
                    found.setdefault(label, {}).setdefault(number, {})[name] = difference
    return found


def _models(run: Run) -> dict[str, tuple[Any, dict[str, dict[str, float]]]]:
    """Label as in the run's results -> (what was asked, problem -> its numbers)."""
    stages = {stage.name: stage for stage in run.stages if stage.kind == "evaluate_model" and stage.manifest}
    found: dict[str, tuple[Any, dict[str, dict[str, float]]]] = {}
    for summary in run.of_kind("summary"):
        for label, name in reports(run.content, summary.name).items():
            if name in stages:
                shown = label if label not in found else f"{summary.name}/{label}"
                found[shown] = (_asked(stages[name]), _problems(stages[name]))
    return found


def _asked(stage: Stage) -> Any:
    """Settings and content of the held-out problems: names of problems alone do not say that they are the same."""
    files = {role: item["digest"] for role, item in stage.manifest["inputs"].items() if role.startswith("held_out")}
    return stage.config.get("held_out"), files


def _problems(stage: Stage) -> dict[str, dict[str, float]]:
    return read_report(stage.folder.output("report") / "problems.json")


def _difference(later: dict[str, dict[str, float]], earlier: dict[str, dict[str, float]], number: str) -> dict[str, Any] | None:
    a, b = ({problem: row[number] for problem, row in rows.items() if number in row} for rows in (later, earlier))
    if not (shared := len(a.keys() & b.keys())):
        return None
    difference, error = paired_difference(a, b)
    beyond = None if error is None else abs(difference) > BEYOND * error
    return {"difference": difference, "stderr": error, "problems": shared, "beyond_error": beyond}
