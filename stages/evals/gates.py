"""Gates: whether one model is better than another, or not worse, beyond the sampling error. Pure functions.

The differences are paired, one per problem, so that what makes some problems harder than others does not count. The test is
one-sided: Student's t on the differences, to which one more is added, of a problem that the model loses outright (for the
upper bound: wins). Without it a standard error of 0 (greedy answers, or two models that agree everywhere) would prove anything,
and few lost problems too much; with it, n problems rule out no more than they can: where all agree, about 3 / n.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from stages.evals.statistics import mean, paired_difference, standard_error

Verdict = Literal["passed", "failed", "undecided"]


@dataclass(frozen=True)
class Judgement:
    """What a gate found. All numbers are shares (0.01 is one point)."""

    verdict: Verdict
    """`passed`: shown to hold; `failed`: shown not to; `undecided`: within the sampling error."""
    model: float
    """The metric of the model that is judged."""
    against: float
    """The metric of the other one."""
    difference: float
    stderr: float | None
    """Standard error of the difference; None for a single problem."""
    low: float
    """The true difference is above this, at the confidence asked for."""
    high: float
    """And below this (each bound on its own)."""
    problems: int


def judge(model: Mapping[str, float], against: Mapping[str, float], threshold: float, confidence: float) -> Judgement:
    """Whether the difference `model` - `against` is above `threshold`.

    `model`, `against`: problem id -> mean over its samples, a share between 0 and 1, of the same problems. `threshold`: the
    margin of "better", or minus the tolerance of "not worse". Raises ValueError when the problems are not the same.
    """
    if model.keys() != against.keys():
        raise ValueError("the two reports are about different problems")
    difference, stderr = paired_difference(model, against)
    low, high = bounds([model[problem] - against[problem] for problem in model], confidence)
    verdict: Verdict = "passed" if low > threshold else "failed" if high < threshold else "undecided"
    means = mean(list(model.values())), mean(list(against.values()))
    return Judgement(verdict, *means, difference, stderr, low, high, len(model))


def bounds(differences: Sequence[float], confidence: float) -> tuple[float, float]:
    """One-sided lower and upper confidence bound of the mean of differences that lie between -1 and 1."""
    return max(-1.0, -_above([-value for value in differences], confidence)), min(1.0, _above(differences, confidence))


def _above(differences: Sequence[float], confidence: float) -> float:
    from scipy.stats import t  # half a second to import

    with_one_more = [*differences, 1.0]
    error = standard_error(with_one_more)
    assert error is not None
    return mean(with_one_more) + float(t.ppf(confidence, len(differences))) * error


def in_words(found: Judgement, metric: str, confidence: float, *, margin: float | None, tolerance: float | None) -> str:
    """The judgement as a sentence. One of `margin` ("better") and `tolerance` ("not worse") is given.

    >>> found = Judgement("passed", 0.947, 0.444, 0.503, 0.017, 0.475, 0.531, 500)
    >>> in_words(found, "accuracy", 0.95, margin=0.0, tolerance=None)
    'accuracy 94.7 % against 44.4 %: +50.3 ± 1.7 points, better beyond the sampling error (95 %, 500 problems)'
    """
    error = f" ± {100 * found.stderr:.1f}" if found.stderr is not None else ""
    numbers = (
        f"{metric} {100 * found.model:.1f} % against {100 * found.against:.1f} %: {100 * found.difference:+.1f}{error} points"
    )
    if tolerance is None:
        by = f" by {100 * margin:g} points" if margin else ""
        said = {
            "passed": f"better{by} beyond the sampling error",
            "failed": f"not better{by}, beyond the sampling error",
            "undecided": f"within the sampling error: not shown to be better{by}",
        }
    else:
        worse = f"worse by {100 * tolerance:g} points"
        said = {
            "passed": f"not {worse}, beyond the sampling error",
            "failed": f"{worse} or more, beyond the sampling error",
            "undecided": f"within the sampling error: may be {worse}",
        }
    return f"{numbers}, {said[found.verdict]} ({100 * confidence:g} %, {found.problems} problems)"
