"""Files that appear whole, and digests of what is on disk.

A file is written under a temporary name beside its place, synced, renamed, and its folder synced: a reader sees the old
content or the new one, never a part. A folder that replaces an older one is away for a moment, but never in part.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp-"
"""Prefix of names that are not yet whole; readers pass over them."""


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def write_json(path: Path, document: Any) -> None:
    """Write a JSON document, indented, keys in their order, so that it appears whole."""
    write_bytes(path, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON document."""
    return json.loads(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; on success it becomes `path` (replacing an older one) with every file synced."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        publish_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(temporary: Path, path: Path) -> None:
    """Sync every file below `temporary`, then rename it to `path`; an older `path` is moved aside first, then removed."""
    for file in files_below(temporary):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        sync_folder(file.parent)
    old = path.with_name(f"{TEMPORARY}old-{os.getpid()}-{path.name}")
    if path.exists():
        path.replace(old)
    temporary.replace(path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def files_below(folder: Path) -> list[Path]:
    """Every file below `folder`, sorted by relative name; unfinished temporary files are left out."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(p for p in found if not any(part.startswith(TEMPORARY) for part in p.relative_to(folder).parts))


def digest_bytes(content: bytes) -> str:
    """sha256 of `content`, in hex."""
    return hashlib.sha256(content).hexdigest()


def digest_json(document: Any) -> str:
    """sha256 of a document's canonical JSON (sorted keys, no spaces), in hex."""
    return digest_bytes(json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def digest_file(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_files(path: Path) -> dict[str, dict[str, Any]]:
    """Relative name -> {sha256, size} of every file below a folder."""
    return {
        file.relative_to(path).as_posix(): {"sha256": digest_file(file), "size": file.stat().st_size}
        for file in files_below(path)
    }


def digest_path(path: Path) -> str:
    """Digest of a file's content, or of a folder's relative names and contents. No absolute path goes into it."""
    return digest_file(path) if path.is_file() else digest_json(digest_files(path))
