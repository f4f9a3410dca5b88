"""The accuracy reward on answers written down by hand, and on the reference solutions of real problems."""

import json
from collections import Counter
from pathlib import Path

import psutil
import pytest

from stages.problems.episode import Episode, Problem
from stages.rewards.answers.expression_size import too_big
from stages.rewards.answers.judges import verdicts
from stages.rewards.answers.math_pool import MathPool
from stages.rewards.score import Rewards, score
from stages.rewards.tags import boxes
from tests.requirements import require
from tests.rewards.hanging_answers import LIMIT_S, mixed, untold
from tests.rewards.tricky_answers import MATH, TEXTS

DATA = Path(__file__).parents[3] / "shared" / "data"


def test_tricky_answers():
    found = verdicts([(reference, answer) for reference, answer, _ in MATH], "math", verify_timeout_s=20.0)
    missed = [(*row, verdict) for row, verdict in zip(MATH, found, strict=True) if row[2] != verdict]
    assert missed == []
    assert len({(reference, answer) for reference, answer, _ in MATH}) == len(MATH) >= 90
    assert min(Counter(verdict for *_, verdict in MATH).values()) >= 3


@pytest.mark.parametrize(("text", "place", "reference", "verdict"), TEXTS)
def test_tricky_texts(text, place, reference, verdict):
    episode = Episode(Problem("p", "q", reference, "s"), 0, "q", [1], [2], [0.0], text, "stop")
    score(Rewards(answer_in=place), [episode], max_tokens=8, key="")
    assert episode.scored.verdict == verdict


@pytest.mark.parametrize(
    ("text", "big"),
    [
        ("2^{2015}", False), ("3^{100000}", False), ("3^{200000}", True), ("10^{10^{4}}", False), ("10^{10^{5}}", True),
        ("10**10**10", True), ("(10^{100})^{10^{100}}", True), ("2^{-10^{9}}", True), ("x^{x^{x^x}}", False),
        ("e^{e^{e}}", False), ("e^{e^{e^{e^{e}}}}", True), ("100!", False), ("2000!", False), ("3000!", True),
        ("(5!)!", False), ("((5!)!)!", True), (r"\binom{100}{50}", False), (r"\binom{1000000}{5}", True),
        (r"\sum_{k=1}^{10} k", False), (r"\sum_{k=1}^{10000000} k", True), ("(" * 30 + "1" + ")" * 30, False),
        ("(" * 50 + "1" + ")" * 50, True), (r"\sqrt{" * 50 + "2" + "}" * 50, True), (r"\frac{1}{2}^{10}", False),
        ("))1", False), ("2^", False), ("", False), ("^^", False), (r"\left(\frac{2}{3}\right)^{100}", False),
        (r"\left(10^{9}\right)!", True), ("9" * 900, False), ("0.5", False), (".5^{10}", False), ("1/0", False),
    ],
)  # fmt: skip
def test_what_is_too_big_to_be_computed(text, big):
    assert too_big(text) is big


def solutions(name):
    """(reference, answer as the solution states it) of a file; skips where it is absent."""
    require("problem sets")
    path = DATA / name
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if "solution" in rows[0]:
        return [(row["answer"], boxes(row["solution"])[-1]) for row in rows]
    return [(row["answer"].rpartition("####")[2].strip(),) * 2 for row in rows]


@pytest.mark.parametrize(
    ("name", "equal"),
    [
        ("gsm8k_test.jsonl", 0),
        # The next problem's answer is another text and the same value: `x=5` for `5`.
        pytest.param("math500_test.jsonl", 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("place", ["tags", "boxed"])
def test_reference_solutions_are_right_against_themselves_and_against_no_other(name, equal, place):
    rows = solutions(name)
    stated = r"<think>x</think> <answer>{}</answer>" if place == "tags" else r"so it is $\boxed{{{}}}$."
    episodes = []
    for number, (reference, answer) in enumerate(rows):
        other = rows[(number + 1) % len(rows)][1]
        for sample, given in enumerate([answer, other]):
            problem = Problem(f"{number}", "q", reference, "s")
            episodes.append(Episode(problem, sample, "q", [1], [2], [0.0], stated.format(given), "stop"))
    score(Rewards(answer_in=place, verify_timeout_s=20.0), episodes, max_tokens=8, key="")
    own, other = episodes[::2], episodes[1::2]
    missed = [e.problem.answer for e in own if e.scored.verdict != "right"]
    assert len(missed) <= 0.005 * len(rows), missed
    wrongly = [e for e, (reference, _), n in zip(other, rows, range(len(rows)), strict=True)
               if e.scored.verdict != "wrong" and reference != rows[(n + 1) % len(rows)][0]]  # fmt: skip
    assert len(wrongly) == equal, [(e.problem.answer, e.text) for e in wrongly]
    print(name, place, "missed:", missed, "none:", sum(e.scored.verdict == "none" for e in episodes))


@pytest.mark.slow
def test_hanging_answers_end_within_their_limit_and_all_others_keep_their_verdict():
    pairs, wanted = mixed(1800, 190, 10)
    pool = MathPool(LIMIT_S, wall_s=120.0)
    try:
        found = pool.judge(pairs)
        missed = [(*pair, a, b) for pair, a, b in zip(pairs, found, wanted, strict=True) if a != b]
        assert missed == []
        # Those that cannot be told from their text, one by one: the kernel ends them at their processor time.
        worker = pool.pool.workers[0]
        for pair in untold(5):
            assert worker.ask((r"\pi", "x")).value == "wrong"  # there is a copy; it has worked before
            parent, copy = psutil.Process(worker._process.pid), psutil.Process(worker.copy)
            before, own = parent.cpu_times(), copy.cpu_times()
            assert worker.ask(pair).fault == "ended"
            assert worker.ask((r"\pi", "x")).value == "wrong"  # by now the ended copy's time is its parent's
            after = parent.cpu_times()
            used = after.children_user + after.children_system - before.children_user - before.children_system
            assert LIMIT_S - 0.5 < used - own.user - own.system < LIMIT_S + 0.5  # the kernel counts in ticks
    finally:
        pool.end()
