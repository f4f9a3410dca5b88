"""Manifests: the only proof that a stage is done. Written last; verified, digests included, before it is believed."""

import datetime as dt
import importlib.metadata
import subprocess
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stages.contract.config import OutputKind
from stages.contract.errors import UserError
from stages.store.files import digest_files, digest_json, write_json
from stages.store.folders import StageFolder
from stages.store.seals import SEAL, Sealed, read_document

SCHEMA = 2
"""Number of the manifest's schema; a reader that meets a higher one refuses it. From 2 on a manifest is sealed."""
GATE = "gate"
"""Key of a gate's verdict in the notes, from where runs, MLflow and reports take it."""
LEARNING = "learning"
"""Key in the notes of what a training stage has learned, from where MLflow takes it."""

S = TypeVar("S", bound=Sealed)


class InputRecord(BaseModel):
    """One input of a stage."""

    model_config = ConfigDict(extra="forbid")
    digest: str
    path: str
    """Where it lay; information only, never part of a fingerprint."""
    stage: str | None = None
    """Folder name of the stage that made it; None for a file of the user's."""
    files: dict[str, str] = Field(default_factory=dict)
    """Of settings and code of the user's: name (of a module, dotted) -> sha256 of each file. Empty for data and models."""


class StageRecord(Sealed):
    """`config.json` of a stage folder: what is to be computed. Written by the parent before the first attempt."""

    kind: str
    version: int
    fingerprint: str
    config: dict[str, Any]
    inputs: dict[str, InputRecord]
    code_folders: list[str] = Field(default_factory=list)
    """Absolute paths in which modules of the user's are searched; never part of a fingerprint. Empty: the working folder."""


class Manifest(Sealed):
    """What was computed."""

    schema_number: int = SCHEMA
    kind: str
    version: int
    fingerprint: str
    status: Literal["done"] = "done"
    inputs: dict[str, InputRecord]
    output: OutputKind
    """The folder whose files follow."""
    digest: str
    """Digest of the output: of the relative names, sizes and sha256 of its files."""
    files: dict[str, dict[str, Any]]
    metrics: dict[str, float]
    notes: dict[str, Any]
    remarks: list[str] = Field(default_factory=list)
    """Sentences to be shown wherever the stage's results are."""
    tokens: int
    wall_seconds: float
    """Wall time over all attempts whose end was recorded (not that of one whose parent was killed with it)."""
    device_seconds: float
    """Wall time times processes (times GPUs where there are any)."""
    peak_memory: int | None = None
    """Most bytes of memory that the processes of the attempt that finished held, each at its own peak, added up; a GPU's
    memory and verifiers' processes are not in it. None where the system does not tell."""
    peak_gpu_memory: int | None = None
    """Most bytes of tensors that those processes held on their GPUs, each at its own peak, added up; another engine's (vLLM's)
    are not in it. None without a GPU."""
    finished: str
    git_commit: str | None
    versions: dict[str, str]


def fingerprint(kind: str, version: int, semantic_config: Any, input_digests: dict[str, str]) -> str:
    """sha256 over kind, version, semantic config and the digests of the inputs: no paths, names, source text or times."""
    return digest_json({"kind": kind, "version": version, "config": semantic_config, "inputs": input_digests})


def write_manifest(folder: StageFolder, record: StageRecord, output: OutputKind, **facts: Any) -> Manifest:
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

    Raises UserError when there is one but it, the stage's config, or a file it names, is not what it says.
    """
    if not folder.manifest.exists():
        return None
    where, mend = str(folder.manifest), "run the stage again with `--fresh STAGE`; nothing was changed"
    document = read_document(folder.manifest, "the manifest", mend)
    number = document.get("schema_number")
    if isinstance(number, int) and number > SCHEMA:
        raise UserError(f"written by a newer version (schema {number})", where=where, mend="update r1")
    if number != 1 and SEAL not in document:
        raise UserError("the manifest is damaged (its seal is missing)", where=where, mend=mend)
    manifest = _parsed(Manifest, document, "the manifest is damaged", where, mend)
    if expected_fingerprint is not None and manifest.fingerprint != expected_fingerprint:
        raise UserError("the manifest belongs to another computation", where=where, mend=mend)
    config = read_document(folder.config, "the stage's config", mend)
    record = _parsed(StageRecord, config, "the stage's config is damaged", str(folder.config), mend)
    if record.fingerprint != manifest.fingerprint:
        raise UserError("the stage's config belongs to another computation", where=str(folder.config), mend=mend)
    try:
        found = digest_files(folder.output(manifest.output))
    except OSError as error:
        raise UserError(f"the output cannot be read ({error})", where=where, mend=mend) from error
    if found != manifest.files or digest_json(found) != manifest.digest or not found:
        changed = sorted(n for n in found.keys() | manifest.files.keys() if found.get(n) != manifest.files.get(n))
        raise UserError(f"`{(changed or [manifest.output])[0]}` is not what the manifest says", where=where, mend=mend)
    return manifest


def _parsed(model: type[S], document: dict[str, Any], what: str, where: str, mend: str) -> S:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        reason = str(first["msg"]).removeprefix("Value error, ")
        raise UserError(f"{what} ({f'{place}: ' if place else ''}{reason})", where=where, mend=mend) from error


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
