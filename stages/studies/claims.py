"""Verdicts: whether a claim holds, fails, or is undecided, with the numbers that say so.

A claim is compared within each seed, for all variants have the same seeds; over the seeds' differences stands the interval.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from stages.contract.errors import UserError
from stages.contract.suggest import nearest
from stages.studies.arms import Arm
from stages.studies.settings import START, Comparison, Quantity
from stages.studies.spread import Spread, holm, slope, spread

Answer = Literal["holds", "fails", "undecided"]


@dataclass(frozen=True)
class Verdict:
    """What came of a claim."""

    name: str
    claim: Comparison
    answer: Answer
    of: Spread | None
    """What the claim is about, over seeds; None when nothing was measured."""
    than: Spread | None
    """What it is compared with."""
    difference: Spread | None
    """`of` less `than`, within each seed."""
    holm: float | None
    """p-value corrected for the number of claims with one."""


def judge(claims: Mapping[str, Comparison], arms: Sequence[Arm], starts: Mapping[str, Mapping[str, float]]) -> list[Verdict]:
    """The verdicts, in the claims' order. `starts`: model that arms started from -> its evaluation.

    Raises UserError for a metric that no arm has.
    """
    known = {metric for arm in arms for metric in arm.metrics}
    for name, claim in claims.items():
        if claim.metric not in known:
            raise UserError(
                f"no arm has the metric `{claim.metric}`", where=f"claims.{name}.metric", mend=nearest(claim.metric, known)
            )
    drafts = [_verdict(name, claim, arms, starts) for name, claim in claims.items()]
    tested = [index for index, draft in enumerate(drafts) if draft.difference is not None and draft.difference.p is not None]
    corrected = holm([drafts[index].difference.p for index in tested])  # type: ignore[union-attr, misc]
    found = dict(zip(tested, corrected, strict=True))
    return [Verdict(**{**vars(draft), "holm": found.get(index)}) for index, draft in enumerate(drafts)]


def _verdict(name: str, claim: Comparison, arms: Sequence[Arm], starts: Mapping[str, Mapping[str, float]]) -> Verdict:
    of = values(claim.of, claim.metric, arms)
    if isinstance(claim.than, Quantity):
        than = values(claim.than, claim.metric, arms)
    elif claim.than == START:
        than = _of_the_starts(claim, arms, starts)
    else:
        than = dict.fromkeys(of, float(claim.than))
    shared = [seed for seed in of if seed in than]
    if not shared:
        return Verdict(name, claim, "undecided", None, None, None, None)
    first, second = ([found[seed] for seed in shared] for found in (of, than))
    difference = spread([a - b for a, b in zip(first, second, strict=True)])
    return Verdict(name, claim, answer(difference, claim.direction), spread(first), spread(second), difference, None)


def answer(difference: Spread, direction: Literal["above", "below"]) -> Answer:
    """`holds` when the whole interval lies on the claimed side of 0, `fails` when on the other, else `undecided`."""
    if difference.low is None or difference.high is None:
        return "undecided"
    up, down = difference.low > 0, difference.high < 0
    if not (up or down):
        return "undecided"
    return "holds" if up == (direction == "above") else "fails"


def values(quantity: Quantity, metric: str, arms: Sequence[Arm]) -> dict[int, float]:
    """Seed -> the quantity, of those seeds in which every variant that it needs has the metric."""
    table = {(arm.seed, arm.variant): arm.metrics[metric] for arm in arms if metric in arm.metrics}
    found = {}
    for seed in dict.fromkeys(arm.seed for arm in arms):
        blocks = [[(variant, table.get((seed, variant))) for variant in block] for block in quantity.blocks]
        whole = [[(variant, value) for variant, value in block if value is not None] for block in blocks]
        if list(map(len, whole)) == list(map(len, blocks)):
            found[seed] = fmean(_block(quantity, block) for block in whole)
    return found


def _block(quantity: Quantity, block: list[tuple[str, float]]) -> float:
    if not quantity.x:
        return fmean(value for _, value in block)
    return slope([quantity.x[variant] for variant, _ in block], [value for _, value in block])


def _of_the_starts(claim: Comparison, arms: Sequence[Arm], starts: Mapping[str, Mapping[str, float]]) -> dict[int, float]:
    """Seed -> the metric of the models that the claim's arms started from, weighted as the claim weighs its arms."""
    told = [Arm(arm.variant, arm.seed, arm.start, metrics=dict(starts[arm.start])) for arm in arms]
    return values(claim.of, claim.metric, told)
