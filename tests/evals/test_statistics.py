"""Statistics of sampled answers, worked out by hand."""

import math
from itertools import combinations

import pytest

from stages.evals.statistics import majority_credit, mean, paired_difference, pass_at_k, standard_error


def never(a, b):
    raise AssertionError(f"`same` was asked about {a} and {b}")


def plain(a, b):
    return float(a) == float(b)


def test_pass_at_1_is_the_mean_and_its_error_comes_from_the_problems():
    means = [1.0, 0.5, 0.0, 0.5]  # 4 problems × 2 samples
    assert mean(means) == 0.5
    # deviations .5 0 -.5 0: variance .5/3, error sqrt(.5/3/4)
    assert standard_error(means) == pytest.approx(math.sqrt(0.5 / 12), abs=1e-15)
    # The 8 answers taken as independent would give sqrt(.25/7): another number.
    assert standard_error(means) != pytest.approx(math.sqrt(0.25 / 7), abs=1e-3)
    assert standard_error([1.0]) is None


@pytest.mark.parametrize(("n", "right", "k"), [(5, 2, 1), (5, 2, 2), (6, 1, 4), (4, 0, 3), (4, 4, 4), (5, 3, 3)])
def test_pass_at_k_is_the_share_of_all_draws_that_hold_a_right_answer(n, right, k):
    draws = list(combinations([True] * right + [False] * (n - right), k))
    assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_more_than_was_sampled_is_refused():
    with pytest.raises(ValueError, match="pass@3 cannot be estimated from 2"):
        pass_at_k(2, 1, 3)


@pytest.mark.parametrize(
    ("answers", "right", "credit"),
    [
        (["5", "5", "4"], [True, True, False], 1.0),
        (["5", "4"], [True, False], 0.5),  # a tie of two
        (["5", "4", "3"], [True, False, False], 1 / 3),  # a tie of three
        (["5", "4", "4.0"], [True, False, False], 0.0),  # two ways to write one wrong answer
        (["5", "5", "4", "4.0", "3"], [True, True, False, False, False], 0.5),
        ([None, None, "5"], [False, False, True], 1.0),  # what gives no answer does not vote
        (["4", "4"], [False, False], 0.0),
        ([None], [False], 0.0),
    ],
)
def test_majority_votes(answers, right, credit):
    assert majority_credit(answers, right, plain) == credit


def test_answers_are_compared_only_when_the_outcome_hangs_on_it():
    assert majority_credit(["5", "5", "4"], [True, True, False], never) == 1.0
    assert majority_credit(["5", "4", "4", "3"], [True, False, False, False], never) == 0.0


def test_paired_differences():
    a = {"p0": 1.0, "p1": 1.0, "p2": 0.5, "only a": 0.0}
    b = {"p0": 0.0, "p1": 0.5, "p2": 0.5, "only b": 1.0}
    difference, error = paired_difference(a, b)
    assert difference == 0.5  # (1 + .5 + 0) / 3
    assert error == pytest.approx(math.sqrt(0.5 / 2 / 3), abs=1e-15)  # deviations .5 0 -.5
    with pytest.raises(ValueError, match="share no problem"):
        paired_difference({"x": 1.0}, {"y": 1.0})
