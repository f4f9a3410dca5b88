"""One stage as one Prefect task: believe its manifest, or run its process and believe its manifest then.

Prefect's own caches look at task source and arguments; the truth here is the manifest, so the task has none.
"""

import contextlib
import functools
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import task_run
from prefect.states import Completed, Failed
from pydantic import ValidationError

from flows.launch.attempt import Outcome, launch
from flows.pipeline.gates import heed
from flows.pipeline.run_state import TELLING_ERRORS, Work
from flows.pipeline.scheduler import share
from flows.pipeline.slots import hold_slots
from flows.plan.changed_files import reasons
from flows.runs.stage_record import Finished, stage_record
from stages.contract.errors import RESUME, ExitStatus, GateClosed, Interrupted, StageFailed, UserError
from stages.store.files import read_json, write_json
from stages.store.folders import StageFolder
from stages.store.locks import hold
from stages.store.manifest import Manifest, StageRecord, verify_manifest


@task(cache_policy=NO_CACHE, persist_result=False, log_prints=False)
def stage_task(work: Work, name: str) -> State[None]:
    """Bring one stage to its verified end. A failure that can be told in one line becomes a Failed state, not a traceback."""
    work.errors.pop(name, None)
    try:
        status = finish_stage(work, name)
        heed(name, work.recipe.stages[name], work.finished[name].manifest, work.record.name, work.progress.note)
    except TELLING_ERRORS as error:
        work.errors[name] = error
        return failed(error)
    return Completed(message=status)


def failed(error: Exception) -> State[None]:
    """Prefect's state for an error that can be told in one line. What a gate stops has a name of its own there."""
    name = "Stopped" if isinstance(error, GateClosed) else "Failed"
    return Failed(name=name, message=str(error) or "interrupted")


def finish_stage(work: Work, name: str) -> Literal["done", "reused"]:
    """Reuse the stage's folder when its manifest holds, otherwise compute it there.

    Raises UserError for what the user can mend, StageFailed when the stage failed, Interrupted when it was stopped.
    """
    config = work.recipe.stages[name]
    record = stage_record(config, work.finished, work.recipe.code_folders)
    folder, begun = _folder(work, name, record), work.record.stages[name]["folder"]
    work.record.stage(name, folder=str(folder.path), fingerprint=record.fingerprint)
    with hold(folder, work.progress.note, work.floor.check):
        manifest = verify_manifest(folder, record.fingerprint)
        if manifest is not None:
            _reuse(work, name, folder, manifest)
            return "reused"
        if name in work.selection.finished:
            mend = f"leave out --from, or run `--until {name}` first"
            raise UserError(f"stage `{name}` isn't finished, so nothing can start after it", where="--from", mend=mend)
        for reason in reasons(work.runs, config, record, begun):
            work.progress.note(f"{name}: computed again: {reason}")
        _write_record(folder, record)
        compute, floor = work.recipe.stages[name].compute, work.floor
        # Whoever waits for slots or devices holds the folder's lock already: it will be able to use them.
        slots = hold_slots(compute.slots, compute.processes, work.progress.note, floor.pause)
        with slots, work.devices.take(compute, floor.pause) as variables, floor:
            manifest = _compute(work, name, folder, record, variables)
    work.finished[name] = Finished(folder, manifest)
    return "done"


def _folder(work: Work, name: str, record: StageRecord) -> StageFolder:
    """The folder that this run chose before, or the newest, or a new one for `--fresh`."""
    earlier = work.record.stages[name]
    if earlier["folder"] and earlier["fingerprint"] == record.fingerprint:
        return StageFolder(work.runs.path / "stages" / Path(earlier["folder"]).name)
    return work.runs.stage(record.kind, record.fingerprint, fresh=name in work.selection.fresh)


def _write_record(folder: StageFolder, record: StageRecord) -> None:
    if folder.config.exists():
        try:
            earlier = StageRecord.model_validate(read_json(folder.config))
        except (OSError, ValueError, ValidationError) as error:
            raise UserError("not a readable stage config", where=str(folder.config), mend="remove the folder") from error
        if earlier.fingerprint != record.fingerprint:
            raise UserError("the folder belongs to another computation", where=str(folder.path), mend="use --fresh")
    # With the fingerprint all that decides the result is the same; how it runs (threads, packing) may have changed.
    write_json(folder.config, record.model_dump())


def _reuse(work: Work, name: str, folder: StageFolder, manifest: Manifest) -> None:
    work.finished[name] = Finished(folder, manifest)
    facts = work.record.stages[name]
    # A stage that this run had begun or finished is its own; its MLflow run goes on from what MLflow already has.
    own = facts["status"] in ("running", "interrupted", "failed", "done")
    origin = None if own else folder.path.name
    tracked = work.tracking.stage(name, folder, facts["mlflow_run_id"], reused_from=origin, tags=_tags())
    tracked.finish("FINISHED", manifest)
    status = "done" if own else "reused"
    facts = {"seconds": manifest.wall_seconds, "mlflow_run_id": tracked.run_id or None, "remarks": manifest.remarks}
    work.record.stage(name, status=status, **facts)
    work.progress.end(name, "finished before, reused", None)


def _compute(work: Work, name: str, folder: StageFolder, record: StageRecord, variables: Mapping[str, str]) -> Manifest:
    compute = work.recipe.stages[name].compute
    tracked = work.tracking.stage(name, folder, work.record.stages[name]["mlflow_run_id"], tags=_tags())
    work.record.stage(name, status="running", mlflow_run_id=tracked.run_id or None)
    work.progress.begin(name, record.kind)
    ending: Literal["FINISHED", "FAILED", "KILLED"] = "KILLED"
    manifest: Manifest | None = None
    try:
        outcome = launch(
            folder,
            compute,
            on_line=functools.partial(work.progress.line, name),
            note=work.progress.note,
            share=share(name, work.selection.order, work.needs, work.parallel),
            variables=variables,
            check=work.floor.check,
            forks=work.forks,
        )
        ending = "KILLED" if outcome.status is ExitStatus.INTERRUPTED else "FAILED"
        manifest = _believe(name, folder, record, _named(outcome, work))
        ending = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        # A stage that was asked to stop may have come to its end instead. A damaged manifest is the next attempt's to report.
        with contextlib.suppress(UserError):
            manifest = verify_manifest(folder, record.fingerprint)
        if manifest is not None:
            ending = "FINISHED"
        raise
    finally:
        status = {"FINISHED": "done", "FAILED": "failed", "KILLED": "interrupted"}[ending]
        seconds = manifest.wall_seconds if manifest else None
        work.progress.end(name, status, seconds)
        work.record.stage(name, status=status, seconds=seconds, remarks=manifest.remarks if manifest else [])
        tracked.finish(ending, manifest)
        work.record.stage(name, mlflow_run_id=tracked.run_id or None)
    return manifest


def _named(outcome: Outcome, work: Work) -> Outcome:
    """With the run's name where the stage could only say how to go on."""
    runs = "" if work.runs.path == Path("runs").absolute() else f" --runs {shlex.quote(str(work.runs.path))}"
    message = outcome.message.replace(RESUME, f"r1 resume {work.record.name}{runs}")
    return replace(outcome, message=message)


def _believe(name: str, folder: StageFolder, record: StageRecord, outcome: Outcome) -> Manifest:
    """The manifest of a stage whose process ended well; otherwise the error that says how it ended."""
    if outcome.status is ExitStatus.MISTAKE:
        raise UserError(f"stage `{name}`: {outcome.message}")
    if outcome.status is ExitStatus.INTERRUPTED:
        raise Interrupted(f"stage `{name}` was stopped")
    if outcome.status is ExitStatus.FAILED:
        raise StageFailed(f"stage `{name}` failed: {outcome.message}; the log is {outcome.attempt / 'log.txt'}")
    manifest = verify_manifest(folder, record.fingerprint)
    if manifest is None:
        raise StageFailed(f"stage `{name}` left no manifest; the log is {outcome.attempt / 'log.txt'}")
    return manifest


def _tags() -> dict[str, str]:
    return {"prefect_task_run_id": str(task_run.id)} if task_run.id else {}
