"""What a run shows while it works, on standard error: a bar per stage on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable
from typing import Protocol

from stages.tracking.journal import Line

_SHOWN = {
    "reward/total": ("reward", "{:.2f}"),
    "reward/accuracy": ("accuracy", "{:.2f}"),
    "rollout/length": ("length", "{:.0f}"),
    "time/tokens_per_second": ("tokens/s", "{:.0f}"),
}
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


def figures(line: Line) -> str:
    """The figures of a step worth watching, as text.

    >>> figures(Line(1, 2, 0, {"reward/accuracy": 0.5, "rollout/length": 30.25, "train/loss": 1.0, "health/no_signal": 1.0}))
    'accuracy 0.50  length 30  alarm no_signal'
    """
    found = ((label, form, line.metrics.get(key)) for key, (label, form) in _SHOWN.items())
    shown = [f"{label} {form.format(value)}" for label, form, value in found if value is not None]
    return "  ".join([*shown, *(f"alarm {name}" for name in alarms(line))])


def alarms(line: Line) -> list[str]:
    """The alarms of a step, such as `no_signal`; stages/rewards/health.py says what they mean."""
    prefix, missed = "health/", "health/canaries_missed"
    return sorted(key.removeprefix(prefix) for key in line.metrics if key.startswith(prefix) and key != missed)


class Lines:
    """Plain lines, for each stage at most one in ten seconds while it runs, and one for each new alarm."""

    def __init__(self, write: Callable[[str], None] | None = None) -> None:
        self._write = write or (lambda text: print(text, file=sys.stderr, flush=True))
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


class Bars:
    """Bars that stay where they are; for terminals."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        self._rich = RichProgress(*columns, console=Console(stderr=True))
        self._rich.start()
        self._tasks = dict[str, TaskID]()

    def note(self, text: str) -> None:
        """Say something about the run."""
        self._rich.console.print(text, markup=False, highlight=False)

    def begin(self, stage: str, kind: str) -> None:  # noqa: ARG002 - a bar has no room for the kind
        """A stage begins."""
        self._tasks[stage] = self._rich.add_task(stage, total=None, figures="")

    def line(self, stage: str, line: Line) -> None:
        """A step of a stage that runs has finished."""
        if stage in self._tasks:
            self._rich.update(self._tasks[stage], completed=line.step, total=line.of, figures=figures(line))

    def end(self, stage: str, status: str, seconds: float | None) -> None:
        """The stage has ended: its bar gives way to a line."""
        if stage in self._tasks:
            self._rich.remove_task(self._tasks.pop(stage))
        took = f" after {seconds:.1f} s" if seconds is not None else ""
        self._rich.console.print(f"{stage}: {status}{took}", markup=False, highlight=False)

    def close(self) -> None:
        """Nothing more will come."""
        self._rich.stop()


def on_standard_error() -> Progress:
    """Bars when standard error is a terminal, plain lines otherwise."""
    return Bars() if sys.stderr.isatty() else Lines()
