"""Seconds per unit from runs that were measured: non-negative least squares, and how well each run is predicted by the others.

A run has spans (update, sample, …), each with its seconds and its amounts. Every span is an equation: its amounts times the
unknown seconds per unit are its seconds. Errors count relative to the span, and to a share of its whole run, so that long runs
do not drown short ones and crumbs of a run do not decide.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from stages.costs.amounts import UNITS, Amounts

UNTOLD = 0.1
"""Amounts of which the other runs together have less than this share of a run's own are not known without it."""
CRUMB = 0.1
"""A span's error counts relative to its seconds plus this share of its run's."""


class Span(BaseModel):
    """A part of a run's time."""

    model_config = ConfigDict(extra="forbid")
    seconds: float
    amounts: Amounts


class Measured(BaseModel):
    """A finished stage, as the fit sees it. Its spans leave out what the amounts cannot tell (evaluation in between)."""

    model_config = ConfigDict(extra="forbid")
    run: str
    kind: str
    parameters: int
    """Of its model."""
    processes: int
    facts: dict[str, float]
    """Mean length, batch and the like: what the run was, for people."""
    spans: dict[str, Span]

    @property
    def seconds(self) -> float:
        """Of the spans but for starting and ending."""
        return sum(span.seconds for name, span in self.spans.items() if name != "start")


def fitted(runs: Sequence[Measured]) -> dict[str, float]:
    """Amount -> seconds per unit. One that no run has is left out; without runs there is nothing."""
    if not runs:
        return {}
    import numpy as np
    from scipy.optimize import nnls

    names = [name for name in UNITS if any(span.amounts.get(name) for run in runs for span in run.spans.values())]
    spans = [(span, run.seconds) for run in runs for span in run.spans.values() if any(span.amounts.values())]
    weights = np.array([1 / (span.seconds + CRUMB * whole) for span, whole in spans])
    matrix = np.array([[span.amounts.get(name, 0.0) for name in names] for span, _ in spans]) * weights[:, None]
    scale = matrix.max(axis=0)
    found, _ = nnls(matrix / scale, np.array([span.seconds for span, _ in spans]) * weights)
    return {name: float(value / size) for name, value, size in zip(names, found, scale, strict=True)}


def predicted(rates: dict[str, float], run: Measured, *, start: bool = False) -> float:
    """Seconds of a run by these rates; `start`: with its starting and ending."""
    spans = [span for name, span in run.spans.items() if start or name != "start"]
    return sum(value * rates.get(name, 0.0) for span in spans for name, value in span.amounts.items())


def left_out(runs: Sequence[Measured]) -> list[dict[str, Any]]:
    """Each run predicted by a fit of all the others: seconds measured and predicted, and their ratio less one.

    `untold`: amounts of the run that no other run tells of. Its prediction lacks them, so its error says nothing of the model.
    """
    found = []
    for index, run in enumerate(runs):
        others = [*runs[:index], *runs[index + 1 :]]
        rates = fitted(others)
        wall = predicted(rates, run, start=True) / sum(span.seconds for span in run.spans.values()) - 1
        seconds = predicted(rates, run)
        error = seconds / run.seconds - 1
        untold = [name for name in UNITS if sum(_whole(other, name) for other in others) < UNTOLD * _whole(run, name)]
        facts = {"run": run.run, "kind": run.kind, "measured": run.seconds, "predicted": seconds, "untold": untold}
        found.append(facts | {"error": error, "error_with_start": wall})
    return found


def _whole(run: Measured, amount: str) -> float:
    return sum(span.amounts.get(amount, 0.0) for span in run.spans.values())
