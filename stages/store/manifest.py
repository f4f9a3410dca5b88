"""Manifests: the only proof that a stage is done. Written last; verified, digests included, before it is believed."""

import datetime as dt
import importlib.metadata
import subprocess
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from stages.store.errors import UserError
from stages.store.files import digest_files, digest_json, read_json, write_json
from stages.store.folders import StageFolder

SCHEMA = 1
"""Number of the manifest's schema; a reader that meets a higher one refuses it."""


class InputRecord(BaseModel):
    """One input of a stage."""

    model_config = ConfigDict(extra="forbid")
    digest: str
    path: str
    """Where it lay; information only, never part of a fingerprint."""
    stage: str | None = None
    """Folder name of the stage that made it; None for a file of the user's."""


class StageRecord(BaseModel):
    """`config.json` of a stage folder: what is to be computed. Written by the parent before the first attempt."""

    model_config = ConfigDict(extra="forbid")
    kind: str
    version: int
    fingerprint: str
    config: dict[str, Any]
    inputs: dict[str, InputRecord]


class Manifest(BaseModel):
    """What was computed."""

    model_config = ConfigDict(extra="forbid")
    schema_number: int = SCHEMA
    kind: str
    version: int
    fingerprint: str
    status: str = "done"
    inputs: dict[str, InputRecord]
    output: str
    """`model`, `dataset` or `report`: the folder whose files follow."""
    digest: str
    """Digest of the output: of the relative names, sizes and sha256 of its files."""
    files: dict[str, dict[str, Any]]
    metrics: dict[str, float]
    notes: dict[str, Any]
    remarks: list[str] = []
    """Sentences to be shown wherever the stage's results are."""
    tokens: int
    wall_seconds: float
    """Wall time over all attempts whose end was recorded (not that of one whose parent was killed with it)."""
    device_seconds: float
    """Wall time times processes (times GPUs where there are any)."""
    finished: str
    git_commit: str | None
    versions: dict[str, str]


def fingerprint(kind: str, version: int, semantic_config: Any, input_digests: dict[str, str]) -> str:
    """sha256 over kind, version, semantic config and the digests of the inputs: no paths, names, source text or times."""
    return digest_json({"kind": kind, "version": version, "config": semantic_config, "inputs": input_digests})


def write_manifest(folder: StageFolder, record: StageRecord, output: str, **facts: Any) -> Manifest:
    """Digest the output and write the manifest; from here on the stage is done. `facts`: the fields the stage measured."""
    files = digest_files(folder.output(output))
    if not files:
        raise UserError("the stage left an empty output", where=str(folder.output(output)))
    manifest = Manifest(
        kind=record.kind,
        version=record.version,
        fingerprint=record.fingerprint,
        inputs=record.inputs,
        output=output,
        digest=digest_json(files),
        files=files,
        finished=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        git_commit=_git_commit(),
        versions=_versions(),
        **facts,
    )
    write_json(folder.manifest, manifest.model_dump())
    return manifest


def verify_manifest(folder: StageFolder, expected_fingerprint: str | None = None) -> Manifest | None:
    """The manifest of a finished stage, believed only after every digest was checked; None when there is no manifest.

    Raises UserError when there is one but it, or a file it names, is not what it says.
    """
    if not folder.manifest.exists():
        return None
    where, mend = str(folder.manifest), "run the stage again with `--fresh STAGE`; nothing was changed"
    try:
        document = read_json(folder.manifest)
        if isinstance(document, dict) and document.get("schema_number", SCHEMA) > SCHEMA:
            raise UserError(f"written by a newer version (schema {document['schema_number']})", where=where, mend="update r1")
        manifest = Manifest.model_validate(document)
    except (ValueError, OSError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"the manifest is damaged ({first})", where=where, mend=mend) from error
    if expected_fingerprint is not None and manifest.fingerprint != expected_fingerprint:
        raise UserError("the manifest belongs to another computation", where=where, mend=mend)
    found = digest_files(folder.output(manifest.output))
    if found != manifest.files:
        changed = sorted(n for n in found.keys() | manifest.files.keys() if found.get(n) != manifest.files.get(n))
        raise UserError(f"`{changed[0]}` is not what the manifest says", where=where, mend=mend)
    return manifest


def _git_commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    try:
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "deepspeed", "prefect", "mlflow", "lm_eval", "datasets")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
