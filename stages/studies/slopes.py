"""Slopes of a factorial: how a metric changes with a setting, in each combination of the other factors and by their levels.

A slope is fitted within each seed and each combination, so that a difference between combinations cannot pass for one. That of
a level is the mean over the combinations that have it, and a factor's effect the difference of its levels within each seed.
"""

from collections.abc import Iterator, Mapping, Sequence

from stages.studies.arms import Arm
from stages.studies.claims import values
from stages.studies.settings import Quantity, Slopes
from stages.studies.spread import Spread, spread
from stages.studies.text import COLUMNS, is_share, markdown, number

METRICS = ("mean_length", "mean_length_right", "accuracy")
"""What is shown against the setting, where any arm has it."""
REACHED = "train/kl"
"""The KL to the reference that training came to: a token's, k3, the mean over the last quarter of the steps."""
SPARE = 3
"""So many more arms than numbers to fit must a seed have."""
Levels = Mapping[str, Mapping[str, str]]
"""Variant -> its levels by factor."""


def others(slopes: Slopes, levels: Levels) -> dict[str, list[str]]:
    """Factor -> its levels in the study, of those factors that the setting does not vary with."""
    held = [name for name in levels[slopes.blocks[0][0]] if all(len({levels[v][name] for v in b}) == 1 for b in slopes.blocks)]
    return {name: list(dict.fromkeys(levels[block[0]][name] for block in slopes.blocks)) for name in held}


def combination(block: Sequence[str], slopes: Slopes, levels: Levels) -> str:
    """A combination by its levels."""
    return " · ".join(levels[block[0]][name] for name in others(slopes, levels)) or "all"


def slopes_table(slopes: Slopes, arms: Sequence[Arm], levels: Levels) -> str:
    """Combination, level or effect × metric: slopes over seeds ± half of their interval, a heading above."""
    shown = [metric for metric in METRICS if any(metric in arm.metrics for arm in arms)]
    rows = [[name, *(_cell(metric, found(metric)) for metric in shown)] for name, found in _rows(slopes, arms, levels)]
    unit = "for ten times the setting" if slopes.log else "for one more of the setting"
    head = f"Slopes against {slopes.against}: the change {unit}; the intervals are not corrected for their number.\n\n"
    return head + markdown([slopes.against, *_heads(shown)], rows)


def tells_kl(slopes: Slopes, arms: Sequence[Arm]) -> bool:
    """Whether the slopes are against the KL's coefficient, and some arm says which KL it came to."""
    return slopes.against == "kl" and any(REACHED in arm.metrics for arm in arms)


def equal_kl_table(slopes: Slopes, arms: Sequence[Arm], levels: Levels) -> str:
    """Factor × metric: what each factor's level adds at an equal KL, over seeds ± half of their interval; "" if none can say.

    A coefficient is another strength in the loss than in the reward, so slopes against it mix where a KL stands with how near
    to the reference it keeps the policy. Within each seed the metric is fitted as a quadratic in log10 of the KL that an arm
    came to (`train/kl`) and a constant for every level but each factor's first; shown are these constants.
    """
    effects = [(factor, first, level) for factor, (first, *rest) in others(slopes, levels).items() for level in rest]
    fitted = {metric: list(_fits(metric, effects, slopes, arms, levels)) for metric in METRICS}
    shown = [metric for metric, found in fitted.items() if found]
    if not (tells_kl(slopes, arms) and shown and effects):
        return ""
    rows = []
    for index, (factor, first, level) in enumerate(effects):
        found = {metric: spread([constants[index] for constants, _ in fitted[metric]]) for metric in shown}
        rows.append([f"{factor}: {level} less {first}", *(_cell(metric, found[metric]) for metric in shown)])
    least = min(explained for metric in shown for _, explained in fitted[metric])
    head = (
        "At an equal KL to the reference (a quadratic in its logarithm and these constants, fitted within each seed, explain "
    )
    head += f"at least {100 * least:.1f} % of the variance between arms):\n\n"
    return head + markdown(["at equal KL", *_heads(shown)], rows)


def _fits(
    metric: str, effects: Sequence[tuple[str, str, str]], slopes: Slopes, arms: Sequence[Arm], levels: Levels
) -> Iterator[tuple[list[float], float]]:
    """For each seed the constants of the effects, and the share of variance explained; seeds with too few arms have none."""
    import numpy as np

    variants = {variant for block in slopes.blocks for variant in block}
    for seed in dict.fromkeys(arm.seed for arm in arms):
        own = [arm for arm in arms if arm.seed == seed and arm.variant in variants]
        own = [arm for arm in own if metric in arm.metrics and arm.metrics.get(REACHED, 0.0) > 0]
        if len(own) < len(effects) + 3 + SPARE:
            continue
        kl, y = np.log10([arm.metrics[REACHED] for arm in own]), np.array([arm.metrics[metric] for arm in own])
        has = [[float(levels[arm.variant][factor] == level) for arm in own] for factor, _, level in effects]
        x = np.column_stack([np.ones_like(kl), kl, kl**2, *has])
        found, *_ = np.linalg.lstsq(x, y, rcond=None)
        about = float(((y - y.mean()) ** 2).sum())
        yield found[3:].tolist(), 1 - float(((y - x @ found) ** 2).sum()) / about if about else 1.0


def _heads(metrics: Sequence[str]) -> list[str]:
    return [COLUMNS[metric] + (", points" if is_share(metric) else "") for metric in metrics]


def _rows(slopes: Slopes, arms: Sequence[Arm], levels: Levels) -> Iterator[tuple[str, "_Slope"]]:
    for block in slopes.blocks:
        yield combination(block, slopes, levels), _Slope(slopes, arms, [block])
    if len(slopes.blocks) < 3:
        return
    for factor, names in others(slopes, levels).items():
        parts = {name: [block for block in slopes.blocks if levels[block[0]][factor] == name] for name in names}
        if len(parts) == len(slopes.blocks):
            continue
        for name, blocks in parts.items():
            yield f"all of {factor} {name}", _Slope(slopes, arms, blocks)
        first, *rest = parts
        for name in rest:
            yield f"{factor}: {name} less {first}", _Slope(slopes, arms, parts[name], parts[first])


class _Slope:
    """The slope of a metric over seeds, averaged over combinations; less that of others."""

    def __init__(
        self, slopes: Slopes, arms: Sequence[Arm], blocks: Sequence[Sequence[str]], less: Sequence[Sequence[str]] = ()
    ) -> None:
        self._arms = arms
        self._of, self._less = (Quantity(blocks=tuple(map(tuple, some)), x=slopes.x, words="") for some in (blocks, less))

    def __call__(self, metric: str) -> Spread | None:
        found = values(self._of, metric, self._arms)
        if self._less.blocks:
            than = values(self._less, metric, self._arms)
            found = {seed: value - than[seed] for seed, value in found.items() if seed in than}
        return spread(list(found.values())) if found else None


def _cell(metric: str, found: Spread | None) -> str:
    if found is None:
        return ""
    text = number(metric, found.mean, sign=True)
    return text if found.half is None else f"{text} ± {number(metric, found.half, slope=True)}"
