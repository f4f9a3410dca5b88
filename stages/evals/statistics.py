"""Numbers from repeated sampling: pass@1, pass@k, majority vote, standard errors, paired differences. Pure functions.

The unit of chance is the problem, not the answer: k answers to one problem are not independent of each other, so every
standard error here is taken over per-problem means.
"""

import math
from collections.abc import Callable, Mapping, Sequence


def mean(values: Sequence[float]) -> float:
    """The mean of at least one value."""
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean: sample standard deviation (n - 1) / sqrt(n). None for fewer than two values.

    >>> standard_error([1.0, 0.0, 0.5, 0.5])
    0.2041241452319315
    """
    n = len(values)
    if n < 2:
        return None
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (n - 1) / n)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased chance that at least one of k answers is right, from n answers of which `right` are (arXiv 2107.03374, eq. 1).

    1 - C(n - right, k) / C(n, k). pass@1 is right / n.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} answers")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority_credit(answers: Sequence[str | None], right: Sequence[bool], same: Callable[[str, str], bool]) -> float:
    """cons@k of one problem: whether the most frequent final answer is right, between 0 and 1.

    `answers`: the final answer of each sample, None when it has none (it does not vote). Right answers vote together; wrong
    ones are counted together when `same` says so. **Ties share the credit**: a right answer that ties with m others earns
    1 / (m + 1), the expectation of breaking the tie at random. So cons@2 equals pass@1 when both samples answer.

    `same` may be slow: it is asked only when the outcome hangs on it.
    """
    votes = sum(good and answer is not None for answer, good in zip(answers, right, strict=True))
    if votes == 0:
        return 0.0
    wrong: dict[str, int] = {}
    for answer, good in zip(answers, right, strict=True):
        if answer is not None and not good:
            wrong[answer] = wrong.get(answer, 0) + 1
    if sum(wrong.values()) < votes:
        return 1.0
    if max(wrong.values()) > votes:
        return 0.0
    counts: dict[str, int] = {}
    for answer, count in wrong.items():
        known = next((other for other in counts if same(other, answer)), answer)
        counts[known] = counts.get(known, 0) + count
    if max(counts.values()) > votes:
        return 0.0
    return 1.0 / (1 + sum(count == votes for count in counts.values()))


def paired_difference(a: Mapping[str, float], b: Mapping[str, float]) -> tuple[float, float | None]:
    """Mean of a - b over the problems that both have, and its standard error.

    `a`, `b`: problem id -> mean over its samples. Problems differ far more than models do, so the error of the paired
    difference is smaller than that of two separate means.

    Raises ValueError when they share no problem.
    """
    shared = sorted(a.keys() & b.keys())
    if not shared:
        raise ValueError("the two reports share no problem")
    differences = [a[problem] - b[problem] for problem in shared]
    return mean(differences), standard_error(differences)
