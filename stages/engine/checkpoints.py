"""Checkpoints at step boundaries: written aside, COMPLETE last, renamed; the newest whole one is resumed from."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.engine import ranks
from stages.store.errors import UserError
from stages.store.files import TEMPORARY, digest_file, files_below, publish_folder, read_json, write_json

COMPLETE = "COMPLETE"
"""Name of the file that makes a checkpoint whole: sha256 and size of all others."""


def _name(step: int) -> str:
    return f"step-{step:06d}"


def write(
    folder: Path,
    step: int,
    state: dict[str, Any],
    save: Callable[[Path], None],
    layout: dict[str, Any],
    *,
    main: bool,
    keep: int,
) -> None:
    """Write the checkpoint of `step` finished steps. Every rank calls it; `save` writes the rank's part into a folder.

    state: JSON values beside the engine's (counters, best step); layout: how the engine's part is laid out, the engine's
    `layout`. All but the newest `keep` checkpoints are removed.
    """
    temporary = folder / f"{TEMPORARY}{_name(step)}"
    if main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    ranks.barrier()
    save(temporary)
    ranks.barrier()
    if main:
        write_json(temporary / "state.json", {"step": step, "layout": layout, **state})
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


def restore(folder: Path, load: Callable[[Path], None], layout: dict[str, Any], *, main: bool) -> dict[str, Any] | None:
    """Load the newest whole checkpoint and return its state; None when there is none. Every rank calls it.

    Raises UserError when it was written under another ZeRO stage or number of ranks.
    """
    chosen = ranks.gather(_chosen(folder) if main else None)[0]
    if chosen is None:
        return None
    state: dict[str, Any] = read_json(chosen / "state.json")
    if state["layout"] != layout:
        # Converting between layouts is possible for some of them; loading one as another is not.
        was, now = (f"{given['zero']} on {given['ranks']} processes" for given in (state["layout"], layout))
        raise UserError(
            f"the checkpoint was written under {was}; it cannot go on under {now}",
            where=str(chosen),
            mend="set `deepspeed` and `compute.processes` back, or begin again with `--fresh STAGE`",
        )
    load(chosen)
    return state


def _chosen(folder: Path) -> Path | None:
    """The newest whole checkpoint; newer, broken ones are set aside so that they are never counted as kept ones."""
    chosen = newest_whole(folder)
    for step in steps(folder):
        path = folder / _name(step)
        if chosen is None or path.name > chosen.name:
            shutil.rmtree(folder / f"broken-{path.name}", ignore_errors=True)
            path.rename(folder / f"broken-{path.name}")
    return chosen
