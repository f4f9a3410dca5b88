"""Numbers over seeds: mean, spread, intervals by Student's t, Holm's correction, slopes. The unit of chance is the seed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
"""Of every interval."""


@dataclass(frozen=True)
class Spread:
    """A number that each of n seeds has."""

    n: int
    mean: float
    sd: float | None
    """Standard deviation of the sample (n - 1); None for one value, as all that follows."""
    low: float | None
    high: float | None
    """Interval of the mean by the t-distribution with n - 1 degrees of freedom."""
    p: float | None
    """Two-sided p-value of the t-test that the mean is 0."""

    @property
    def half(self) -> float | None:
        """Half the width of the interval."""
        return None if self.high is None else self.high - self.mean


def spread(values: Sequence[float]) -> Spread:
    """The spread of at least one value. Equal values have an interval without width, which says nothing about chance.

    >>> round(spread([1.0, 2.0, 3.0]).high, 4)
    4.4841
    """
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return Spread(n, mean, None, None, None, None)
    if min(values) == max(values):  # rounding must not make a spread of it
        return Spread(n, values[0], 0.0, values[0], values[0], 0.0 if values[0] else 1.0)
    from scipy import stats

    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    error = sd / math.sqrt(n)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
    return Spread(n, mean, sd, mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / error, n - 1)))


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of the least-squares line through (x, y).

    Raises ValueError when all x are equal.

    >>> slope([0.0, 1.0, 2.0], [1.0, 3.0, 5.0])
    2.0
    """
    centre = math.fsum(x) / len(x)
    across = math.fsum((a - centre) ** 2 for a in x)
    if across == 0:
        raise ValueError("a slope needs different x")
    return math.fsum((a - centre) * b for a, b in zip(x, y, strict=True)) / across


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): below 0.05 they bound the chance of any false one by 0.05.

    >>> [round(value, 3) for value in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p)), key=lambda index: p[index])
    found, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        found[index] = largest
    return found
