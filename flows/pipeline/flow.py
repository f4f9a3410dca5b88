"""The graph of a recipe as a Prefect flow: each stage one task, in running order, recorded in `pipeline.json`."""

import contextlib
import signal
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.exceptions import Abort, TerminationSignal
from prefect.logging.handlers import APILogWorker
from prefect.runtime import flow_run
from prefect.states import Completed
from prefect.tasks import exponential_backoff

from flows.launch.forked import Forks
from flows.pipeline.artifacts import END_SECONDS, Artifacts
from flows.pipeline.progress import Lines, on_standard_error
from flows.pipeline.run_state import TELLING_ERRORS, Work
from flows.pipeline.run_tracking import begin_tracking, end_tracking
from flows.pipeline.scheduler import go_through
from flows.pipeline.stage_forks import EARLY, stage_forks
from flows.pipeline.stage_task import failed, stage_task
from flows.runs.page import page_at_end
from flows.runs.record import RunRecord
from flows.runs.selection import select
from flows.servers.prefect_client import (
    AWAY_SECONDS,
    demand_access,
    flush_events,
    server_address,
    server_answers,
    wait_for_server,
)
from stages.contract.config import StageConfig, stage_inputs
from stages.contract.errors import ExitStatus, GateClosed, Interrupted, UserError
from stages.recipe.resolve import ResolvedRecipe, resolve
from stages.runtime.streams import without_secrets
from stages.store.folders import PipelineFolder

FAILED_SECONDS = 30.0
"""How long a run that failed waits for a Prefect server that is away; its line says more than Prefect's page."""
INTERRUPTED_SECONDS = 2.0
"""How long a run that has to end, waits for it."""
LONGEST_DELAY = 600.0
"""Seconds that the pause before a new attempt of a stage grows to."""
JITTER = 0.5
"""By this share of it a pause varies, so that runs that failed together don't all come back together."""
_REQUESTS = (KeyboardInterrupt, TerminationSignal)
"""What a request to end this process raises."""
_STATUS = {"done": ExitStatus.DONE, "mistake": ExitStatus.MISTAKE, "failed": ExitStatus.FAILED, "stopped": ExitStatus.STOPPED}


@dataclass(frozen=True)
class Manner:
    """How a run goes through its stages."""

    retries: int = 0
    """New attempts of a stage that failed."""
    retry_delay: float = 10.0
    """Seconds before the first new attempt; each further pause is twice as long."""
    parallel: int = 1
    """Stages that may run at a time, where none needs another."""


def run_pipeline(record: RunRecord, manner: Manner) -> ExitStatus:
    """Do what the record says, from wherever it stands, as one Prefect flow run; how it ended is in the record too.

    A failing or interrupted stage raises nothing; what nobody foresaw is raised as it is.
    """
    if not wait_for_server(AWAY_SECONDS, Lines().note):
        record.update(status="failed", error=f"the Prefect server at {server_address()} does not answer")
        return ExitStatus.FAILED
    try:
        demand_access()
    except UserError as error:
        record.update(status="mistake", error=str(error))
        return ExitStatus.MISTAKE
    try:
        named = pipeline.with_options(flow_run_name=record.name)
        state = named(str(record.folder.path), **asdict(manner), return_state=True)
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
def pipeline(run: str, retries: int, retry_delay: float, parallel: int) -> State[None]:
    """The recipe of an already recorded run; `run` is the folder under runs/pipelines/."""
    with without_secrets():
        record = RunRecord.open(PipelineFolder(Path(run)))
        document = {**record.content["document"], "runs": str(Path(run).parents[1])}
        recipe = replace(resolve(document), code_folders=record.code_folders)
        return run_and_report(record, recipe, Manner(retries, retry_delay, parallel))


def run_and_report(record: RunRecord, recipe: ResolvedRecipe, manner: Manner) -> State[None]:
    """Go through the stages; returns the state to report, once Prefect's server can be told.

    Raises Abort, with which Prefect's engine reports nothing, when it cannot.
    """
    try:
        order = select(recipe, record.content["from"], record.content["until"]).order
        graph = {name: (recipe.stages[name].kind, _inputs(recipe.stages[name])) for name in order}
        error = run_stages(record, recipe, Artifacts(on_standard_error(record.name, graph), record), manner)
        if wait_for_server(FAILED_SECONDS if error else AWAY_SECONDS, Lines().note):
            flush_events(record.name)
            return failed(error) if error else Completed()
        if error is None:
            said = f"every stage is done, but the Prefect server at {server_address()} does not answer"
            record.update(status="failed", error=said)
    except (KeyboardInterrupt, TerminationSignal):
        if record.content["status"] == "done":
            record.update(status="interrupted", error="every stage is done, but the Prefect server was not told")
        if server_answers(INTERRUPTED_SECONDS):
            raise
    raise Abort(f"the Prefect server at {server_address()} does not answer")


def run_stages(record: RunRecord, recipe: ResolvedRecipe, page: Artifacts, manner: Manner) -> Exception | None:
    """Go through the stages until one doesn't finish; its error is returned, and written into the record.

    What interrupts this process (a signal) is written into the record too and raised.
    """
    content = record.content
    status, said, error = "failed", None, None
    tracking: Any = None
    forks: Forks | None = None
    try:
        selection = select(recipe, content["from"], content["until"], content["fresh"])
        tracking = begin_tracking(record, page.note, str(flow_run.id) if flow_run.id else None)
        page.curves()
        forks = EARLY.get() or stage_forks(recipe, selection, record.folder.path / "fork-server.log")
        work = Work(recipe, record, page, tracking, selection, manner.parallel, forks)
        error = go_through(selection.order, work.needs, manner.parallel, lambda name: _stage(work, name, manner), work.floor)
        if error is not None:
            raise error
        status = "done"
    except TELLING_ERRORS as caught:
        error, said = caught, str(caught)
        status = "mistake" if isinstance(caught, UserError) else "failed"
        if isinstance(caught, Interrupted):
            status = "interrupted"
        if isinstance(caught, GateClosed):
            status = "stopped"
    except (KeyboardInterrupt, TerminationSignal):
        status = said = "interrupted"
        raise
    finally:
        if forks is not None:
            forks.stop()
        # A run that was asked to end has no time for its page; `r1 resume` and `r1 report` make it.
        html = None if status == "interrupted" else page_at_end(record, status, said, page.note, _REQUESTS)
        if tracking is not None:
            # A request to end now ends this wait only: what the stages came to is settled.
            with contextlib.suppress(*_REQUESTS):
                end_tracking(tracking, record, status, html)
            record.update(models=record.results())
        record.update(status=status, error=said)
        page.results()
        page.close(INTERRUPTED_SECONDS if status == "interrupted" else END_SECONDS)
    return error


def _stage(work: Work, name: str, manner: Manner) -> Exception | None:
    """One stage, with its retries; the error that ended it, if any."""
    delays = exponential_backoff(manner.retry_delay)(manner.retries)
    run = stage_task.with_options(
        name=name,
        task_run_name=name,
        retries=manner.retries,
        retry_delay_seconds=[min(delay, LONGEST_DELAY) for delay in delays] or 0,
        retry_jitter_factor=JITTER,
        retry_condition_fn=lambda *_: work.retries(name),
    )
    state = run(work, name, return_state=True)
    if (error := work.errors.get(name)) is None:
        state.result()
    return error


def _inputs(config: StageConfig) -> list[str]:
    return [source for source, _ in stage_inputs(config).values()]
