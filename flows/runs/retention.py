"""What of a runs folder nothing needs any more. It looks and changes nothing; `r1 gc` acts on it, and looks again first.

A stage folder stays when a run's record names it (as the folder of a stage, or anywhere in its recipe, as in a path), when it
is pinned, when somebody works in it, and when it is an input of one that stays. Everything else may go.
"""

import contextlib
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from flows.runs.pins import pinned
from flows.runs.record import RunRecord
from stages.contract.errors import UserError
from stages.store.files import TEMPORARY
from stages.store.folders import Runs, StageFolder
from stages.store.locks import is_held
from stages.store.seals import opened, read_document

NAME = re.compile(r"[a-z_]+-[0-9a-f]{12}(?:-g[0-9]+)?")
"""Names of stage folders. What is called otherwise is none of ours, and stays."""
ALIVE_SECONDS = 60.0
"""A sign of life in this time means that a stage works without a lock: `python -m stages` takes none."""

AWAY = f"{TEMPORARY}old-"
"""Prefix, in the runs folder, of what is on its way out: it was taken from its place whole."""

What = Literal["run", "stage", "checkpoints", "leftover"]


@dataclass(frozen=True)
class Item:
    """Something that may go."""

    what: What
    path: Path
    why: str
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Choice:
    """What the user wants gone."""

    runs: frozenset[str] = frozenset()
    """Runs whose records go too, so that their stages may."""
    checkpoints: bool = False
    """Also checkpoints of finished stages."""
    older_s: float = 0.0
    """Only what has not changed for so many seconds."""


@dataclass
class Survey:
    """What was found."""

    items: list[Item] = field(default_factory=list)
    """In the order in which they are to go."""
    kept: dict[str, str] = field(default_factory=dict)
    """Stage folder -> why it stays."""

    def has(self, item: Item) -> bool:
        """Whether the same still may go."""
        return any((other.what, other.path) == (item.what, item.path) for other in self.items)


class Surveyor:
    """Looks at a runs folder as often as it is asked; a record that has not changed is not read again."""

    def __init__(self, runs: Runs, choice: Choice) -> None:
        self.runs, self.choice = runs, choice
        self._read: dict[Path, tuple[Any, dict[str, Any]]] = {}

    def spare(self, run: str) -> None:
        """A run whose record was to go stays after all, and with it what it needs."""
        self.choice = replace(self.choice, runs=self.choice.runs - {run})

    def look(self, holding: str | None = None) -> Survey:
        """What may go now. `holding`: the stage folder whose lock the caller has, which does not count as in use.

        Raises UserError when a record or config that might name something is damaged: nothing is guessed.
        """
        found = Survey()
        stages = {path.name: StageFolder(path) for path in sorted((self.runs.path / "stages").glob("*")) if _is_stage(path)}
        roots: dict[str, str] = {}
        continued: set[str] = set()
        for path in sorted((self.runs.path / "pipelines").glob("*")):
            if (path / "pipeline.json").exists():
                if path.name in self.choice.runs and not pinned(path):
                    found.items.append(_item("run", path, "asked for"))
                    continue
                content = self._content(path / "pipeline.json")
                roots |= dict.fromkeys(_names(content), f"run {path.name}")
                continued |= _continued(content)
        for name, folder in stages.items():
            if pinned(folder.path):
                roots[name] = "pinned"
            elif _lives(folder) or (name != holding and is_held(folder)):
                roots[name] = "in use"
            elif name not in roots and self._young(folder.path):
                roots[name] = "changed lately"
        waiting = [(name, why) for name, why in roots.items() if name in stages]
        while waiting:
            name, why = waiting.pop()
            if name in found.kept:
                continue
            found.kept[name] = why
            needs = self._needs(stages[name])
            continued |= {need for need, path in needs if "/checkpoints/" in path}
            waiting += [(need, f"input of {name}") for need, _ in needs if need in stages]
        found.items += [
            _item("stage", folder.path, "no run names it") for name, folder in stages.items() if name not in found.kept
        ]
        for name in sorted(found.kept):
            if found.kept[name] != "in use" and not pinned(stages[name].path):
                found.items += self._inside(stages[name], checkpoints=name not in continued)
        found.items += [_item("leftover", path, "left of an earlier gc") for path in sorted(self.runs.path.glob(f"{AWAY}*"))]
        return found

    def _inside(self, folder: StageFolder, *, checkpoints: bool) -> Iterator[Item]:
        """What may go of a stage that stays."""
        if self._young(folder.path):
            return
        for place in (folder.path, folder.checkpoints, folder.rollouts, folder.path / "best"):
            for path in sorted([*place.glob(f"{TEMPORARY}*"), *place.glob("broken-step-*")]):
                yield _item("leftover", path, "left of an attempt that was killed")
        if self.choice.checkpoints and checkpoints and folder.manifest.exists():
            for path in sorted(folder.checkpoints.glob("step-*")):
                yield _item("checkpoints", path, "its stage is finished, and nothing continues it")

    def _needs(self, folder: StageFolder) -> list[tuple[str, str]]:
        """Stage folders that a stage reads, with the paths that say so."""
        if not folder.config.exists():
            return []
        content = self._content(folder.config)
        return [(name, text) for text in _texts(content) for name in NAME.findall(text) if name != folder.path.name]

    def _content(self, path: Path) -> dict[str, Any]:
        again = f"`r1 gc --run {path.parent.name}` removes the run" if path.name == "pipeline.json" else "remove its folder"
        mend = f"put it right, or, if you can do without it: {again}"
        try:
            status = path.stat()
            key = (status.st_ino, status.st_mtime_ns, status.st_size)
            if path not in self._read or self._read[path][0] != key:
                self._read[path] = (key, opened(read_document(path, "the record", mend)))
        except (OSError, ValueError) as error:
            raise UserError(f"the record is damaged ({error})", where=str(path), mend=mend) from error
        return self._read[path][1]

    def _young(self, path: Path) -> bool:
        return self.choice.older_s > 0 and time.time() - newest_change(path) < self.choice.older_s


def ended_badly(runs: Runs) -> frozenset[str]:
    """Runs that failed, by the user's mistake or otherwise. Those that were interrupted or killed are meant to be resumed."""
    records = map(RunRecord.open, runs.pipelines())
    return frozenset(record.name for record in records if record.status() in ("failed", "mistake"))


def newest_change(path: Path) -> float:
    """When something below a folder changed last, in seconds since 1970; 0 when there is nothing."""
    return max((status.st_mtime for status in _below(path)), default=0.0)


def _is_stage(path: Path) -> bool:
    return NAME.fullmatch(path.name) is not None and path.is_dir() and not path.is_symlink()


def _lives(folder: StageFolder) -> bool:
    if folder.manifest.exists():
        return False
    newest = max((status.st_mtime for path in folder.attempts.glob("*/alive-rank*") for status in _below(path)), default=0.0)
    return time.time() - newest < ALIVE_SECONDS


def _item(what: What, path: Path, why: str) -> Item:
    return Item(what, path, why, sum(status.st_size for status in _below(path) if stat.S_ISREG(status.st_mode)))


def _below(path: Path) -> Iterator[os.stat_result]:
    """Of a path and all below it; what vanishes meanwhile is left out, for stages may be at work."""
    for root, _, files in os.walk(path):
        for found in (root, *(os.path.join(root, name) for name in files)):  # noqa: PTH118  many of them
            with contextlib.suppress(FileNotFoundError):
                yield os.lstat(found)
    if path.is_file():
        yield path.lstat()


def _names(content: Any) -> set[str]:
    return {name for text in _texts(content) for name in NAME.findall(text)}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _continued(content: dict[str, Any]) -> set[str]:
    """Folders of stages that another stage of the recipe continues from a checkpoint."""
    sections, stages = content.get("document", {}).get("stages", {}), content.get("stages", {})
    named = {str(section.get("continues") or "").partition("@")[0] for section in sections.values()}
    return {Path(stages[name]["folder"]).name for name in named & stages.keys() if stages[name]["folder"]}
