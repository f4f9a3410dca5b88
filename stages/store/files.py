"""Files that appear whole, and digests of what is on disk.

A file is written under a temporary name beside its place, synced, renamed, and its folder synced: a reader sees the old
content or the new one, never a part. A folder that replaces an older one is away for a moment, but never in part.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

TEMPORARY = ".tmp-"
"""Prefix of names that are not yet whole; readers pass over them."""

Event = Literal["write", "written", "synced", "rename", "renamed", "folder synced", "append", "appended"]
Watcher = Callable[[Event, Path, Path | None], None]
_watchers: list[Watcher] = []


def watch(watcher: Watcher) -> None:
    """Have `watcher` told of every durable operation in this process, before and after: what fault tests kill at.

    It gets the event, the path, and for a rename the name that the path had before.
    """
    _watchers.append(watcher)


def _tell(event: Event, path: Path, source: Path | None = None) -> None:
    for watcher in _watchers:
        watcher(event, path, source)


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    _tell("synced", path)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    _tell("folder synced", folder)


def rename(path: Path, target: Path) -> None:
    """Rename, taking the place of an older file. Durable once the folder is synced."""
    _tell("rename", target, path)
    path.replace(target)
    _tell("renamed", target, path)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    _tell("write", temporary)
    temporary.write_bytes(content)
    _tell("written", temporary)
    sync_file(temporary)
    rename(temporary, path)
    sync_folder(path.parent)


def append(file: IO[str], path: Path, text: str) -> None:
    """Append to the open `file` at `path`; the text is on disk when this returns."""
    _tell("append", path)
    file.write(text)
    file.flush()
    _tell("appended", path)
    os.fsync(file.fileno())
    _tell("synced", path)


def remove(folder: Path) -> None:
    """Remove a folder so that it is away whole, never there in part."""
    away = folder.with_name(f"{TEMPORARY}old-{os.getpid()}-{folder.name}")
    rename(folder, away)
    shutil.rmtree(away)


def write_json(path: Path, document: Any) -> None:
    """Write a JSON document, indented, keys in their order, so that it appears whole."""
    # A lone surrogate cannot be encoded. It stands in a string of the JSON text, where its escape means the same.
    write_bytes(path, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))


def read_json(path: Path) -> Any:
    """Read a JSON document. Raises OSError, or ValueError when it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


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
    files = files_below(temporary)
    for file in files:
        sync_file(file)
    for folder in {temporary, *(file.parent for file in files)}:
        sync_folder(folder)
    old = path.with_name(f"{TEMPORARY}old-{os.getpid()}-{path.name}")
    if path.exists():
        rename(path, old)
    rename(temporary, path)
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
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return digest_bytes(canonical.encode("utf-8", "surrogatepass"))


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
