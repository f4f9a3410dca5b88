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
    heads = [COLUMNS[metric] + (", points" if is_share(metric) else "") for metric in shown]
    head = f"Slopes against {slopes.against}: the change {unit}; the intervals are not corrected for their number.\n\n"
    return head + markdown([slopes.against, *heads], rows)


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
