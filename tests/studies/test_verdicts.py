"""What a study says of claims: intervals as scipy has them, verdicts, and how often a claim about nothing is borne out."""

import random

import pytest
from scipy import stats

from stages.contract.errors import UserError
from stages.studies.arms import Arm, late
from stages.studies.claims import answer, judge, values
from stages.studies.settings import Comparison, Quantity
from stages.studies.spread import Spread, holm, slope, spread
from stages.studies.text import number, sentence
from stages.tracking.journal import Line


def quantity(*blocks, x=None, words="a"):
    return Quantity(blocks=blocks, x=x or {}, words=words)


def claim(of, than, direction="above", metric="accuracy"):
    return Comparison(says="It is so.", metric=metric, of=of, than=than, direction=direction)


def arms(table, metric="accuracy"):
    """Arms of `{variant: [value of seed 0, of seed 1, …]}`."""
    return [Arm(v, seed, "base", {metric: value}) for v, found in table.items() for seed, value in enumerate(found)]


def test_an_interval_is_scipys():
    found = [0.91, 0.93, 0.88, 0.95, 0.90]
    ours, theirs = spread(found), stats.ttest_1samp(found, 0)
    low, high = theirs.confidence_interval(0.95)
    assert (ours.low, ours.high, ours.p) == pytest.approx((low, high, theirs.pvalue))
    assert (ours.mean, ours.sd, ours.n) == pytest.approx((0.914, 0.0270185, 5), rel=1e-5)


def test_one_seed_has_no_interval_and_equal_seeds_one_without_width():
    assert spread([0.5]) == Spread(1, 0.5, None, None, None, None)
    equal = spread([0.1] * 3)
    assert (equal.sd, equal.low, equal.high) == (0.0, 0.1, 0.1)
    assert spread([0.0] * 3).p == 1.0


def test_a_slope_is_scipys():
    x, y = [0.0, 0.01, 0.1, 0.1], [30.0, 29.0, 22.0, 25.0]
    assert slope(x, y) == pytest.approx(stats.linregress(x, y).slope)
    with pytest.raises(ValueError, match="different x"):
        slope([1.0, 1.0], [2.0, 3.0])


def test_holm_by_hand():
    # Sorted: .005 × 4, .01 × 3, .03 × 2, .04 × 1, and never less than the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("low", "high", "above", "below"),
    [
        (0.1, 0.2, "holds", "fails"),
        (-0.2, -0.1, "fails", "holds"),
        (-0.1, 0.2, "undecided", "undecided"),
        (0.0, 0.2, "undecided", "undecided"),
        (None, None, "undecided", "undecided"),
    ],
)
def test_the_verdict_is_where_the_interval_lies(low, high, above, below):
    found = Spread(5, 0.0, 0.1, low, high, 0.5)
    assert (answer(found, "above"), answer(found, "below")) == (above, below)


def test_variants_are_compared_within_each_seed():
    # Seeds differ far more than variants do.
    table = {"a": [0.92, 0.72, 0.52], "b": [0.90, 0.71, 0.50]}
    (verdict,) = judge({"c": claim(quantity(("a",)), quantity(("b",), words="b"))}, arms(table), {})
    assert verdict.answer == "holds"
    theirs = stats.ttest_rel(*table.values())
    assert (verdict.difference.p, verdict.difference.low) == pytest.approx((theirs.pvalue, theirs.confidence_interval().low))
    assert verdict.holm == verdict.difference.p, "one claim needs no correction"
    assert sentence(verdict, 1).startswith(
        "holds: It is so. (accuracy: a 72.0 %, b 70.3 %; difference +1.7 points, 95 % interval "
    )


def test_a_claim_against_the_start_and_against_a_number():
    table = {"a": [0.60, 0.61, 0.62]}
    claims = {"start": claim(quantity(("a",)), "start"), "number": claim(quantity(("a",)), 0.7)}
    found = judge(claims, arms(table), {"base": {"accuracy": 0.5}})
    assert [v.answer for v in found] == ["holds", "fails"]
    assert found[0].difference.mean == pytest.approx(0.11)
    assert found[1].holm == pytest.approx(max(2 * min(v.difference.p for v in found), max(v.difference.p for v in found)))


def test_a_slope_is_fitted_for_each_seed_within_each_block():
    table = {"a1": [30, 40], "a2": [20, 28], "b1": [50, 50], "b2": [46, 44]}
    two = quantity(("a1", "a2"), ("b1", "b2"), x={"a1": 0.0, "a2": 0.1, "b1": 0.0, "b2": 0.2})
    # Pooled, the blocks' own levels would be taken for a slope.
    assert values(two, "mean_length", arms(table, "mean_length")) == pytest.approx({0: -60, 1: -75})
    (verdict,) = judge({"tax": claim(two, 0.0, "below", "mean_length")}, arms(table, "mean_length"), {})
    assert verdict.difference.mean == pytest.approx(-67.5)


def test_a_seed_in_which_something_was_not_measured_is_left_out():
    some = [*arms({"a": [1, 2, 3]}), *arms({"b": [1]})]
    assert values(quantity(("a", "b")), "accuracy", some) == {0: 1}
    (verdict,) = judge({"c": claim(quantity(("a",)), quantity(("b",), words="b"))}, some, {})
    assert (verdict.answer, verdict.difference.n, verdict.holm) == ("undecided", 1, None)
    assert "one seed has no interval" in sentence(verdict, 0)


def test_a_metric_that_does_not_exist_is_told():
    with pytest.raises(UserError, match=r"claims\.c\.metric.*did you mean `accuracy`"):
        judge({"c": claim(quantity(("a",)), 0.0, metric="acuracy")}, arms({"a": [1, 2]}), {})


def test_a_claim_about_nothing_is_seldom_decided():
    rng, studies, seeds, decided, any_false = random.Random(0), 1500, 5, 0, 0
    for _ in range(studies):
        table = {name: [rng.gauss(0.8, 0.05) for _ in range(seeds)] for name in "abcd"}
        claims = {n: claim(quantity((n,)), quantity(("a",), words="a")) for n in "bcd"}
        found = judge(claims, arms(table), {})
        decided += sum(v.answer != "undecided" for v in found)
        any_false += any(v.holm < 0.05 for v in found)
    # Binomial: 5 % of 4,500, whose standard deviation is at most 0.56 points (claims of a study share `a`).
    assert 0.03 < decided / (3 * studies) < 0.07
    assert any_false / studies < 0.05 + 3 * (0.05 * 0.95 / studies) ** 0.5


def test_a_real_difference_is_found():
    rng, found = random.Random(1), 0
    for _ in range(200):
        table = {"a": [rng.gauss(0.9, 0.02) for _ in range(5)], "b": [rng.gauss(0.8, 0.02) for _ in range(5)]}
        (verdict,) = judge({"c": claim(quantity(("a",)), quantity(("b",), words="b"))}, arms(table), {})
        found += verdict.answer == "holds"
    assert found > 190


def test_a_journals_metric_is_its_mean_over_the_last_quarter():
    lines = [
        Line(i, 8, 0, {"train/kl": float(i), "time/step": 1.0, **({"eval/accuracy": 0.5} if i == 8 else {})})
        for i in range(1, 9)
    ]
    assert late(lines) == {"train/kl": 7.5, "eval/accuracy": 0.5}
    assert late([]) == {}


def test_numbers_are_written_with_their_unit():
    assert number("pass_at_16", 0.5) == "50.0 %"
    assert number("accuracy", -0.0213, sign=True) == "-2.1"
    assert number("sampled_tokens", 200123.0) == "200123"
    assert number("train/kl", 0.01234) == "0.0123"
