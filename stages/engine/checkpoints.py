"""Checkpoints at step boundaries: written aside, COMPLETE last, renamed; the newest whole one is resumed from."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.engine import ranks
from stages.store.files import TEMPORARY, digest_file, files_below, publish_folder, read_json, write_json

COMPLETE = "COMPLETE"
"""Name of the file that makes a checkpoint whole: sha256 and size of all others."""


def _name(step: int) -> str:
    return f"step-{step:06d}"


def write(folder: Path, step: int, state: dict[str, Any], save: Callable[[Path], None], *, main: bool, keep: int) -> None:
    """Write the checkpoint of `step` finished steps. Every rank calls it; `save` writes the rank's part into a folder.

    state: JSON values beside the engine's (counters, best step). All but the newest `keep` checkpoints are removed.
    """
    temporary = folder / f"{TEMPORARY}{_name(step)}"
    if main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    ranks.barrier()
    save(temporary)
    ranks.barrier()
    if main:
        write_json(temporary / "state.json", {"step": step, **state})
        whole = {f.relative_to(temporary).as_posix(): [digest_file(f), f.stat().st_size] for f in files_below(temporary)}
        write_json(temporary / COMPLETE, whole)
        publish_folder(temporary, folder / _name(step))
        for old in steps(folder)[:-keep]:
            shutil.rmtree(folder / _name(old))
    ranks.barrier()


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints there, sorted; whether they are whole is not looked at."""
    found = (re.fullmatch(r"step-(\d+)", p.name) for p in folder.glob("step-*"))
    return sorted(int(m.group(1)) for m in found if m)


def states(folder: Path) -> list[dict[str, Any]]:
    """The state that each checkpoint there was written with."""
    return [read_json(folder / _name(step) / "state.json") for step in steps(folder)]


def _broken(path: Path) -> str:
    try:
        whole = read_json(path / COMPLETE)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return "it has no COMPLETE file"
    for name, (digest, size) in whole.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size or digest_file(file) != digest:
            return f"`{name}` is not what it was"
    return ""


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint whose every file is what was written; broken ones are named on standard error and passed over."""
    for step in reversed(steps(folder)):
        path = folder / _name(step)
        reason = _broken(path)
        if not reason:
            return path
        print(f"checkpoint {path.name} is passed over: {reason}", file=sys.stderr, flush=True)
    return None


def restore(folder: Path, load: Callable[[Path], None], *, main: bool) -> dict[str, Any] | None:
    """Load the newest whole checkpoint and return its state; None when there is none. Every rank calls it."""
    chosen = ranks.gather(newest_whole(folder) if main else None)[0]
    if chosen is None:
        return None
    load(chosen)
    state: dict[str, Any] = read_json(chosen / "state.json")
    return state
