"""The graph of a recipe as a Prefect flow: each stage one task, in running order, recorded in `pipeline.json`."""

import contextlib
import signal
from pathlib import Path
from typing import Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.exceptions import Abort, TerminationSignal
from prefect.logging.handlers import APILogWorker
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows.prefect_server import AWAY_SECONDS, flush_events, server_address, server_answers, wait_for_server
from flows.progress import Lines, Progress, on_standard_error
from flows.record import RunRecord
from flows.report import page_at_end
from flows.selection import select
from flows.stage_task import TELLING_ERRORS, Work, stage_task
from stages.recipe import ResolvedRecipe, load_recipe, resolve
from stages.store.errors import ExitStatus, Interrupted, StageFailed, UserError
from stages.store.folders import PipelineFolder

FAILED_SECONDS = 30.0
"""How long a run that failed waits for a Prefect server that is away; its line says more than Prefect's page."""
INTERRUPTED_SECONDS = 2.0
"""How long a run that has to end, waits for it."""
_STATUS = {"done": ExitStatus.DONE, "mistake": ExitStatus.MISTAKE, "failed": ExitStatus.FAILED}


def run_pipeline(record: RunRecord, *, retries: int = 0) -> ExitStatus:
    """Do what the record says, from wherever it stands, as one Prefect flow run; how it ended is in the record too.

    A failing or interrupted stage raises nothing; what nobody foresaw is raised as it is.
    """
    if not wait_for_server(AWAY_SECONDS, Lines().note):
        record.update(status="failed", error=f"the Prefect server at {server_address()} does not answer")
        return ExitStatus.FAILED
    try:
        state = pipeline.with_options(flow_run_name=record.name)(str(record.folder.path), retries, return_state=True)
    except (KeyboardInterrupt, TerminationSignal, Abort):
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
    return _run_and_report(record, resolve(document), retries)


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
    try:
        return _run_and_report(record, recipe, retries)
    except Abort as signal_:
        raise StageFailed(str(signal_)) from signal_  # a worker takes an Abort for a good end


def _run_and_report(record: RunRecord, recipe: ResolvedRecipe, retries: int) -> State[None]:
    """Go through the stages; returns the state to report, once Prefect's server can be told.

    Raises Abort, with which Prefect's engine reports nothing, when it cannot.
    """
    try:
        error = run_stages(record, recipe, on_standard_error(), retries)
        if wait_for_server(FAILED_SECONDS if error else AWAY_SECONDS, Lines().note):
            flush_events(record.name)
            return Failed(message=str(error) or "interrupted") if error else Completed()
        if error is None:
            said = f"every stage is done, but the Prefect server at {server_address()} does not answer"
            record.update(status="failed", error=said)
    except (KeyboardInterrupt, TerminationSignal):
        if record.content["status"] == "done":
            record.update(status="interrupted", error="every stage is done, but the Prefect server was not told")
        if server_answers(INTERRUPTED_SECONDS):
            raise
    raise Abort(f"the Prefect server at {server_address()} does not answer")


def run_stages(record: RunRecord, recipe: ResolvedRecipe, progress: Progress, retries: int) -> Exception | None:
    """Go through the stages until one doesn't finish; its error is returned, and written into the record.

    What interrupts this process (a signal) is written into the record too and raised.
    """
    content = record.content
    status, said, error = "failed", None, None
    tracking: Any = None
    try:
        selection = select(recipe, content["from"], content["until"], content["fresh"])
        tracking = _tracking(record, recipe, progress)
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
        # A run that was asked to end has no time for its page; `r1 resume` and `r1 report` make it.
        html = None if status == "interrupted" else page_at_end(record, status, said, progress.note)
        if tracking is not None:
            if html is not None:
                tracking.artifact(html)
            endings: dict[str, Literal["FINISHED", "FAILED", "KILLED"]] = {"done": "FINISHED", "interrupted": "KILLED"}
            results = record.results()
            # A request to end now ends this wait only: what the stages came to is settled.
            with contextlib.suppress(KeyboardInterrupt, TerminationSignal):
                tracking.finish(endings.get(status, "FAILED"), results, record.remarks())
            for name, run_id in tracking.run_ids.items():
                record.stages[name]["mlflow_run_id"] = run_id
            record.update(models=results, mlflow={**record.content["mlflow"], **_ids(tracking)})
        record.update(status=status, error=said)
        progress.close()
    return error


def _retry(error: Exception | None) -> bool:
    """A user's mistake stays one however often it is tried."""
    return not isinstance(error, UserError)


def _tracking(record: RunRecord, recipe: ResolvedRecipe, progress: Progress) -> Any:
    from stages.tracking.mlflow_runs import PipelineTracking, default_uri

    uri = recipe.tracking.uri or default_uri(recipe.runs)
    experiment = recipe.tracking.experiment or recipe.name
    tags = {"config_file": str(record.content["config_file"])}
    if flow_run.id:
        tags["prefect_flow_run_id"] = str(flow_run.id)
    earlier = record.content["mlflow"]["parent_run_id"]
    tracking = PipelineTracking(
        uri,
        experiment,
        record.name,
        earlier,
        document=record.content["document"],
        tags=tags,
        identity=f"{record.name} {record.content['started']}",
        note=progress.note,
    )
    record.update(mlflow={"tracking_uri": uri, "experiment": experiment, **_ids(tracking)})
    return tracking


def _ids(tracking: Any) -> dict[str, str | None]:
    """MLflow's ids; None as long as it has not answered."""
    return {"parent_run_id": tracking.parent_run_id or None, "experiment_id": tracking.experiment_id or None}
