"""One stage as one Prefect task: believe its manifest, or run its process and believe its manifest then.

Prefect's own caches look at task source and arguments; the truth here is the manifest, so the task has none.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import task_run
from prefect.states import Completed, Failed
from pydantic import ValidationError

from flows.gates import heed
from flows.launch import Outcome, launch
from flows.progress import Progress
from flows.record import RunRecord
from stages.kinds import stage_kind
from stages.recipe import ResolvedRecipe
from stages.store.config import StageConfig, checkpoint_inputs, external_paths, semantic, stage_inputs
from stages.store.errors import RESUME, ExitStatus, GateClosed, Interrupted, StageFailed, UserError
from stages.store.files import digest_path, read_json, write_json
from stages.store.folders import Runs, StageFolder
from stages.store.locks import hold
from stages.store.manifest import InputRecord, Manifest, StageRecord, fingerprint, verify_manifest

TELLING_ERRORS = (UserError, StageFailed, Interrupted, GateClosed)
"""Errors that end a run with one line; any other is a mistake of ours and keeps its traceback."""


@dataclass(frozen=True)
class Finished:
    """A finished stage, as its successors see it."""

    folder: StageFolder
    manifest: Manifest


class Work:
    """What the stages of one run share. Not a dataclass: Prefect would walk through its fields."""

    def __init__(
        self, recipe: ResolvedRecipe, record: RunRecord, progress: Progress, tracking: Any, fresh: set[str], needed: set[str]
    ) -> None:
        """`fresh`: stages to compute again; `needed`: stages that must be finished already."""
        self.recipe, self.record, self.progress, self.tracking = recipe, record, progress, tracking
        self.fresh, self.needed = fresh, needed
        self.runs = Runs(recipe.runs)
        self.finished: dict[str, Finished] = {}
        self.error: Exception | None = None


def stage_record(config: StageConfig, finished: Mapping[str, Finished]) -> StageRecord:
    """What is to be computed: the stage's config and the digests of its inputs."""
    kind = stage_kind(config.kind)
    inputs: dict[str, InputRecord] = {}
    steps = checkpoint_inputs(config)
    for role, (name, _) in stage_inputs(config).items():
        source = finished[name]
        given, digest = source.folder.output(source.manifest.output), source.manifest.digest
        if role in steps:
            given = source.folder.checkpoint(steps[role])
            digest = _checkpoint_digest(given, role, name)
        inputs[role] = InputRecord(digest=digest, path=str(given), stage=source.folder.path.name)
    for role, text in external_paths(config).items():
        path = str(Path(text).absolute())
        try:
            inputs[role] = InputRecord(digest=digest_path(Path(text)), path=path)
        except OSError as error:
            raise UserError(f"cannot be read ({error.strerror})", where=f"{role}: {text}") from error
    digests = {role: item.digest for role, item in inputs.items()}
    return StageRecord(
        kind=kind.name,
        version=kind.version,
        fingerprint=fingerprint(kind.name, kind.version, semantic(config), digests),
        config=config.model_dump(mode="json"),
        inputs=inputs,
    )


def _checkpoint_digest(path: Path, role: str, stage: str) -> str:
    if path.is_dir():
        return digest_path(path)
    there = ", ".join(sorted(p.name for p in path.parent.glob("step-*"))) or "none"
    mend = f"set `checkpoints.keep_every` of `{stage}` and compute it again (--fresh {stage})"
    raise UserError(f"`{stage}` has no checkpoint {path.name} any more; there is {there}", where=role, mend=mend)


@task(cache_policy=NO_CACHE, persist_result=False, log_prints=False)
def stage_task(work: Work, name: str) -> State[None]:
    """Bring one stage to its verified end. A failure that can be told in one line becomes a Failed state, not a traceback."""
    work.error = None
    try:
        status = finish_stage(work, name)
        heed(name, work.recipe.stages[name], work.finished[name].manifest, work.record.name, work.progress)
    except TELLING_ERRORS as error:
        work.error = error
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
    record = stage_record(config, work.finished)
    folder = _folder(work, name, record)
    work.record.stage(name, folder=str(folder.path), fingerprint=record.fingerprint)
    with hold(folder, work.progress.note):
        manifest = verify_manifest(folder, record.fingerprint)
        if manifest is not None:
            _reuse(work, name, folder, manifest)
            return "reused"
        if name in work.needed:
            mend = f"leave out --from, or run `--until {name}` first"
            raise UserError(f"stage `{name}` isn't finished, so nothing can start after it", where="--from", mend=mend)
        _write_record(folder, record)
        manifest = _compute(work, name, folder, record)
    work.finished[name] = Finished(folder, manifest)
    return "done"


def _folder(work: Work, name: str, record: StageRecord) -> StageFolder:
    """The folder that this run chose before, or the newest, or a new one for `--fresh`."""
    earlier = work.record.stages[name]
    if earlier["folder"] and earlier["fingerprint"] == record.fingerprint:
        return StageFolder(work.runs.path / "stages" / Path(earlier["folder"]).name)
    return work.runs.stage(record.kind, record.fingerprint, fresh=name in work.fresh)


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


def _compute(work: Work, name: str, folder: StageFolder, record: StageRecord) -> Manifest:
    config = work.recipe.stages[name]
    tracked = work.tracking.stage(name, folder, work.record.stages[name]["mlflow_run_id"], tags=_tags())
    work.record.stage(name, status="running", mlflow_run_id=tracked.run_id or None)
    work.progress.begin(name, record.kind)
    ending: Literal["FINISHED", "FAILED", "KILLED"] = "KILLED"
    manifest: Manifest | None = None
    try:
        outcome = launch(folder, config.compute, on_line=work.progress.line)
        ending = "KILLED" if outcome.status is ExitStatus.INTERRUPTED else "FAILED"
        manifest = _believe(name, folder, record, _named(outcome, work))
        ending = "FINISHED"
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
    runs = "" if work.runs.path == Path("runs").absolute() else f" --runs {work.runs.path}"
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
