"""`r1 gc`: make room. It shows what nothing needs any more, asks, and removes that.

Each thing is looked at again just before it goes, under the lock of its stage, and is taken from its place whole by one rename:
a pipeline that starts meanwhile finds it or does not, never a part of it. What a killed gc leaves, the next one removes.
"""

import argparse
import contextlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from flows.cli.run import Answer, runs_of
from flows.output import table
from flows.runs.pins import pinned
from flows.runs.record import RunRecord
from flows.runs.retention import AWAY, Choice, Item, Survey, Surveyor, ended_badly
from stages.contract.errors import ExitStatus, UserError
from stages.store.files import remove, rename, sync_folder
from stages.store.folders import PipelineFolder, Runs, StageFolder
from stages.store.locks import try_hold

_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def gc(options: argparse.Namespace) -> Answer:
    """`r1 gc`."""
    runs = runs_of(options)
    if not (runs.path / "stages").is_dir():
        raise UserError("no runs folder", where=str(runs.path), mend="name it with --runs")
    surveyor = Surveyor(runs, Choice(_forgotten(runs, options), options.checkpoints, options.older_than))
    survey = surveyor.look()
    total = sum(item.size for item in survey.items)
    document = _document(survey, survey.items) | {"dry_run": options.dry_run, "bytes": total, "skipped": []}
    if not options.json:
        _show(runs, survey, total)
    if options.dry_run or not survey.items:
        return ExitStatus.DONE, document
    _confirm(options, len(survey.items), total)
    removed, skipped = [], []
    for item in survey.items:
        if reason := _remove(runs, surveyor, item):
            if item.what == "run":
                surveyor.spare(item.path.name)
            skipped.append({"path": str(item.path), "reason": reason})
            print(f"r1: {item.path.name} stays: {reason}", file=sys.stderr)
        else:
            removed.append(item)
    total = sum(item.size for item in removed)
    if not options.json:
        print(f"removed: {size(total)}")
    return ExitStatus.DONE, _document(survey, removed) | {"dry_run": False, "bytes": total, "skipped": skipped}


def size(count: int) -> str:
    """Bytes as people read them."""
    unit, name = next(((unit, name) for unit, name in _UNITS if count >= unit), _UNITS[-1])
    return f"{count / unit:.1f} {name}"


def _forgotten(runs: Runs, options: argparse.Namespace) -> frozenset[str]:
    """Runs whose records go.

    Raises UserError for one that is at work or pinned.
    """
    named = set()
    for text in options.run:
        folder = runs.path / "pipelines" / Path(text).name  # a damaged record can be named too: this is how it goes away
        folder = folder if folder.is_dir() and Path(text).name else runs.pipeline(text).path
        if pinned(folder):
            raise UserError("the run is pinned", where=folder.name, mend=f"r1 unpin {folder.name}")
        if _at_work(folder):
            raise UserError("the run is at work", where=folder.name, mend="stop it first")
        named.add(folder.name)
    return frozenset(named | (ended_badly(runs) if options.failed else set()))


def _at_work(folder: Path) -> bool:
    try:
        return RunRecord.open(PipelineFolder(folder)).status() == "running"
    except UserError:
        return False  # nobody can go on with a damaged record


def _confirm(options: argparse.Namespace, count: int, total: int) -> None:
    if options.yes:
        return
    if options.json or not sys.stdin.isatty():
        raise UserError("nothing was removed: nobody was asked", where="gc", mend="say --yes, or look with --dry-run")
    answer = ""
    with contextlib.suppress(EOFError):
        answer = input(f"Remove these {count}, {size(total)}? [y/N] ")
    if answer.strip().lower() not in ("y", "yes"):
        raise UserError("nothing was removed", where="gc")


def _remove(runs: Runs, surveyor: Surveyor, item: Item) -> str:
    """Remove it if it still may go; returns why it stays."""
    try:
        if item.what == "run":
            return _forget(runs, item)
        if item.path.name.startswith(AWAY) and item.path.parent == runs.path:
            shutil.rmtree(item.path)
            return ""
        folder = StageFolder(runs.path / "stages" / item.path.relative_to(runs.path / "stages").parts[0])
        away = None
        with try_hold(folder) as held:
            if not held:
                return "its stage is in use"
            if not surveyor.look(holding=folder.path.name).has(item):
                return "something needs it by now"
            if item.what == "stage":
                away = _take(runs, item.path)
                # Who waits for this lock sees that it guards no name any more, and begins anew.
                (away / folder.lock.name).unlink()
            elif item.path.is_dir():
                remove(item.path)
            else:
                item.path.unlink()
        if away is not None:
            shutil.rmtree(away)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _forget(runs: Runs, item: Item) -> str:
    away = _take(runs, item.path)
    if _at_work(away):  # it was resumed just now
        rename(away, item.path)
        return "the run was resumed"
    shutil.rmtree(away)
    return ""


def _take(runs: Runs, path: Path) -> Path:
    """Take a folder from its place, whole."""
    away = runs.path / f"{AWAY}{os.getpid()}-{path.name}"
    rename(path, away)
    sync_folder(path.parent)
    return away


def _show(runs: Runs, survey: Survey, total: int) -> None:
    rows = [[item.what, item.path.relative_to(runs.path).as_posix(), size(item.size), item.why] for item in survey.items]
    print(table(["what", "where", "size", "why it may go"], rows, right=False) if rows else "nothing to remove")
    print(f"\n{size(total)} to free; {len(survey.kept)} stage folders stay")


def _document(survey: Survey, items: list[Item]) -> dict[str, Any]:
    listed = [{"what": item.what, "path": str(item.path), "why": item.why, "bytes": item.size} for item in items]
    return {"items": listed, "kept": survey.kept}
