"""Why a stage that was computed before is computed again: which of the user's files are not what they were."""

import datetime as dt
from pathlib import Path

from pydantic import ValidationError

from stages.contract.config import StageConfig, semantic
from stages.contract.errors import UserError
from stages.kinds.registry import stage_kind
from stages.store.folders import Runs, StageFolder
from stages.store.manifest import StageRecord
from stages.store.seals import read_document
from stages.store.user_files import changed_files


def reasons(runs: Runs, config: StageConfig, record: StageRecord, begun: str | None = None) -> list[str]:
    """A line for each role whose files differ from those of the newest finished stage that is otherwise the same.

    Only a file at the same path has changed: another recipe's stage, or another stage of the same recipe, may differ in nothing
    but the file that it reads.

    `begun`: a stage's folder that counts though it is not finished: the one that this run was in before. Empty when there is no
    such stage: then settings or inputs are others, or it is computed for the first time.
    """
    folders = map(StageFolder, runs.stages(record.kind))
    earlier = [(_time(item), item) for item in folders if item.manifest.is_file() or item.path.name == Path(begun or "").name]
    for time, folder in sorted(earlier, key=lambda pair: pair[0], reverse=True):
        before = _record(folder)
        if before is None or before.fingerprint == record.fingerprint or not _same_but_for_files(before, config, record):
            continue
        when = dt.datetime.fromtimestamp(time).astimezone().isoformat(" ", "minutes")
        return [
            line
            for role, item in record.inputs.items()
            if (line := _difference(before, record, role, f"{folder.path.name} ({when})")) and item.stage is None
        ]
    return []


def _time(folder: StageFolder) -> float:
    """When it was finished, or else begun."""
    return max((path.stat().st_mtime for path in (folder.manifest, folder.config) if path.is_file()), default=0.0)


def _record(folder: StageFolder) -> StageRecord | None:
    """The record of an earlier stage; None when it cannot be read, which is no matter of a new one."""
    try:
        return StageRecord.model_validate(read_document(folder.config, "the stage's config", ""))
    except (UserError, ValidationError):
        return None


def _same_but_for_files(before: StageRecord, config: StageConfig, now: StageRecord) -> bool:
    if before.version != now.version or not before.inputs.keys() <= now.inputs.keys():
        return False
    outputs = {role: item.digest for role, item in now.inputs.items() if item.stage}
    if any(role not in before.inputs or before.inputs[role].digest != digest for role, digest in outputs.items()):
        return False
    if any(item.path != now.inputs[role].path for role, item in before.inputs.items() if role not in outputs):
        return False
    try:
        return bool(semantic(stage_kind(before.kind).config.model_validate(before.config)) == semantic(config))
    except ValidationError:
        return False


def _difference(before: StageRecord, now: StageRecord, role: str, earlier: str) -> str:
    item = now.inputs[role]
    if role not in before.inputs:
        return f"{role}: {item.path} was not part of the fingerprint of {earlier}"
    if before.inputs[role].digest == item.digest:
        return ""
    return f"{role}: {', '.join(changed_files(before.inputs[role], item))} has changed since {earlier}"
