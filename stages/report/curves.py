"""Curves out of journals, thinned so that a page stays small, and what is drawn beside what."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from stages.tracking.journal import Line

MOST_POINTS = 240
"""Points of a curve that are drawn."""
LOG_RANGE = 50.0
"""A quantity whose largest value is so many times its smallest is drawn on a logarithmic axis."""
MOST_PARTS = 8
"""Curves of one panel."""


@dataclass(frozen=True)
class Curve:
    """Points of one line."""

    label: str
    x: list[float]
    y: list[float]
    errors: list[float] | None = None
    """Standard errors of `y`."""
    colour: int | None = None
    """Number in the palette; by default its place in the panel."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    y_label: str
    curves: list[Curve]
    right: list[Curve] = field(default_factory=list)
    """Drawn against an axis of their own on the right."""
    right_label: str = ""
    x_label: str = "step"
    share: bool = False
    """Values are shares: an axis in per cent, never logarithmic."""
    doublings: bool = False
    """The horizontal axis goes in doublings."""
    bars: bool = False
    """A histogram: `x` are the edges, one more than `y`."""

    @property
    def logarithmic(self) -> bool:
        """Whether the left axis is."""
        values = [y for curve in self.curves for y in curve.y]
        return not (self.share or self.bars) and bool(values) and min(values) > 0 and max(values) / min(values) >= LOG_RANGE


@dataclass(frozen=True)
class Asked:
    """A panel that a training stage may have: (metric, label) of its curves."""

    title: str
    y_label: str
    metrics: Sequence[tuple[str, str]]
    right: Sequence[tuple[str, str]] = ()
    right_label: str = ""
    share: bool = False


ASKED = (
    Asked(
        "Accuracy and length",
        "accuracy",
        (("eval/accuracy", "held out"), ("reward/accuracy", "training")),
        (("rollout/length", "length (right)"),),
        "tokens of an answer",
        share=True,
    ),
    Asked(
        "Length of right and wrong answers",
        "tokens, mean",
        (("rollout/length_right", "right"), ("rollout/length_wrong", "wrong")),
    ),
    Asked("Loss", "nats or reward", (("train/loss", "training"), ("eval/loss", "held out"), ("value/loss", "value model"))),
    Asked("Distance from the reference", "KL, nats a token", (("train/kl", "KL"),)),
    Asked("Entropy", "nats a token", (("train/entropy", "entropy"),)),
    Asked("Size of the gradient", "norm", (("train/grad_norm", "before clipping"),)),
)
"""In this order; a panel without lines (a stage of one step) is left out. The reward's parts follow the first."""


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points that look like all of them: of each stretch the smallest and the largest, and both ends.

    >>> thinned([(1, 0), (2, 5), (3, -5), (4, 0), (5, 0), (6, 1), (7, 0), (8, 0)], 6)
    [(1, 0), (2, 5), (3, -5), (5, 0), (6, 1), (8, 0)]
    """
    if len(points) <= most:
        return list(points)
    inner = range(1, len(points) - 1)
    size = math.ceil(len(inner) / ((most - 2) // 2))
    kept = {0, len(points) - 1}
    for start in range(0, len(inner), size):
        stretch = inner[start : start + size]
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def curve(lines: Iterable[Line], metric: str, label: str, colour: int | None = None) -> Curve | None:
    """The curve of a metric, None when the journal has none of it. Values that are no numbers are left out."""
    points = [(float(line.step), line.metrics[metric]) for line in lines if metric in line.metrics]
    points = thinned([point for point in points if math.isfinite(point[1])])
    return Curve(label, [x for x, _ in points], [y for _, y in points], colour=colour) if points else None


def stage_panels(lines: Sequence[Line]) -> list[Panel]:
    """The panels of a training stage."""
    panels = []
    for asked in ASKED:
        found = _curves(lines, asked.metrics)
        right = _curves(lines, asked.right)
        if any(len(one.x) > 1 for one in (*found, *right)):
            panels.append(Panel(asked.title, asked.y_label, found, right, asked.right_label, share=asked.share))
        parts = _reward_parts(lines) if asked is ASKED[0] else []
        if any(len(one.x) > 1 for one in parts):
            panels.append(Panel("Reward and its parts", "mean over answers", parts))
    return panels


def _curves(lines: Sequence[Line], metrics: Sequence[tuple[str, str]]) -> list[Curve]:
    return [found for metric, label in metrics if (found := curve(lines, metric, label)) is not None]


def _reward_parts(lines: Sequence[Line]) -> list[Curve]:
    names = dict.fromkeys(name for line in lines for name in line.metrics)
    parts = [n for n in names if n.startswith("reward/") and not n.endswith(("_std", "/std"))]
    return _curves(lines, [(name, name.removeprefix("reward/")) for name in parts[:MOST_PARTS]])


COMPARED: Mapping[str, str] = {
    "eval/accuracy": "held-out accuracy",
    "reward/accuracy": "training accuracy",
    "reward/total": "reward",
    "rollout/length": "tokens of an answer",
    "train/kl": "KL, nats a token",
    "train/entropy": "entropy, nats a token",
    "train/loss": "training loss",
    "eval/loss": "held-out loss",
}
"""Metric -> label of its axis, where runs are compared."""


def shared_panels(journals: Mapping[str, Sequence[Line]]) -> list[Panel]:
    """The panels in which runs (or a run's stages) are compared: one per metric, one curve per name (name -> its journal)."""
    panels = []
    for metric, label in COMPARED.items():
        found = [curve(lines, metric, run, number) for number, (run, lines) in enumerate(journals.items())]
        curves = [one for one in found if one is not None]
        if any(len(one.x) > 1 for one in curves):
            panels.append(Panel(metric, label, curves, share=metric.endswith("accuracy")))
    return panels
