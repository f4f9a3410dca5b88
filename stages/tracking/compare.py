"""Two or more pipeline runs beside each other, from their own records: it needs no MLflow, which may be away."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from stages.contract.errors import UserError
from stages.store.files import read_json
from stages.store.folders import PipelineFolder, StageFolder


def compare(runs: list[PipelineFolder], *, server: str | None = None) -> dict[str, Any]:
    """What differs between runs, and how their models did.

    `runs` holds the runs' names; `params` dotted key -> run -> value, only of those that differ (None: the run has no such
    key); `metrics` model -> metric -> run -> value; `address` MLflow's page that compares the runs, None when no server is
    known. `server`: address of a server that shows the runs' tracking database.

    Raises UserError when a run's record, or the summary of its evaluation, is not readable.
    """
    records = {folder.path.name: folder.read() for folder in runs}
    flat = {name: _flat(record["document"].get("stages", {})) for name, record in records.items()}
    params = {
        key: {name: flat[name].get(key) for name in records}
        for key in sorted(set().union(*flat.values()))
        if len({json.dumps(flat[name].get(key)) for name in records}) > 1
    }
    metrics: dict[str, dict[str, dict[str, Any]]] = {}
    for name, record in records.items():
        for model, values in _models(record).items():
            for metric, value in values.items():
                metrics.setdefault(model, {}).setdefault(metric, {})[name] = value
    return {
        "runs": list(records),
        "params": params,
        "metrics": metrics,
        "address": _address([record.get("mlflow") or {} for record in records.values()], server),
    }


def _models(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Model -> headline numbers, from the summaries that the run has finished."""
    found: dict[str, dict[str, Any]] = {}
    for name, stage in record.get("stages", {}).items():
        if stage["kind"] == "summary" and stage["status"] in ("done", "reused"):
            path = StageFolder(Path(stage["folder"])).output("report") / "summary.json"
            try:
                models = read_json(path)["models"]
            except (OSError, ValueError, KeyError) as error:
                raise UserError("not a readable summary", where=str(path), mend=f"run `{name}` with --fresh") from error
            # A run with two evaluations: the second one's models carry its name.
            found |= {model if model not in found else f"{name}/{model}": row for model, row in models.items()}
    return found


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> leaf; a list is a leaf."""
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return found


def _address(links: list[dict[str, Any]], server: str | None) -> str | None:
    uris = {link.get("tracking_uri") for link in links}
    uri = uris.pop() if len(uris) == 1 else None
    base = server or (uri if uri and uri.startswith(("http://", "https://")) else None)
    ids = [link.get("parent_run_id") for link in links]
    if base is None or uri is None or not all(ids):
        return None
    experiments = sorted({str(link["experiment_id"]) for link in links if link.get("experiment_id")})
    return f"{base.rstrip('/')}/#/compare-runs?runs={_listed(ids)}&experiments={_listed(experiments)}"


def _listed(values: list[Any]) -> str:
    return quote(json.dumps(values, separators=(",", ":")))
