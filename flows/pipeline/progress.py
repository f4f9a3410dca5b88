"""What a run shows while it works, on standard error: one live view on a terminal, plain lines elsewhere."""

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

from flows.output import printable
from stages.tracking.journal import Line

if TYPE_CHECKING:
    from rich.console import Group

PLAIN: ContextVar[bool] = ContextVar("plain", default=False)
"""Whether a terminal too gets plain lines: set by commands with `--json`."""

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
    shown = [f"{label} {value}" for label, value in shown_figures(line).items()]
    return "  ".join([*shown, *(f"alarm {name}" for name in alarms(line))])


def shown_figures(line: Line) -> dict[str, str]:
    """Label -> text of each figure worth watching that the step has."""
    values = ((label, form, line.metrics.get(key)) for key, (label, form) in _SHOWN.items())
    return {label: form.format(value) for label, form, value in values if value is not None}


def alarms(line: Line) -> list[str]:
    """The alarms of a step, such as `no_signal`; stages/rewards/health.py says what they mean."""
    prefix, missed = "health/", "health/canaries_missed"
    return sorted(key.removeprefix(prefix) for key in line.metrics if key.startswith(prefix) and key != missed)


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


class Live:
    """One view of the whole run that stays where it is; for terminals (flows/pipeline/live_view.py)."""

    def __init__(self, name: str, graph: Mapping[str, tuple[str, Sequence[str]]]) -> None:
        """`graph`: stage -> its kind and the stages that it needs, in running order."""
        from rich.console import Console
        from rich.live import Live as RichLive

        from flows.pipeline.live_state import RunView

        self._view, self._lock = RunView.of(name, graph, time.monotonic()), threading.Lock()
        self._console = Console(stderr=True)
        self._live = RichLive(
            console=self._console, get_renderable=self._render, refresh_per_second=4, vertical_overflow="crop"
        )
        self._live.start()
        atexit.register(self._live.stop)  # whatever ends the run, the cursor is shown again

    def _render(self) -> "Group":
        from rich.console import Group

        from flows.pipeline.live_view import render

        size = self._console.size
        with self._lock:
            lines = render(
                self._view,
                size.width,
                size.height - 1,  # a display as high as the terminal would scroll
                time.monotonic(),
                ascii_only=self._console.options.ascii_only,
            )
        return Group(*lines)

    def note(self, text: str) -> None:
        """Say something about the run, above the view."""
        self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def begin(self, stage: str, kind: str) -> None:
        """A stage begins."""
        with self._lock:
            self._view.begin(stage, kind, time.monotonic())

    def line(self, stage: str, line: Line) -> None:
        """A step of a stage that runs has finished."""
        with self._lock:
            self._view.stages[stage].add(line, time.monotonic())

    def end(self, stage: str, status: str, seconds: float | None) -> None:
        """The stage has ended."""
        with self._lock:
            self._view.end(stage, status, seconds)

    def close(self) -> None:
        """Nothing more will come: the last view stays, and the terminal is as it was."""
        self._live.stop()
        atexit.unregister(self._live.stop)


def on_standard_error(name: str, graph: Mapping[str, tuple[str, Sequence[str]]]) -> Progress:
    """The live view when standard error is a terminal that can show it, plain lines otherwise.

    `graph`: stage -> its kind and the stages that it needs, in running order.
    """
    able = sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown") and not os.environ.get("CI")
    return Live(name, graph) if able and not PLAIN.get() else Lines()
