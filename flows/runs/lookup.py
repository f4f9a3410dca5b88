"""`RUN STAGE` of a command line: the run's record and the folder of its stage, in whichever runs folder they lie."""

from flows.runs.record import RunRecord
from stages.contract.errors import UserError
from stages.contract.suggest import nearest
from stages.store.folders import Runs, StageFolder
from stages.store.manifest import Manifest, verify_manifest


def record_of(runs: Runs, run: str, stage: str) -> RunRecord:
    """The record of the run, which has the stage.

    Raises UserError when there is no such run or stage.
    """
    record = RunRecord.open(runs.pipeline(run))
    if stage not in record.stages:
        raise UserError(f"no stage `{stage}`", where=record.name, mend=nearest(stage, record.stages))
    return record


def folder_of(record: RunRecord, stage: str) -> StageFolder:
    """The folder that the stage works or worked in.

    Raises UserError when it has not begun, or when the folder is gone.
    """
    folder = record.place(stage)
    if not record.stages[stage]["folder"]:
        mend = f"see `r1 status {record.name}`"
        raise UserError(f"stage `{stage}` has not begun", where=record.name, mend=mend)
    if not folder.path.is_dir():
        raise UserError(f"the folder of stage `{stage}` is gone", where=str(folder.path), mend=f"r1 resume {record.name}")
    return folder


def finished_model(record: RunRecord, stage: str) -> Manifest | None:
    """The verified manifest of a stage that hands over a model; None when it is not finished.

    Raises UserError when it is another kind of stage, or not what its manifest says.
    """
    folder = folder_of(record, stage)
    manifest = verify_manifest(folder, record.stages[stage]["fingerprint"])
    if manifest is not None and manifest.output != "model":
        models = [name for name, facts in record.stages.items() if facts["kind"] in MODEL_KINDS]
        mend = f"name one that does: {', '.join(models) or 'this run has none'}"
        raise UserError(f"stage `{stage}` hands over a {manifest.output}, no model", where=record.name, mend=mend)
    return manifest


MODEL_KINDS = ("model", "toy_base", "rl", "sft")
"""Kinds whose output is a model."""
