"""The live view as text, what it estimates, and when plain lines take its place."""

import io
import sys
from typing import Any

import pytest
from rich.console import Console

from flows.pipeline import progress
from flows.pipeline.live_state import RunView, StageView
from flows.pipeline.live_view import Live, blocks, render
from stages.tracking.journal import Line

GRAPH: dict[str, tuple[str, list[str]]] = {
    "base": ("toy_base", []),
    "zero": ("rl", ["base"]),
    "evaluation.base": ("evaluate_model", ["base"]),
    "evaluation.zero": ("evaluate_model", ["zero"]),
    "evaluation": ("summary", ["evaluation.base", "evaluation.zero"]),
}


def running() -> RunView:
    """`base` is done, `zero` has done 20 of 60 steps of 1.5 s; it is 12 s since the run began its 20th."""
    view = RunView.of("toy-1", GRAPH, 0.0)
    view.begin("base", "toy_base", 1.0)
    view.stages["base"].add(Line(1, 1, 0, {"train/loss": 2.5}), 9.0)
    view.end("base", "done", 10.0)
    view.begin("zero", "rl", 11.0)
    for step in range(1, 21):
        metrics = {
            "reward/accuracy": 0.4 + 0.02 * step,
            "reward/total": 0.5,
            "rollout/length": 14.0,
            "time/tokens_per_second": 1234.0,
        }
        view.stages["zero"].add(Line(step, 60, 0, metrics), 11.0 + 1.5 * step)
    return view


def text(view: RunView, width: int, height: int = 24, now: float = 41.0, **options: Any) -> list[str]:
    return [line.plain for line in render(view, width, height, now, **options)]


def test_render_shows_graph_states_and_figures_at_80_columns() -> None:
    assert text(running(), 80) == [
        "toy-1  1 of 5 stages done  41 s",
        "✓ base                 done  10.0 s",
        "├─▸ zero               ━━━━━━────────────  20/60  1 min 0 s left  1,234 tokens/s",
        "│     accuracy 0.42 ▁▁▂▂▂▃▃▄▄▄▅▅▅▆▆▇▇▇██ 0.80  reward 0.50  length 14",
        "│ └─· evaluation.zero  evaluate_model",
        "│   └─· evaluation     summary",
        "└─· evaluation.base    evaluate_model",
    ]


@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize("height", [3, 6, 24])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_render_stays_within_the_terminal_and_shows_what_runs(width: int, height: int, ascii_only: bool) -> None:
    lines = text(running(), width, height, ascii_only=ascii_only)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert any("zero" in line and ("> " if ascii_only else "▸ ") in line for line in lines)
    assert not ascii_only or "".join(lines).isascii()


def test_render_uses_200_columns_for_a_longer_bar() -> None:
    bar = {width: text(running(), width)[2].count("━") + text(running(), width)[2].count("─") for width in (80, 200)}
    assert bar[80] < bar[200] == 40 + 1  # the branch of the tree besides


def test_render_of_a_hundred_stages_keeps_the_running_one_and_counts_the_others() -> None:
    names = [f"arm{number}" for number in range(100)]
    view = RunView.of("study-1", {name: ("rl", []) for name in names}, 0.0)
    for name in names[:50]:
        view.end(name, "reused", None)
    view.begin("arm50", "rl", 0.0)
    lines = text(view, 80)
    assert len(lines) == 24
    assert any(line.startswith("▸ arm50") for line in lines)
    above, below = (int(line.split()[1]) for line in lines if line.startswith("…"))
    assert above + below + 21 == 100


def test_render_writes_control_characters_as_escapes() -> None:
    view = running()
    view.stages["zero"].name = "a\x1b[2Jb\n"
    assert not any(character in "".join(text(view, 200)) for character in "\x1b\n")


def test_seconds_left_follows_the_pace_of_the_last_steps() -> None:
    stage = StageView("zero", "rl")
    assert stage.seconds_left(0.0) is None
    stage.add(Line(1, 10, 0, {}), 100.0)
    assert stage.seconds_left(100.0) is None
    stage.add(Line(2, 10, 0, {}), 103.0)
    assert stage.seconds_left(104.0) == 8 * 3.0 - 1.0
    stage.add(Line(1, 10, 0, {"reward/accuracy": 0.5}), 110.0)  # begun again
    assert (stage.seconds_left(110.0), stage.curve) == (None, [0.5])


def test_a_stage_that_is_tried_again_begins_with_an_empty_curve() -> None:
    view = running()
    view.end("zero", "failed", None)
    assert text(view, 80)[2].startswith("├─✗ zero               failed")
    view.begin("zero", "rl", 50.0)
    assert view.stages["zero"].curve == []
    assert view.stages["zero"].needs == ("base",)


@pytest.mark.parametrize(
    ("metric", "says"),
    [("reward/accuracy", "accuracy 0.25 → 0.75"), ("eval/accuracy", "accuracy 0.75"), ("curate/correct_share", "")],
)
def test_a_finished_stage_says_what_it_changed_or_measured(metric: str, says: str) -> None:
    view = running()
    view.begin("zero", "rl", 50.0)
    for step, value in enumerate([0.25, 0.5, 0.75], 1):
        view.stages["zero"].add(Line(step, 3, 0, {metric: value}), 50.0 + step)
    view.end("zero", "done", 4.0)
    (row,) = [row for row in text(view, 80) if "─✓ zero " in row]
    assert row.rstrip().endswith(f"done  4.0 s  {says}".rstrip())


def test_blocks_of_constant_and_not_finite_values() -> None:
    assert blocks([0.5, 0.5], 8) == "▁▁"
    assert blocks([0.0, float("nan"), float("inf"), 1.0], 8) == "▁█"
    assert blocks([], 8) == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("variables", "plain", "live"),
    [
        ({"TERM": "xterm"}, False, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False, True),
        ({"TERM": "dumb"}, False, False),
        ({"TERM": "xterm", "CI": "true"}, False, False),
        ({"TERM": "xterm"}, True, False),
    ],
)
def test_view_on_a_terminal(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], plain: bool, live: bool) -> None:
    for name in ("TERM", "NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    token = progress.PLAIN.set(plain)
    shown = progress.on_standard_error("toy-1", GRAPH)
    try:
        assert isinstance(shown, Live if live else progress.Lines)
        shown.begin("base", "toy_base")
        shown.note("sampled \x1b[2J [red]text")
        shown.end("base", "done", 1.0)
    finally:
        shown.close()
        progress.PLAIN.reset(token)
    written = screen.getvalue()
    assert "sampled \\x1b[2J [red]text" in written
    assert "\x1b[2J" not in written
    if live:
        assert written.rstrip().endswith("\x1b[?25h")  # the cursor is shown again
        assert ("\x1b[32m" in written) == ("NO_COLOR" not in variables)
    else:
        assert "\x1b" not in written


def test_view_without_a_terminal_is_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(progress.on_standard_error("toy-1", GRAPH), progress.Lines)


def test_rich_prints_the_lines_as_they_are() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    for line in render(running(), 80, 24, 41.0):
        console.print(line)
    assert console.file.getvalue().splitlines() == text(running(), 80)  # type: ignore[attr-defined]
