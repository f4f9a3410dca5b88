"""What a run shows while it works, on standard error: one live view on a terminal, plain lines elsewhere."""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Protocol

from flows.output import printable
from flows.pipeline.figures import alarms, figures
from stages.tracking.journal import Line

PLAIN: ContextVar[bool] = ContextVar("plain", default=False)
"""Whether a terminal too gets plain lines: set by commands with `--json`."""

_LINE_SECONDS = 10.0


class Progress(Protocol):
    """Shows how far a run is."""

    def note(self, text: str) -> None:
        """Say something about the run."""

    def begin(self, stage: str, kind: str) -> None:
        """A stage begins."""

    def line(self, stage: str, line: Line) -> None:
        """A step of a stage that runs has finished."""

    def end(self, stage: str, status: str, seconds: float | None) -> None:
        """The stage has ended."""

    def close(self) -> None:
        """Nothing more will come."""


class Lines:
    """Plain lines, for each stage at most one in ten seconds while it runs, and one for each new alarm."""

    def __init__(self, write: Callable[[str], None] | None = None) -> None:
        self._write = write or (lambda text: print(printable(text), file=sys.stderr, flush=True))
        self._next = dict[str, float]()
        self._alarms = dict[str, list[str]]()

    def note(self, text: str) -> None:
        """Say something about the run."""
        self._write(text)

    def begin(self, stage: str, kind: str) -> None:
        """A stage begins."""
        self._next[stage] = time.monotonic() + _LINE_SECONDS
        self._write(f"{stage}: {kind} starts")

    def line(self, stage: str, line: Line) -> None:
        """A step of a stage that runs has finished."""
        new = set(alarms(line)) - set(self._alarms.get(stage, ()))
        self._alarms[stage] = alarms(line)
        if new or time.monotonic() >= self._next.get(stage, 0.0):
            self._next[stage] = time.monotonic() + _LINE_SECONDS
            self._write(f"{stage}: {line.step}/{line.of}  {figures(line)}".rstrip())

    def end(self, stage: str, status: str, seconds: float | None) -> None:
        """The stage has ended."""
        self._write(f"{stage}: {status}" + (f" after {seconds:.1f} s" if seconds is not None else ""))

    def close(self) -> None:
        """Nothing more will come."""


def on_standard_error(name: str, graph: Mapping[str, tuple[str, Sequence[str]]]) -> Progress:
    """The live view when standard error is a terminal that can show it, plain lines otherwise.

    `graph`: stage -> its kind and the stages that it needs, in running order.
    """
    from flows.pipeline.live_view import Live

    able = sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown") and not os.environ.get("CI")
    return Live(name, graph) if able and not PLAIN.get() else Lines()
