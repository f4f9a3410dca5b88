"""The journal: one line per step, synced, which is all that MLflow and the progress bar are fed from.

A line is `{"step": 12, "of": 50, "time": 1732270000123, "metrics": {"train/loss": 0.1, …}}`: `step` counts finished steps (or
chunks) from 1, `time` is in milliseconds. After a crash the journal is cut back to the checkpoint that is resumed from; the
steps taken again are the same to the bit, so what MLflow already has of them stays right.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stages.store.files import write_bytes


@dataclass(frozen=True)
class Line:
    """One finished step."""

    step: int
    of: int
    time: int
    metrics: dict[str, float]


class Journal:
    """Appends lines to a stage's `journal.jsonl`. Only rank 0 has one."""

    def __init__(self, path: Path, *, keep_through: int) -> None:
        """Open it; lines of steps after `keep_through` (the checkpoint resumed from) are cut off, as is a torn last line."""
        self.path = path
        kept = [line for line in read(path) if line.step <= keep_through]
        write_bytes(path, "".join(_text(line) for line in kept).encode())
        self._file = path.open("a", encoding="utf-8")

    def append(self, step: int, of: int, metrics: dict[str, float]) -> None:
        """Append one finished step; it is on disk when this returns."""
        self._file.write(_text(Line(step, of, time.time_ns() // 1_000_000, metrics)))
        self._file.flush()
        os.fsync(self._file.fileno())


def _text(line: Line) -> str:
    return json.dumps({"step": line.step, "of": line.of, "time": line.time, "metrics": line.metrics}) + "\n"


def read(path: Path) -> list[Line]:
    """Every whole line of a journal; a missing file is an empty journal."""
    return list(Follower(path).new_lines())


class Follower:
    """Reads a journal while it is being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset, self._inode = 0, 0

    def new_lines(self) -> Iterator[Line]:
        """The whole lines that have come since the last call. A journal that was cut back is read from its start again."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            facts = os.fstat(file.fileno())
            # A cut-back journal is a new file, which may already have grown past the place we had reached.
            if facts.st_ino != self._inode or facts.st_size < self._offset:
                self._offset, self._inode = 0, facts.st_ino
            file.seek(self._offset)
            for raw in file:
                if not raw.endswith(b"\n"):
                    return
                self._offset += len(raw)
                yield Line(**json.loads(raw))
