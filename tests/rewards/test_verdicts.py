"""The verifiers `math`, `numeric` and `exact` on pairs thought out by hand, and on the pairs of public reports."""

import contextlib
import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.evals.headline import problem_metrics
from stages.problems.episode import Episode, Group, Problem
from stages.rewards.answers.form_reader import read_form
from stages.rewards.answers.formula import Unreadable, read_formula
from stages.rewards.answers.judges import _quick, verdicts
from stages.rewards.answers.math_verify import judge
from stages.rewards.answers.numbers import last_number, parse_number
from stages.rewards.answers.text import plain_text
from stages.rewards.score import Rewards, same_answer, score
from tests.rewards import exact_answers, math_answers, numeric_answers
from tests.rewards.tricky_answers import MATH

PAIRS = {"math": math_answers.PAIRS, "numeric": numeric_answers.PAIRS, "exact": exact_answers.PAIRS}
REPORTED = Path(__file__).with_name("reported_answers.json")
"""Pairs on which verifiers of public projects were reported to be wrong, with the verdict of a mathematician."""
LIMIT_S = 20.0


def missed(pairs, verifier):
    """The pairs with another verdict than they should have."""
    judged = verdicts([pair[:2] for pair in pairs], verifier, verify_timeout_s=LIMIT_S)
    return [(*pair, verdict) for pair, verdict in zip(pairs, judged, strict=True) if pair[2] != verdict]


@pytest.mark.parametrize("verifier", list(PAIRS))
def test_pairs_by_hand_have_the_verdict_of_a_mathematician(verifier):
    assert missed(PAIRS[verifier], verifier) == []


@pytest.mark.parametrize("verifier", list(PAIRS))
def test_pairs_by_hand_are_many_different_ones_and_half_of_them_right(verifier):
    pairs = PAIRS[verifier]
    assert len({pair[:2] for pair in pairs}) == len(pairs) >= 100
    assert Counter(verdict for *_, verdict in pairs)["right"] >= len(pairs) / 2


def test_pairs_of_public_reports_have_their_verdicts():
    rows = json.loads(REPORTED.read_text(encoding="utf-8"))
    for verifier in PAIRS:
        pairs = [(row["reference"], row["answer"], row["verdict"]) for row in rows if row["verifier"] == verifier]
        assert missed(pairs, verifier) == []
    assert {row["verifier"] for row in rows} <= set(PAIRS)


def test_what_is_decided_without_algebra_is_what_algebra_says():
    pairs = [*math_answers.PAIRS, *MATH, *((r, a, v) for r, a, v in numeric_answers.PAIRS if r)]
    quick = [(reference, answer, _quick(reference, answer)) for reference, answer, _ in pairs]
    decided = [(reference, answer, verdict) for reference, answer, verdict in quick if verdict is not None]
    assert len(decided) > 100
    assert [(*row, judge(*row[:2])) for row in decided if judge(*row[:2]) != row[2]] == []


def test_two_right_answers_are_the_same_in_either_order():
    right = [(r, a) for r, a, v in math_answers.PAIRS if v == "right" and "(B)" not in r]
    swapped = [(a, r, judge(a, r)) for r, a in right]
    # An answer may name its value, show the calculation or leave out a unit; a reference of that form asks for the whole of it.
    assert len([row for row in swapped if row[2] != "right"]) <= 6, [row for row in swapped if row[2] != "right"]


@pytest.mark.parametrize(
    ("a", "b", "verifier", "same"),
    [
        (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}", "math", False),
        ("(1,2)", r"\{1,2\}", "math", False),
        ("[2,5)", "2 <= x < 5", "math", True),
        (r"12\,345", "12345", "math", True),
        (r"12\,345", "12345", "numeric", True),
        ("1e-20", "2e-20", "numeric", False),
        ("x²", "x^2", "exact", False),
    ],
)
def test_majority_votes_use_the_verifiers_rules(a, b, verifier, same):
    assert same_answer(a, b, Rewards(verifier=verifier)) is same


def test_a_majority_of_unequal_tiny_numbers_is_none():
    problem = Problem("p", "q", r"\frac{1}{10^{18}}", "s", verifier="math")
    texts = [rf"<answer>\frac{{{n}}}{{10^{{18}}}}</answer>" for n in (2, 3, 1, 1)]
    episodes = [Episode(problem, n, "q", [1], [2], [0.0], text, "stop") for n, text in enumerate(texts)]
    score(Rewards(), episodes, max_tokens=8, key="")
    assert [e.scored.verdict for e in episodes] == ["wrong", "wrong", "right", "right"]
    assert problem_metrics(Group(problem, episodes), Rewards())["cons_at_k"] == 1.0


def test_a_tower_of_powers_has_no_verdict_at_once():
    towers = ["9**9**9**9", "9^{9^{9^9}}", "10¹⁰⁰⁰⁰⁰⁰⁰⁰⁰", r"2^{2^{2^{2^{2^{2}}}}}", "((9!)!)!", "(" * 400 + "1" + ")" * 400]
    assert verdicts([(r"\pi", tower) for tower in towers], "math") == ["none"] * len(towers)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (r"12\,345", "12345"), (r"\left( 1,\ 2 \right)", "( 1, 2 )"), ("**7**", "7"), ("**7** and **8**", "7 and 8"),
        ("2**3**2", "2**3**2"), ("$x$ or $y$", "x or y"), ("$5", "¤5"), (r"\$5", "¤5"), ("x₁²", "x_{1}^{2}"), (
        "3⅓", r"3\frac{1}{3}"),
        (r"\boxed{1} \boxed{2}", "1, 2"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\text{a b}", "a b"), ("5\u200b", "5"),
        ("（1，2）", "(1,2)"), ("The answer is: 5.", "5"), ("a,\\ldots", r"a,\ldots"), ("...", r"\ldots"), ("",
        ""), ("{{5}}", "5"),
        ("٥", "٥"), ("\ud800", "\ud800"), ("5 000 apples", "5000 apples"), ("5 00", "5 00"),
    ],
)  # fmt: skip
def test_plain_text(text, plain):
    assert plain_text(text) == plain
    assert plain_text(plain) == plain


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=60), st.text(alphabet="0123456789.,/+-^_{}()[]|\\fracsqtxyeπ²½٣ ,;:=<>%$*", max_size=60)))
def test_any_text_has_a_form_and_a_reading(text):
    plain = plain_text(text)
    read_form(plain)
    assert parse_number(text) is None or parse_number(text) == parse_number(text)
    last_number(text)


_TOKENS = [
    "1", "20", "0.5", "x", "y", "e", "i", r"\pi", r"\frac", "{", "}", "(", ")", "[", "]", r"\{", r"\}", "+",
    "-", "*", "/", "^", "_", "!",
    r"\sqrt", r"\sin", r"\log", "=", "<", r"\le", ",", ";", " or ", r"\cup", r"\infty", r"\text{cm}", "%",
    "$", ":", "|", r"\pm", r"\ldots",
    "²", "½", "٣", r"\overline{3}", r"\begin{pmatrix}", r"\end{pmatrix}", "&", r"\\", "apples", "June",
    "(A)", r"\binom", r"\mid", "'", "°",
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(_TOKENS), max_size=9).map("".join))
def test_any_formula_is_read_or_unreadable(text):
    """What sympy raises on a formula without a value is no more than `Unreadable`."""
    with contextlib.suppress(Unreadable):
        read_formula(plain_text(text))


@pytest.mark.slow
def test_any_formula_has_a_verdict_and_is_right_against_itself():
    texts = []

    @settings(max_examples=2000, deadline=None, database=None)
    @given(st.lists(st.sampled_from(_TOKENS), min_size=1, max_size=9).map("".join))
    def collect(text):
        texts.append(text)

    collect()
    judged = verdicts([(a, b) for a, b in itertools.pairwise(texts)], "math", verify_timeout_s=2.0)
    assert set(judged) <= {"right", "wrong", "none"}
    itself = verdicts([(text, f" {text} ") for text in texts if plain_text(text)], "math", verify_timeout_s=2.0)
    assert set(itself) == {"right"}
