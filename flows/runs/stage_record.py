"""What a stage is to compute, and under which fingerprint: `r1 run` looks for it on disk, `r1 plan` says if it is there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.contract.config import StageConfig, checkpoint_inputs, semantic, stage_inputs
from stages.contract.errors import UserError
from stages.kinds.registry import stage_kind
from stages.store.files import digest_path
from stages.store.folders import StageFolder
from stages.store.manifest import InputRecord, Manifest, StageRecord, fingerprint
from stages.store.user_code import inherited_code_folders
from stages.store.user_files import user_file_inputs


@dataclass(frozen=True)
class Finished:
    """A finished stage, as its successors see it."""

    folder: StageFolder
    manifest: Manifest


def stage_record(config: StageConfig, finished: Mapping[str, Finished], code_folders: Sequence[str] = ()) -> StageRecord:
    """What is to be computed: the stage's config, the digests of its inputs and of the user's files.

    `code_folders`: where modules of the user's are searched; none: those of this process.
    """
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
    folders = list(code_folders or inherited_code_folders())
    inputs |= user_file_inputs(config, folders)
    digests = {role: item.digest for role, item in inputs.items()}
    return StageRecord(
        kind=kind.name,
        version=kind.version,
        fingerprint=fingerprint(kind.name, kind.version, semantic(config), digests),
        config=config.model_dump(mode="json"),
        inputs=inputs,
        code_folders=folders,
    )


def _checkpoint_digest(path: Path, role: str, stage: str) -> str:
    if path.is_dir():
        return digest_path(path)
    there = ", ".join(sorted(p.name for p in path.parent.glob("step-*"))) or "none"
    mend = f"set `checkpoints.keep_every` of `{stage}` and compute it again (--fresh {stage})"
    raise UserError(f"`{stage}` has no checkpoint {path.name} any more; there is {there}", where=role, mend=mend)
