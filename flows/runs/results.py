"""What the commands hand back: the one JSON document, and the same as text for people."""

import shlex
from typing import TYPE_CHECKING, Any

from flows.output import single_line, table
from stages.contract.errors import ExitStatus

if TYPE_CHECKING:  # loading a recipe's types is what `r1 --help` must not pay for
    from flows.runs.record import RunRecord

STATUS_NAMES = {
    ExitStatus.DONE: "done",
    ExitStatus.MISTAKE: "mistake",
    ExitStatus.FAILED: "failed",
    ExitStatus.STOPPED: "stopped",
    ExitStatus.INTERRUPTED: "interrupted",
}


def error_document(status: ExitStatus, message: str, where: str = "", mend: str = "") -> dict[str, Any]:
    """How a failure looks with `--json`."""
    facts = {"status": STATUS_NAMES[status], "exit_status": int(status), "message": message}
    return {"error": facts | {key: text for key, text in (("where", where), ("mend", mend)) if text}}


def run_document(record: "RunRecord") -> dict[str, Any]:
    """One run: its stages, its models' headline results, and where to look."""
    content, report = record.content, record.report()
    facts = ("kind", "status", "folder", "fingerprint", "seconds", "mlflow_run_id")
    document = {
        "run": record.name,
        "status": record.status(),
        "models": record.results(),
        "stages": [{"stage": name, **{key: stage[key] for key in facts}} for name, stage in record.stages.items()],
        "mlflow": {key: content["mlflow"][key] for key in ("tracking_uri", "experiment", "parent_run_id")},
        "report": str(report) if report else None,
        "remarks": record.remarks(),
    }
    if content["error"]:
        names = {name: status for status, name in STATUS_NAMES.items()}
        status = names.get(content["status"], ExitStatus.FAILED)
        document |= error_document(status, content["error"])
    return document


def results_table(models: dict[str, dict[str, float]]) -> str:
    """Model x (accuracy ± standard error, mean length, format, language, truncated)."""
    head = ["model", "accuracy", "mean length", "format", "language", "truncated"]
    rows = [
        [
            label,
            " ± ".join(filter(None, [_percent(row.get("accuracy")), _percent(row.get("accuracy_stderr"))])),
            _number(row.get("mean_length")),
            *(_percent(row.get(key)) for key in ("format", "language", "truncated")),
        ]
        for label, row in models.items()
    ]
    return table(head, rows)


def stages_table(record: "RunRecord") -> str:
    """The stages of a run, with the step that a running one has reached."""
    rows = [
        [name, stage["kind"], stage["status"], _number(stage["seconds"]), _step(stage), stage["folder"] or ""]
        for name, stage in record.stages.items()
    ]
    return table(["stage", "kind", "status", "seconds", "step", "folder"], rows, right=False)


def _step(stage: dict[str, Any]) -> str:
    from pathlib import Path

    from stages.store.folders import StageFolder
    from stages.tracking.journal import read

    if not stage["folder"] or not (lines := read(StageFolder(Path(stage["folder"])).journal)):
        return ""
    return f"{lines[-1].step}/{lines[-1].of}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def where_to_look(record: "RunRecord") -> str:
    """The last lines of a run: what has to be known of its results, its report, its curves."""
    uri, lines = record.content["mlflow"]["tracking_uri"], record.remarks()
    if report := record.report():
        lines.append(f"report: {report}")
    if uri and uri.startswith(("http://", "https://")):
        lines.append(f"curves: {uri} (experiment {record.content['mlflow']['experiment']})")
    elif uri:
        runs = record.folder.path.parents[1]
        lines.append(f"curves: `r1 up --runs {shlex.quote(str(runs))}` shows them in MLflow (kept in {uri})")
    return "\n".join(map(single_line, [*lines, f"run: {record.name}  ({record.folder.path})"]))
