"""The live view of a run on a terminal. Its text is a pure function of its state, the terminal's size and the time."""

import atexit
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live as RichLive
from rich.text import Text

from flows.output import printable, single_line
from flows.pipeline.figures import alarms, shown_figures
from flows.pipeline.live_state import RunView, StageView
from stages.tracking.journal import Line

BLOCKS = "▁▂▃▄▅▆▇█"
MOST_CURVE = 60
"""Characters of the longest curve."""


@dataclass(frozen=True)
class _Signs:
    """Characters for a terminal's encoding."""

    states: dict[str, str]
    branch: str
    last: str
    trunk: str
    bar: tuple[str, str]
    more: str
    arrow: str


_UNICODE = _Signs(
    {"pending": "·", "running": "▸", "done": "✓", "reused": "✓", "failed": "✗", "interrupted": "■"},
    "├─", "└─", "│ ", ("━", "─"), "…", "→",
)  # fmt: skip
_ASCII = _Signs(
    {"pending": ".", "running": ">", "done": "+", "reused": "+", "failed": "x", "interrupted": "!"},
    "|-", "`-", "| ", ("#", "-"), "...", "->",
)  # fmt: skip
_STYLES = {
    "pending": "dim",
    "running": "bold",
    "done": "green",
    "reused": "green dim",
    "failed": "red",
    "interrupted": "yellow",
}


def render(view: RunView, width: int, height: int, now: float, *, ascii_only: bool = False) -> list[Text]:
    """At most `height` lines of at most `width` characters: a title, then the graph, each running stage with its figures.

    A graph that is too long is cut around the stage that runs.
    """
    signs = _ASCII if ascii_only else _UNICODE
    title = f"{view.name}  {view.finished()} of {len(view.stages)} stages done  {duration(now - view.began)}"
    tree = list(_tree(view, signs, width // 3))
    column = min(max((len(prefix) + len(stage.name) + 2 for prefix, _, stage in tree), default=0), width // 2)
    rows: list[Text] = []
    focus = 0
    for prefix, below, stage in tree:
        if stage.status == "running" or (stage.status != "pending" and not focus):
            focus = len(rows)
        rows.append(_row(prefix, stage, column, width, now, signs))
        if stage.status == "running" and stage.line is not None:
            rows.append(_figures(below, stage, width, ascii_only))
    lines = [Text(title, style="bold"), *_window(rows, height - 1, focus, signs)]
    for line in lines:
        line.no_wrap = True
        line.truncate(width, overflow="crop" if ascii_only else "ellipsis")
    return lines


def duration(seconds: float) -> str:
    """Seconds as people read them.

    >>> duration(9.3), duration(83), duration(3 * 3600 + 125)
    ('9 s', '1 min 23 s', '3 h 2 min')
    """
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def blocks(values: Sequence[float], width: int) -> str:
    """A curve as block characters, from its lowest to its highest value; neighbours share a character where it is too long.

    >>> blocks([0, 1, 2, 3, 4, 5, 6, 7], 8), blocks([0, 0, 7, 7], 2), blocks([5], 3)
    ('▁▂▃▄▅▆▇█', '▁█', '▁')
    """
    finite = [value for value in values if abs(value) < float("inf")]
    count = min(width, len(finite))
    means = []
    for i in range(count):
        part = finite[i * len(finite) // count : (i + 1) * len(finite) // count]
        means.append(sum(part) / len(part))
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in means)


def _tree(view: RunView, signs: _Signs, deepest: int) -> Iterator[tuple[str, str, StageView]]:
    """Each stage below the last of those that it needs: what stands before its row, before its figures, and the stage."""
    order = list(view.stages)
    children: dict[str | None, list[str]] = {}
    for name, stage in view.stages.items():
        children.setdefault(max(stage.needs, key=order.index, default=None), []).append(name)

    def walk(names: list[str], before: str) -> Iterator[tuple[str, str, StageView]]:
        for name in names:
            last = name == names[-1]
            below = before + ("  " if last else signs.trunk)
            yield before + (signs.last if last else signs.branch), below, view.stages[name]
            yield from walk(children.get(name, []), below if len(below) <= deepest else before)

    for name in children.get(None, []):
        yield "", "", view.stages[name]
        yield from walk(children.get(name, []), "")


def _row(prefix: str, stage: StageView, column: int, width: int, now: float, signs: _Signs) -> Text:
    style = _STYLES[stage.status]
    row = Text.assemble((prefix, "dim"))
    row.append(f"{signs.states[stage.status]} {single_line(stage.name)}", style)
    row.append(" " * max(2, column + 2 - row.cell_len))
    if stage.status == "running":
        _progress(row, stage, width, now, signs)
    elif stage.status == "pending":
        row.append(stage.kind, "dim")
    else:
        row.append(stage.status if stage.seconds is None else f"{stage.status}  {stage.seconds:.1f} s", style)
        if stage.summary == "change" and len(stage.curve) > 1:
            row.append(f"  {stage.curve_name} {stage.curve[0]:.2f} {signs.arrow} {stage.curve[-1]:.2f}")
        elif stage.summary == "result" and stage.curve:
            row.append(f"  {stage.curve_name} {stage.curve[-1]:.2f}")
    return row


def _progress(row: Text, stage: StageView, width: int, now: float, signs: _Signs) -> None:
    if stage.line is None:
        row.append(f"starts  {duration(now - stage.began) if stage.began is not None else ''}".rstrip())
        return
    text = f"{stage.line.step}/{stage.line.of}"
    if (left := stage.seconds_left(now)) is not None and stage.line.step < stage.line.of:
        text += f"  {duration(left)} left"
    if (rate := stage.line.metrics.get("time/tokens_per_second")) is not None:
        text += f"  {rate:,.0f} tokens/s"
    length = min(40, max(4, width - row.cell_len - len(text) - 2))
    done = round(length * stage.line.step / stage.line.of) if stage.line.of else 0
    row.append(signs.bar[0] * done, "green")
    row.append(signs.bar[1] * (length - done), "dim")
    row.append(f"  {text}")


def _figures(before: str, stage: StageView, width: int, ascii_only: bool) -> Text:
    assert stage.line is not None
    row = Text.assemble((f"{before}    ", "dim"))
    figures = {label: text for label, text in shown_figures(stage.line).items() if label not in ("tokens/s", stage.curve_name)}
    rest = "".join(f"  {label} {text}" for label, text in figures.items())
    alarm = "".join(f"  alarm {single_line(name)}" for name in alarms(stage.line))
    if stage.curve:
        first, last = f"{stage.curve_name} {stage.curve[0]:.2f} ", f" {stage.curve[-1]:.2f}"
        room = width - row.cell_len - len(first) - len(last) - len(rest) - len(alarm)
        row.append(first)
        row.append("->" if ascii_only else blocks(stage.curve, max(4, min(MOST_CURVE, room))), "cyan")
        row.append(last)
    row.append(rest)
    row.append(alarm, "red")
    return row


def _window(rows: list[Text], most: int, focus: int, signs: _Signs) -> list[Text]:
    """At most so many rows, with `focus` and what follows it among them; how many are left out stands in their place."""
    if len(rows) <= most:
        return rows
    room = max(1, most - 2)
    start = min(max(0, focus - room // 2), len(rows) - room)
    above, below = start, len(rows) - start - room
    shown = rows[start : start + room]
    for count, place, word in ((above, 0, "above"), (below, len(shown) + 1, "below")):
        if count:
            shown.insert(place, Text(f"{signs.more} {count} more {word}", style="dim"))
    return shown[:most]


class Live:
    """One view of the whole run that stays where it is; for terminals."""

    def __init__(self, name: str, graph: Mapping[str, tuple[str, Sequence[str]]]) -> None:
        """`graph`: stage -> its kind and the stages that it needs, in running order."""
        self._view, self._lock = RunView.of(name, graph, time.monotonic()), threading.Lock()
        self._console = Console(stderr=True)
        self._live = RichLive(
            console=self._console, get_renderable=self._render, refresh_per_second=4, vertical_overflow="crop"
        )
        self._live.start()
        atexit.register(self._live.stop)  # whatever ends the run, the cursor is shown again

    def _render(self) -> Group:
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
