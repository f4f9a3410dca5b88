"""The graph of a recipe as a Prefect flow: each stage one task, in running order, recorded in `pipeline.json`."""

import signal
from pathlib import Path
from typing import Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal
from prefect.logging.handlers import APILogWorker
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows.progress import Progress, on_standard_error
from flows.record import RunRecord
from flows.selection import select
from flows.stage_task import TELLING_ERRORS, Work, stage_task
from stages.recipe import ResolvedRecipe, load_recipe, resolve
from stages.store.errors import ExitStatus, Interrupted, UserError
from stages.store.folders import PipelineFolder

_STATUS = {"done": ExitStatus.DONE, "mistake": ExitStatus.MISTAKE, "failed": ExitStatus.FAILED}


def run_pipeline(record: RunRecord, *, retries: int = 0) -> ExitStatus:
    """Do what the record says, from wherever it stands, as one Prefect flow run; how it ended is in the record too.

    A failing or interrupted stage raises nothing; what nobody foresaw is raised as it is.
    """
    try:
        state = pipeline.with_options(flow_run_name=record.name)(str(record.folder.path), retries, return_state=True)
    except (KeyboardInterrupt, TerminationSignal):
        # A second request must not interrupt the writing of this.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    else:
        if record.folder.read()["status"] == "running" or (state.is_failed() and not record.folder.read()["error"]):
            state.result()  # a mistake of ours: its traceback is what helps
    # What Prefect still has to say goes out before its server ends.
    APILogWorker.drain_all(timeout=5)
    record.content = record.folder.read()
    if record.content["status"] == "running":
        record.update(status="interrupted", error="interrupted")
    return _STATUS.get(record.content["status"], ExitStatus.INTERRUPTED)


@flow(name="r1", persist_result=False, validate_parameters=False)
def pipeline(run: str, retries: int = 0) -> State[None]:
    """The recipe of an already recorded run; `run` is the folder under runs/pipelines/."""
    record = RunRecord.open(PipelineFolder(Path(run)))
    document = {**record.content["document"], "runs": str(Path(run).parents[1])}
    return _state(run_stages(record, resolve(document), on_standard_error(), retries))


@flow(name="r1-config", persist_result=False)
def run_config(
    config: str,
    overrides: list[str] | None = None,
    from_stage: str | None = None,
    until_stage: str | None = None,
    fresh: list[str] | None = None,
    retries: int = 0,
) -> State[None]:
    """A recipe from its file: what deployments run. Paths start from the worker's working folder."""
    try:
        recipe = load_recipe(config, overrides)
        select(recipe, from_stage, until_stage, fresh)
        record = RunRecord.create(recipe, config, from_stage, until_stage, fresh)
    except UserError as error:
        return Failed(message=str(error))
    return _state(run_stages(record, recipe, on_standard_error(), retries))


def _state(error: Exception | None) -> State[None]:
    return Completed() if error is None else Failed(message=str(error) or "interrupted")


def run_stages(record: RunRecord, recipe: ResolvedRecipe, progress: Progress, retries: int) -> Exception | None:
    """Go through the stages until one doesn't finish; its error is returned, and written into the record.

    What interrupts this process (a signal) is written into the record too and raised.
    """
    content = record.content
    status, said, error = "failed", None, None
    tracking: Any = None
    try:
        selection = select(recipe, content["from"], content["until"], content["fresh"])
        tracking = _tracking(record, recipe)
        work = Work(recipe, record, progress, tracking, selection.fresh, selection.finished)
        for name in selection.order:
            run = stage_task.with_options(
                name=name, task_run_name=name, retries=retries, retry_condition_fn=lambda *_: _retry(work.error)
            )
            state = run(work, name, return_state=True)
            if work.error is not None:
                raise work.error
            state.result()
        status = "done"
    except TELLING_ERRORS as caught:
        error, said = caught, str(caught)
        status = "mistake" if isinstance(caught, UserError) else "failed"
        if isinstance(caught, Interrupted):
            status = "interrupted"
    except (KeyboardInterrupt, TerminationSignal):
        status = said = "interrupted"
        raise
    finally:
        if tracking is not None:
            endings: dict[str, Literal["FINISHED", "FAILED", "KILLED"]] = {"done": "FINISHED", "interrupted": "KILLED"}
            results = record.results()
            tracking.finish(endings.get(status, "FAILED"), results, record.remarks())
            record.update(models=results, mlflow={**record.content["mlflow"], **_ids(tracking)})
        record.update(status=status, error=said)
        progress.close()
    return error


def _retry(error: Exception | None) -> bool:
    """A user's mistake stays one however often it is tried."""
    return not isinstance(error, UserError)


def _tracking(record: RunRecord, recipe: ResolvedRecipe) -> Any:
    from stages.tracking.mlflow_runs import PipelineTracking, default_uri

    uri = recipe.tracking.uri or default_uri(recipe.runs)
    experiment = recipe.tracking.experiment or recipe.name
    tags = {"config_file": str(record.content["config_file"])}
    if flow_run.id:
        tags["prefect_flow_run_id"] = str(flow_run.id)
    earlier = record.content["mlflow"]["parent_run_id"]
    tracking = PipelineTracking(uri, experiment, record.name, earlier, document=record.content["document"], tags=tags)
    record.update(mlflow={"tracking_uri": uri, "experiment": experiment, **_ids(tracking)})
    return tracking


def _ids(tracking: Any) -> dict[str, str | None]:
    """MLflow's ids; None as long as it has not answered."""
    return {"parent_run_id": tracking.parent_run_id or None, "experiment_id": tracking.experiment_id or None}
