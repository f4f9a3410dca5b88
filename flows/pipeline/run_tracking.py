"""A run in MLflow, from its record: begun with its configuration, ended with its results."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flows.runs.record import RunRecord
from flows.servers.prefect_env import tracking_uri
from stages.recipe.resolve import Tracking

if TYPE_CHECKING:
    from stages.tracking.mlflow.pipeline_run import PipelineTracking

_ENDINGS: dict[str, Literal["FINISHED", "FAILED", "KILLED"]] = {"done": "FINISHED", "interrupted": "KILLED"}


def begin_tracking(record: RunRecord, note: Callable[[str], None], flow_run_id: str | None) -> "PipelineTracking":
    """Create or continue the run's parent run, and write into the record where it is.

    Raises UserError when MLflow cannot use the tracking URI. A server that is away is no error.
    """
    from stages.tracking.mlflow.pipeline_run import PipelineTracking

    facts, document = record.content["mlflow"], record.content["document"]
    settings = Tracking.model_validate(document.get("tracking") or {})
    uri = tracking_uri(settings.uri, record.folder.path.parents[1], facts["tracking_uri"])
    experiment = settings.experiment or str(document["name"])
    tags = {"config_file": str(record.content["config_file"])}
    if flow_run_id:
        tags["prefect_flow_run_id"] = flow_run_id
    tracking = PipelineTracking(
        uri,
        experiment,
        record.name,
        facts["parent_run_id"],
        document=document,
        tags=tags,
        identity=f"{record.name} {record.content['started']}",
        note=note,
    )
    record.update(mlflow={"tracking_uri": uri, "experiment": experiment, **_ids(tracking)})
    return tracking


def end_tracking(tracking: "PipelineTracking", record: RunRecord, status: str, page: Path | None) -> None:
    """End the parent run with the run's page and results, and write MLflow's ids into the record."""
    if page is not None:
        tracking.artifact(page)
    try:
        tracking.finish(_ENDINGS.get(status, "FAILED"), record.results(), record.remarks())
    finally:  # also when the wait for MLflow is interrupted
        for name, run_id in tracking.run_ids.items():
            record.stages[name]["mlflow_run_id"] = run_id
        record.update(mlflow={**record.content["mlflow"], **_ids(tracking)})


def _ids(tracking: "PipelineTracking") -> dict[str, str | None]:
    return {"parent_run_id": tracking.parent_run_id or None, "experiment_id": tracking.experiment_id or None}
