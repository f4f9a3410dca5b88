"""The journal: one line per step, synced, which is all that MLflow and the progress bar are fed from.

A line is `{"step": 12, "of": 50, "time": 1732270000123, "metrics": {"train/loss": 0.1, …}}`: `step` counts finished steps (or
chunks) from 1, `time` is in milliseconds. After a crash the journal is cut back to the checkpoint that is resumed from; the
steps taken again are the same to the bit, so what MLflow already has of them stays right.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from stages.contract.errors import UserError
from stages.store.files import append, write_bytes


@dataclass(frozen=True)
class Line:
    """One finished step."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    step: int
    of: int
    time: int
    metrics: dict[str, float]


_LINE = TypeAdapter(Line)


class Journal:
    """Appends lines to a stage's `journal.jsonl`. Only rank 0 has one."""

    def __init__(self, path: Path, *, keep_through: int, copy: Path | None = None) -> None:
        """Open it; what comes after the line of step `keep_through` (the checkpoint resumed from) is cut off, whole or torn.

        copy: the journal as that checkpoint has it, from which a damaged one is mended. Without one, how many lines are
        missing is said, and a damaged one raises UserError and changes nothing.
        """
        self.path = path
        kept = _through(path, keep_through) if copy is None else _mended(path, copy, keep_through)
        write_bytes(path, "".join(_text(line) for line in kept).encode())
        self._file = path.open("a", encoding="utf-8")

    def append(self, step: int, of: int, metrics: dict[str, float]) -> None:
        """Append one finished step; it is on disk when this returns. Numbers of any kind (numpy's, a tensor's) are taken."""
        plain = {name: float(value) for name, value in metrics.items()}
        append(self._file, self.path, _text(Line(step, of, time.time_ns() // 1_000_000, plain)))


def _text(line: Line) -> str:
    return json.dumps({"step": line.step, "of": line.of, "time": line.time, "metrics": line.metrics}) + "\n"


_MEND = "copy it again, or remove that line: nothing but its point in the curves is lost"


def _through(path: Path, step: int) -> list[Line]:
    kept: list[Line] = []
    for line in _strictly(path) if step else ():
        if line.step > step:
            break
        if not kept or line.step > kept[-1].step:
            kept.append(line)
        if line.step == step:
            break  # what comes after it may be damaged
    if lost := step - len(kept):  # none of a stage that continues another one's checkpoint
        print(f"{path} has no lines of {lost} of the first {step} steps", file=sys.stderr, flush=True)
    return kept


def _mended(path: Path, copy: Path, step: int) -> list[Line]:
    kept = _through(copy, step)
    try:
        whole = path.exists() and _through(path, step) == kept
    except UserError:
        whole = False
    if not whole:
        print(f"{path} is damaged and was mended from {copy}", file=sys.stderr, flush=True)
    return kept


def read(path: Path) -> list[Line]:
    """Every whole line of a journal; a missing file is an empty journal.

    Raises UserError when a line is damaged.
    """
    return list(_strictly(path))


def _strictly(path: Path) -> Iterator[Line]:
    follower = Follower(path)
    yield from follower.new_lines()
    if follower.fault is not None:
        raise follower.fault


class Follower:
    """Reads a journal while it is being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fault: UserError | None = None
        """Why it got no further than where it is."""
        self._offset, self._line, self._inode = 0, 1, 0

    def new_lines(self) -> Iterator[Line]:
        """The whole lines that have come since the last call. A journal that was cut back is read from its start again.

        It gets no further than a damaged line (see `fault`), until the stage has mended its journal.
        """
        self.fault = None
        try:
            yield from self._read()
        except FileNotFoundError:
            return
        except (OSError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
            self.fault = UserError(f"the line is damaged ({reason})", where=f"{self.path}: line {self._line}", mend=_MEND)

    def _read(self) -> Iterator[Line]:
        with self.path.open("rb") as file:
            facts = os.fstat(file.fileno())
            # A cut-back journal is a new file, which may already have grown past the place we had reached.
            if facts.st_ino != self._inode or facts.st_size < self._offset:
                self._offset, self._line, self._inode = 0, 1, facts.st_ino
            file.seek(self._offset)
            for raw in file:
                if not raw.endswith(b"\n"):
                    return
                line = _LINE.validate_json(raw)
                self._offset, self._line = self._offset + len(raw), self._line + 1
                yield line
