"""What a run's page says of its models: results, pass@k against the first one, lengths; and what became of curated answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.report.curves import Curve, Panel
from stages.report.evaluated import Chance, Model, chances, evaluations
from stages.report.facts import Run
from stages.store.files import read_json

__all__ = ["chance_panel", "chance_rows", "evaluations", "fates", "length_panels", "results"]

MOST_MODELS = 12
"""Models in one panel or table."""
BINS = 24
"""Bars of a histogram of lengths."""
BEYOND = 2.0
"""A difference is called beyond the sampling error from so many standard errors on: about one in twenty by chance alone."""


@dataclass(frozen=True)
class Result:
    """A row of the table of results."""

    label: str
    row: dict[str, Any]
    """Headline numbers."""
    gain: float | None
    """Accuracy above that of the first model, over the same problems."""
    gain_stderr: float | None

    @property
    def beyond(self) -> bool:
        """Whether the gain is beyond the sampling error."""
        return self.gain is not None and self.gain_stderr is not None and abs(self.gain) > BEYOND * self.gain_stderr


def results(run: Run) -> list[tuple[str, list[Result]]]:
    """Summary -> its models' headline numbers, with the paired difference to its first model."""
    found = []
    for stage in run.of_kind("summary"):
        path = stage.folder.output("report") / "summary.json"
        try:
            document = read_json(path)
            rows, paired = document["models"], document.get("paired", {})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            run.faults.append(f"{path}: {error}")
            continue
        first = next(iter(rows), "")
        table = []
        for label, row in rows.items():
            difference = paired.get(f"{label} - {first}", {})
            table.append(Result(label, row, difference.get("difference"), difference.get("stderr")))
        found.append((stage.name, table))
    return found


def chance_panel(models: Sequence[Model]) -> Panel | None:
    """pass@k over k with standard errors; None where a problem has only one answer."""
    curves = [
        Curve(label, [float(c.k) for c in row], [c.value for c in row], [c.stderr or 0.0 for c in row])
        for label, row in chances(_few(models)).items()
        if len(row) > 1
    ]
    return Panel("pass@k", "pass@k", curves, x_label="k, answers to a problem", share=True, doublings=True) if curves else None


def chance_rows(models: Sequence[Model]) -> dict[str, list[Chance]]:
    """Label -> pass@k, of the models that are shown."""
    return chances(_few(models))


def length_panels(models: Sequence[Model]) -> list[Panel]:
    """Histograms of the lengths of right and of other answers, one for each model, all over the same lengths."""
    longest = max((max(values) for model in models for values in model.lengths.values() if values), default=0)
    width = max(1, -(-(longest + 1) // BINS))
    edges = [float(edge) for edge in range(0, longest + width + 1, width)]
    return [
        Panel(
            model.label,
            "answers",
            [
                Curve(name, edges, _counts(values, width, len(edges) - 1), colour=number)
                for number, (name, values) in enumerate(model.lengths.items())
                if values
            ],
            x_label="tokens",
            bars=True,
        )
        for model in _few(models)
    ]


def fates(notes: Mapping[str, Any]) -> list[tuple[str, int, float]]:
    """(what became of them, how many answers, per cent of all) of a `curate` stage, in the order of its filters."""
    counts = {str(name): number for name, number in (notes.get("answers") or {}).items() if isinstance(number, int)}
    total = sum(counts.values())
    return [(name, number, 100 * number / total) for name, number in counts.items()] if total else []


def _few(models: Sequence[Model]) -> list[Model]:
    """The first model, to which the others are compared, and the last ones."""
    return [*models[:1], *models[1:][-(MOST_MODELS - 1) :]]


def _counts(values: Sequence[int], width: int, bins: int) -> list[float]:
    counts = [0.0] * bins
    for value in values:
        counts[value // width] += 1
    return counts
