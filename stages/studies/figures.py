"""A study's figures: learning curves with bands over seeds, and the final results with their intervals."""

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from stages.studies.arms import Arm
from stages.studies.settings import Slopes
from stages.studies.slopes import METRICS, REACHED, Levels, combination, tells_kl
from stages.studies.spread import Spread
from stages.studies.text import COLUMNS, by_variant, is_share, pass_metrics

mpl.use("Agg")
POINTS = 60
"""Places at which the curves of seeds are averaged."""
FEW = 10
"""Variants that colours of a list can tell apart; more take theirs from a scale."""
_AXES = {"step": "step", "tokens": "thousand sampled tokens"}
_VALUES = {"accuracy": "held-out accuracy", "length": "tokens of an answer"}

Facet = tuple[str, dict[str, str]]
"""Title, and variant -> its label."""


def facets(variants: dict[str, dict[str, str]]) -> list[Facet]:
    """Variants that share a picture: all; of a factorial those that differ in the last factor alone."""
    named = {name: name for name, levels in variants.items() if not levels}
    found: dict[str, dict[str, str]] = {"": named} if named else {}
    for name, levels in variants.items():
        if levels:
            *others, last = levels.values()
            found.setdefault(" · ".join(others), {})[name] = last
    return list(found.items())


def learning(arms: Sequence[Arm], groups: Sequence[Facet]) -> bytes:
    """PNG: accuracy and length against steps and against sampled tokens, a row for each facet.

    A line is the mean over the seeds of a variant, its band one standard deviation to both sides; each ends where the first of
    its seeds does.
    """
    figure = Figure(figsize=(14, 2.8 * len(groups) + 0.6), layout="constrained")
    axes = figure.subplots(len(groups), 4, squeeze=False, sharey="col")
    for row, (title, labels) in zip(axes, groups, strict=True):
        places = [(x, y) for y in _VALUES for x in _AXES]
        for place, (x, y) in zip(row, places, strict=True):
            for colour, (variant, label) in zip(colours(len(labels)), labels.items(), strict=True):
                _band(place, [arm for arm in arms if arm.variant == variant], x, y, colour, label)
            place.set_xlabel(_AXES[x])
            place.set_ylabel(_VALUES[y])
            place.grid(alpha=0.25)
        if title:
            row[0].set_title(title, loc="left", fontsize="medium", fontweight="bold")
        row[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    return _png(figure)


def final(arms: Sequence[Arm], starts: dict[str, dict[str, float]]) -> bytes:
    """PNG: each variant's final accuracy, lengths and pass@k with intervals over seeds, the seeds beside, starts as lines."""
    chances = pass_metrics(arms)[-1:]
    panels = [(m, t) for m, t in _final_metrics(chances) if by_variant(arms, m)]
    names = list(dict.fromkeys(arm.variant for arm in arms))
    figure = Figure(figsize=(3.2 * len(panels) + 1.5, 0.32 * len(names) + 1.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for place, (metric, title) in zip(axes, panels, strict=True):
        found, scale = by_variant(arms, metric), 100 if is_share(metric) else 1
        for level, (name, colour) in enumerate(zip(names, colours(len(names)), strict=True)):
            seeds = [arm.metrics[metric] * scale for arm in arms if arm.variant == name and metric in arm.metrics]
            place.plot(seeds, [level + 0.22] * len(seeds), ".", color=colour, alpha=0.45, markersize=4)
            if name in found:
                _interval(place, found[name], level, scale, colour)
        for value in {metrics[metric] * scale for metrics in starts.values() if metric in metrics}:
            place.axvline(value, color="0.5", linestyle="--", linewidth=1)
        place.set_title(title + (", %" if scale > 1 else ""), fontsize="medium")
        place.grid(axis="x", alpha=0.25)
        place.set_yticks(range(len(names)), names, fontsize="small")
    axes[0].invert_yaxis()
    return _png(figure)


def against(slopes: Slopes, arms: Sequence[Arm], levels: Levels, starts: dict[str, dict[str, float]]) -> bytes:
    """PNG: metrics against a setting, a line for each combination of the other factors, with intervals over seeds.

    Against `kl` one panel more: length against the KL that each arm came to, for one coefficient is another strength in the
    loss than in the reward, and in a mean than in a sum.
    """
    metrics = [metric for metric in METRICS if by_variant(arms, metric)]
    reached = tells_kl(slopes, arms)
    panels = len(metrics) + reached
    figure = Figure(figsize=(3.7 * panels + 2, 3.6), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    lines = list(zip(slopes.blocks, colours(len(slopes.blocks)), strict=True))
    values = sorted(set(slopes.x.values()))
    apart = 0.012 * (values[-1] - values[0])  # lines side by side, so that their intervals can be told apart
    for place, metric in zip(axes, metrics, strict=False):
        found, scale = by_variant(arms, metric), 100 if is_share(metric) else 1
        for index, (block, colour) in enumerate(lines):
            shown = sorted((slopes.x[variant], found[variant]) for variant in block if variant in found)
            at = [x + apart * (index - (len(lines) - 1) / 2) for x, _ in shown]
            half, mean = [(one.half or 0.0) * scale for _, one in shown], [one.mean * scale for _, one in shown]
            name = combination(block, slopes, levels)
            place.errorbar(at, mean, yerr=half, fmt="o-", capsize=2, markersize=4, color=colour, label=name)
        for value in {given[metric] * scale for given in starts.values() if metric in given}:
            place.axhline(value, color="0.5", linestyle="--", linewidth=1)
        place.set_xticks(values, [f"{10**x if slopes.log else x:.3g}" for x in values])
        place.set_xlabel(slopes.against)
        place.set_title(COLUMNS[metric] + (", %" if scale > 1 else ""), fontsize="medium")
    if reached:
        for block, colour in lines:
            of = [arm.metrics for arm in arms if arm.variant in block and {REACHED, "mean_length"} <= arm.metrics.keys()]
            axes[-1].plot([one[REACHED] for one in of], [one["mean_length"] for one in of], ".", color=colour, alpha=0.8)
        axes[-1].set_xlabel(f"{COLUMNS[REACHED]} of a token, last quarter of the steps")
        axes[-1].set_title("length by the KL reached", fontsize="medium")
        axes[-1].locator_params(axis="x", nbins=5)
    for place in axes:
        place.grid(alpha=0.25)
    axes[-1].legend(
        *axes[0].get_legend_handles_labels(), fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False
    )
    return _png(figure)


def _final_metrics(chances: list[str]) -> list[tuple[str, str]]:
    named = [("accuracy", "accuracy"), ("mean_length", "length"), ("mean_length_right", "length, right answers")]
    return named + [(metric, f"pass@{metric[8:]}") for metric in chances]


def _interval(place: Any, found: Spread, level: int, scale: float, colour: Any) -> None:
    half = found.half * scale if found.half is not None else None
    place.errorbar(found.mean * scale, level, xerr=half, fmt="o", color=colour, capsize=3, markersize=5)


def colours(count: int) -> list[Any]:
    """So many colours that can be told apart as well as may be."""
    if count <= FEW:
        return [mpl.colormaps["tab10"](index) for index in range(count)]
    return [mpl.colormaps["turbo"](0.05 + 0.9 * index / (count - 1)) for index in range(count)]


def _band(place: Any, arms: Sequence[Arm], x: str, y: str, colour: Any, label: str) -> None:
    found = averaged([[(getattr(p, x), getattr(p, y)) for p in arm.curve] for arm in arms])
    if found is None:
        return
    at, mean, sd = found
    at = [value / 1000 for value in at] if x == "tokens" else at
    place.plot(at, mean, color=colour, label=label, linewidth=1.5)
    low, high = ([m + side * s for m, s in zip(mean, sd, strict=True)] for side in (-1, 1))
    place.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)


def averaged(curves: Sequence[Sequence[tuple[Any, float]]]) -> tuple[list[float], list[float], list[float]] | None:
    """Places, means, and standard deviations (n - 1) of curves over their common stretch, each straight between its points.

    None when there is no such stretch, or a point does not say where it is.
    """
    import numpy as np

    if not curves or not all(curves) or any(at is None for curve in curves for at, _ in curve):
        return None
    first, last = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    if math.isnan(first) or first > last:
        return None
    at = np.linspace(first, last, POINTS)
    rows = np.stack([np.interp(at, [x for x, _ in curve], [y for _, y in curve]) for curve in curves])
    sd = rows.std(axis=0, ddof=1) if len(rows) > 1 else np.zeros(POINTS)
    return at.tolist(), rows.mean(axis=0).tolist(), sd.tolist()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the library's version in it: the same results are the same bytes.
    figure.savefig(buffer, format="png", dpi=90, metadata={"Software": None})
    return buffer.getvalue()
