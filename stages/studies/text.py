"""A study's results as text: the table, the costs, the verdicts in words."""

import re
from collections.abc import Sequence
from typing import Any

from stages.studies.arms import COSTS, Arm
from stages.studies.claims import Verdict
from stages.studies.settings import START, Quantity
from stages.studies.spread import Spread, spread

SHARES = (
    "accuracy",
    "accuracy_lenient",
    "format",
    "language",
    "truncated",
    "cons_at_k",
    "no_verdict",
    "reward/accuracy",
    "reward/format",
)
"""Metrics shown in percent, beside pass@k and clip fractions."""
COLUMNS = {
    "accuracy": "accuracy",
    "mean_length": "length",
    "mean_length_right": "length, right",
    "mean_length_wrong": "length, wrong",
    "format": "format",
    "truncated": "truncated",
    "train/kl": "KL",
    "train/entropy": "entropy",
    "train/clip_fraction_low": "clipped low",
    "train/clip_fraction_high": "clipped high",
    "value/explained_variance": "explained variance",
    "value/explained_variance_first": "first third",
    "value/explained_variance_middle": "middle",
    "value/explained_variance_last": "last third",
    "steps": "steps",
    "sampled_tokens": "tokens",
}
"""Metric -> head of its column, where any arm has it."""
WITH_SD = ("accuracy", "mean_length")
"""Columns that show the standard deviation over seeds too."""


def is_share(metric: str) -> bool:
    """Whether a metric is a share, shown in percent."""
    return metric in SHARES or metric.startswith(("pass_at_", "train/clip_fraction"))


def number(metric: str, value: float, *, sign: bool = False, slope: bool = False) -> str:
    """A value as text: shares in percent (points, for a difference or a slope), counts whole, the rest with three digits.

    >>> number("accuracy", 0.9312), number("mean_length", 31.256), number("accuracy", -0.02, sign=True)
    ('93.1 %', '31.3', '-2.0')
    """
    plus = "+" if sign else ""
    if is_share(metric):
        return f"{100 * value:{plus}.1f}" + ("" if sign or slope else " %")
    if metric in ("steps", "sampled_tokens"):
        return f"{value:{plus}.0f}"
    return f"{value:{plus}.1f}" if abs(value) >= 10 else f"{value:{plus}.3g}"


def by_variant(arms: Sequence[Arm], metric: str) -> dict[str, Spread]:
    """Variant -> the metric over its seeds, of those that have it."""
    found: dict[str, list[float]] = {}
    for arm in arms:
        if metric in arm.metrics:
            found.setdefault(arm.variant, []).append(arm.metrics[metric])
    return {variant: spread(values) for variant, values in found.items()}


def pass_metrics(arms: Sequence[Arm]) -> list[str]:
    """The pass@k that were measured, by k."""
    names = {name for arm in arms for name in arm.metrics if name.startswith("pass_at_")}
    return sorted((name for name in names if re.fullmatch("pass_at_[0-9]+", name)), key=lambda n: int(n[8:]))


def results_table(arms: Sequence[Arm], starts: dict[str, dict[str, float]]) -> str:
    """Variant × metric, means over seeds ± half of their interval; the models that were started from stand first."""
    columns = {**COLUMNS, **{name: f"pass@{name[8:]}" for name in pass_metrics(arms)}}
    found = {metric: by_variant(arms, metric) for metric in columns}
    shown = [metric for metric in columns if found[metric]]
    rows = [[label, *(_cell(metric, metrics.get(metric)) for metric in shown)] for label, metrics in starts.items()]
    variants = dict.fromkeys(arm.variant for arm in arms)
    rows += [[name, *(_spread_cell(metric, found[metric].get(name)) for metric in shown)] for name in variants]
    return markdown(["variant", *(columns[metric] for metric in shown)], rows)


def costs_table(arms: Sequence[Arm]) -> str:
    """Seconds and memory of each variant, and their ratios to the first one's."""
    seconds, memory = by_variant(arms, "seconds_per_step"), by_variant(arms, "peak_memory_mib")
    rows = []
    for variant in dict.fromkeys(arm.variant for arm in arms):
        row = [variant]
        for metric, found in (("seconds_per_step", seconds), ("peak_memory_mib", memory)):
            here, first = found.get(variant), next(iter(found.values()), None)
            row.append(_spread_cell(metric, here))
            row.append(f"{here.mean / first.mean:.2f}" if here is not None and first is not None else "")
        rows.append(row)
    return markdown(["variant", "seconds a step", "ratio", "peak MiB", "ratio"], rows)


def _cell(metric: str, value: float | None) -> str:
    return "" if value is None else number(metric, value)


def _spread_cell(metric: str, found: Spread | None) -> str:
    if found is None:
        return ""
    if found.half is None or found.sd is None:
        return number(metric, found.mean)
    half, sd = (number(metric, value).removesuffix(" %") for value in (found.half, found.sd))
    return f"{number(metric, found.mean)} ± {half}" + (f" (sd {sd})" if metric in WITH_SD else "")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def sentence(verdict: Verdict, claims: int) -> str:
    """A verdict in words. `claims`: how many claims the study tests, for which Holm's correction is."""
    claim, difference = verdict.claim, verdict.difference
    if difference is None or verdict.of is None or verdict.than is None:
        return f"{verdict.answer}: {claim.says} ({claim.metric} was not measured in the same seeds)"
    is_slope = bool(claim.of.x)

    def text(value: float, *, sign: bool = False) -> str:
        return number(claim.metric, value, sign=sign, slope=is_slope)

    other = claim.than.words if isinstance(claim.than, Quantity) else "the start" if claim.than == START else ""
    numbers = f"{claim.metric}: {claim.of.words} {text(verdict.of.mean, sign=is_slope)}"
    numbers += f", {other} {text(verdict.than.mean, sign=is_slope)}" if other else f", against {claim.than}"
    if difference.low is None or difference.high is None or difference.p is None:
        return f"{verdict.answer}: {claim.says} ({numbers}; one seed has no interval)"
    unit = " points" if is_share(claim.metric) else ""
    numbers += f"; difference {text(difference.mean, sign=True)}{unit}, 95 % interval {text(difference.low, sign=True)} to "
    numbers += f"{text(difference.high, sign=True)} over {difference.n} seeds, p {difference.p:.2g}"
    if verdict.holm is not None and claims > 1:
        after = "" if verdict.answer == "undecided" or verdict.holm < 0.05 else ", so not beyond chance among so many"
        numbers += f" ({verdict.holm:.2g} by Holm for {claims} claims{after})"
    return f"{verdict.answer}: {claim.says} ({numbers})"


def spreads(arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
    """Variant -> metric -> n, mean, sd and interval over seeds, as JSON values; without the costs."""
    found: dict[str, dict[str, Any]] = {}
    for metric in sorted({metric for arm in arms for metric in arm.metrics if metric not in COSTS}):
        for variant, one in by_variant(arms, metric).items():
            found.setdefault(variant, {})[metric] = {key: value for key, value in vars(one).items() if key != "p"}
    return found
