"""What the live view shows of a run: the graph of its stages, how far each is, and the figures of those that run."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from stages.tracking.journal import Line

Status = Literal["pending", "running", "done", "reused", "failed", "interrupted"]
Summary = Literal["change", "result", "none"]
"""What a curve says of a finished stage: from what to what, its last value (a share of all answers so far), nothing."""
CURVES: dict[str, tuple[str, Summary]] = {
    "reward/accuracy": ("accuracy", "change"),
    "eval/accuracy": ("accuracy", "result"),
    "curate/correct_share": ("accuracy", "none"),
    "reward/total": ("reward", "change"),
    "train/loss": ("loss", "change"),
}
"""Metric of a journal -> its name in the view and its summary; a stage shows the curve of the first that its lines have."""
_ENDS: dict[str, Status] = {"done": "done", "failed": "failed", "interrupted": "interrupted"}
RECENT = 10
"""Steps over which the time of one is averaged."""


@dataclass
class StageView:
    """One stage. Times are seconds of one clock that the caller chooses."""

    name: str
    kind: str
    needs: tuple[str, ...] = ()
    """Stages whose outputs it takes."""
    status: Status = "pending"
    seconds: float | None = None
    """What it took, once it is finished."""
    began: float | None = None
    line: Line | None = None
    """The newest step."""
    curve: list[float] = field(default_factory=list)
    curve_name: str = ""
    summary: Summary = "none"
    recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=RECENT))
    """Steps and when their lines came."""

    def add(self, line: Line, now: float) -> None:
        """Take the newest line of its journal."""
        if self.line is not None and line.step <= self.line.step:  # the journal was cut back to a checkpoint
            self.curve.clear()
            self.recent.clear()
        self.line = line
        self.recent.append((line.step, now))
        metric = next((name for name in CURVES if name in line.metrics), None)
        if metric is not None:
            self.curve_name, self.summary = CURVES[metric]
            self.curve.append(line.metrics[metric])

    def seconds_left(self, now: float) -> float | None:
        """Estimate of the time to its last step from the pace of the last ones; None before there is a pace."""
        if self.line is None or len(self.recent) < 2:
            return None
        (first, begin), (last, end) = self.recent[0], self.recent[-1]
        if last <= first or end <= begin:  # lines of an earlier attempt, read at once
            return None
        pace = (end - begin) / (last - first)
        return max(0.0, (self.line.of - last) * pace - (now - end))


@dataclass
class RunView:
    """The run: stages in running order."""

    name: str
    began: float
    stages: dict[str, StageView]

    @classmethod
    def of(cls, name: str, graph: Mapping[str, tuple[str, Sequence[str]]], now: float) -> "RunView":
        """Make the view of a run that begins. `graph`: stage -> its kind and the stages that it needs."""
        shown = {stage: StageView(stage, kind, tuple(n for n in needs if n in graph)) for stage, (kind, needs) in graph.items()}
        return cls(name, now, shown)

    def finished(self) -> int:
        """How many stages are finished."""
        return sum(stage.status in ("done", "reused") for stage in self.stages.values())

    def begin(self, stage: str, kind: str, now: float) -> None:
        """A stage begins, or begins again after a failure."""
        needs = self.stages[stage].needs if stage in self.stages else ()
        self.stages[stage] = StageView(stage, kind, needs, status="running", began=now)

    def end(self, stage: str, status: str, seconds: float | None) -> None:
        """A stage has ended; one that is reused has not begun before."""
        view = self.stages[stage]
        view.seconds = seconds
        view.status = _ENDS.get(status, "reused")
