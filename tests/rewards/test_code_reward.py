"""The verdict on programs: honest ones pass, wrong ones do not, and a test that cannot be read gives no verdict."""

import json
import time

import pytest

from stages.contract.config import semantic
from stages.rewards.code.asserts import Opaque, UnreadableTests, decode, read_asserts
from stages.rewards.code.boot import encode
from stages.rewards.code.sandbox import Sandbox
from stages.rewards.code.supervisor import Ended
from stages.rewards.code.verifier import Judgement, judge, judgements, program_of
from tests.requirements import needs

needs_bubblewrap = needs("bubblewrap")
SUMS = {"stdin": [{"input": "1 2\n", "output": "3\n"}, {"input": "10 -4\n", "output": "6"}]}
ROTATE = {
    "asserts": [
        "assert rotate([1, 2, 3], 1) == [3, 1, 2]",
        "assert rotate([], 5) == []",
        "assert sorted(rotate([3, 1], 1)) == [1, 3] and len(rotate([1], 9)) == 1",
    ]
}
ADD = "def add(a, b): return a + b"


def answer(program: str) -> str:
    return f"I add them.\n```python\n{program}\n```\nDone."


# Problem, program, verdict, reason. What is right was decided by reading the problem, not by running this.
CASES = {
    "sums": (SUMS, "a, b = map(int, input().split())\nprint(a + b)", "right", None),
    "differences": (SUMS, "a, b = map(int, input().split())\nprint(a - b)", "wrong", "differs"),
    "the first test only": (SUMS, "print(3)", "wrong", "differs"),
    "spaces at the end": (
        SUMS,
        "import sys\na, b = map(int, sys.stdin.read().split())\nprint(a + b, '', '\\n')",
        "right",
        None,
    ),
    "spaces at the start": (SUMS, "a, b = map(int, input().split())\nprint('', a + b)", "wrong", "differs"),
    "the device of the input": (SUMS, "print(sum(map(int, open('/dev/stdin').read().split())))", "right", None),
    "under a guard": (SUMS, "if __name__ == '__main__':\n    print(sum(map(int, input().split())))", "right", None),
    "left with exit": (SUMS, "print(sum(map(int, input().split())))\nexit()", "right", None),
    "left with a status": (SUMS, "print(sum(map(int, input().split())))\nexit(3)", "wrong", "error"),
    "no Python": (SUMS, "print(", "wrong", "error"),
    "an input too many": (SUMS, "input(); input(); input()", "wrong", "error"),
    "helpers": (
        SUMS,
        "import collections, functools, heapq, itertools, math, re, threading, subprocess, multiprocessing, asyncio, random\n"
        "from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor\n"
        "numbers = [int(n) for n in input().split()]\n"
        "with ProcessPoolExecutor(2) as pool: total = sum(pool.map(int, numbers))\n"
        "with ThreadPoolExecutor(2) as pool: assert sum(pool.map(int, numbers)) == total\n"
        "async def wait(): await asyncio.sleep(0)\n"
        "asyncio.run(wait())\n"
        "open('notes', 'w').write(str(total))\n"
        "print(subprocess.run(['cat', 'notes'], capture_output=True, text=True).stdout)",
        "right",
        None,
    ),
    "rotation": (
        ROTATE,
        "def rotate(a, k):\n    k = k % len(a) if a else 0\n    return a[-k:] + a[:-k] if k else a",
        "right",
        None,
    ),
    "rotation the other way": (
        ROTATE,
        "def rotate(a, k):\n    k = k % len(a) if a else 0\n    return a[k:] + a[:k]",
        "wrong",
        "differs",
    ),
    "rotation of tuples": (ROTATE, "def rotate(a, k): return tuple(a[-k:] + a[:-k])", "wrong", "differs"),
    "rotation that raises": (ROTATE, "def rotate(a, k):\n    k %= len(a)\n    return a[-k:] + a[:-k]", "wrong", "error"),
    "no function": (ROTATE, "def turn(a, k): return a", "wrong", "error"),
    "what it prints does not matter": (
        ROTATE,
        "print('[[\"value\", 1]]')\ndef rotate(a, k):\n    print(a)\n    return [a[(i - k) % len(a)] for i in range(len(a))]",
        "right",
        None,
    ),
    "a call": (
        {"function": "add", "cases": [{"args": [1, 2], "returns": 3}, {"kwargs": {"a": "x", "b": "y"}, "returns": "xy"}]},
        ADD,
        "right",
        None,
    ),
    "a call gone wrong": (
        {"function": "add", "cases": [{"args": [1, 2], "returns": 3}, {"args": [1, 1], "returns": 3}]},
        ADD,
        "wrong",
        "differs",
    ),
    "tuples as lists": (
        {"function": "pair", "cases": [{"args": [], "returns": [1, [2]]}]},
        "def pair(): return 1, (2,)",
        "right",
        None,
    ),
    "a guard is not entered": (
        {"function": "add", "cases": [{"args": [1, 2], "returns": 3}]},
        ADD + "\nif __name__ == '__main__': raise ValueError",
        "right",
        None,
    ),
    "columns": ({"inputs": ["1 2", "3 4"], "outputs": ["3", "7"]}, "print(sum(map(int, input().split())))", "right", None),
    "columns of lines": (
        {"inputs": [["1", "2"]], "outputs": [["3", "x"]]},
        "print(int(input()) + int(input()))\nprint('x')",
        "right",
        None,
    ),
    "columns of calls": ({"inputs": [[1, 2]], "outputs": [3], "fn_name": "add"}, ADD, "right", None),
    "a method": (
        {"inputs": [[1, 2]], "outputs": [3], "fn_name": "add"},
        "class Solution:\n    def add(self, a, b): return a + b",
        "right",
        None,
    ),
    "a big number": ({"asserts": ["assert power(10) == 2"]}, "def power(n): return 1 << 10 ** 5", "wrong", "differs"),
    "several kinds": (
        {"asserts": ["assert kinds() == ({1, 2}, {3: None, 'a': (True, b'x')}, 2.5, 1267650600228229401496703205376)"]},
        "def kinds(): return {2, 1}, {'a': (True, b'x'), 3: None}, 2.5, 2 ** 100",
        "right",
        None,
    ),
    "nearly": (
        {"asserts": ["import math\nassert math.isclose(third(), 1 / 3, rel_tol=1e-9)", "assert abs(third() - 1 / 3) < 1e-9"]},
        "def third(): return 2 / 6",
        "right",
        None,
    ),
    "not nearly": ({"asserts": ["assert abs(third() - 1 / 3) < 1e-9"]}, "def third(): return 0.33", "wrong", "differs"),
    "one through the other": (
        {"asserts": ["assert back(there('abc')) == 'abc' and there('abc') != 'abc'"]},
        "def there(t): return t[::-1]\nback = there",
        "right",
        None,
    ),
    "an object": (
        {"asserts": ["assert Stack([1, 2]).pop() == 2", "assert Stack([1]).items[0] == 1"]},
        "class Stack:\n    def __init__(self, items): self.items = items\n    def pop(self): return self.items.pop()",
        "right",
        None,
    ),
}
UNREADABLE = [
    "18",
    "{}",
    "[]",
    '{"stdin": []}',
    '{"stdin": [{"input": "1"}]}',
    '{"asserts": ["print(f(1))"]}',
    '{"asserts": ["assert 1 == 1"]}',
    '{"asserts": ["assert f(1) =="]}',
    '{"asserts": ["assert f(1) == EXPECTED"]}',
    '{"asserts": ["assert 2 ** f(1) == 4"]}',
    '{"asserts": ["assert f(1) == [x for x in [1]]"]}',
    '{"asserts": ["assert f(1) == 1", "f = lambda x: 1"]}',
    '{"function": "f(1) or g", "cases": [{"returns": 1}]}',
    '{"inputs": ["1"], "outputs": []}',
    '{"inputs": [1], "outputs": ["1"]}',
]


@needs_bubblewrap
@pytest.mark.parametrize(("problem", "program", "verdict", "reason"), CASES.values(), ids=CASES.keys())
def test_programs_are_judged_by_their_tests(problem, program, verdict, reason) -> None:
    (judgement,) = judgements([(json.dumps(problem), answer(program))], Sandbox())
    assert (judgement.verdict, judgement.reason) == (verdict, reason), judgement


@needs_bubblewrap
@pytest.mark.parametrize("reference", UNREADABLE)
def test_tests_that_cannot_be_read_give_no_verdict(reference) -> None:
    (judgement,) = judgements([(reference, answer("def f(x): return x"))], Sandbox())
    assert (judgement.verdict, judgement.reason) == ("none", "unreadable tests")


@needs_bubblewrap
def test_verdicts_keep_the_order_of_the_pairs() -> None:
    right, wrong = answer("print(sum(map(int, input().split())))"), answer("print(0)")
    sums = json.dumps(SUMS)
    pairs = [(sums, wrong), (sums, right), ("18", right), (sums, "no program"), (sums, right), (sums, wrong)]
    expected = ["wrong", "right", "none", "wrong", "right", "wrong"]
    for width in (1, 3):
        assert judge(pairs, Sandbox(parallel=width)) == expected
    assert judge([], Sandbox()) == []


@needs_bubblewrap
def test_the_failed_test_is_named() -> None:
    program = answer("def rotate(a, k): return a[-k:] + a[:-k]")
    assert judgements([(json.dumps(ROTATE), program)], Sandbox()) == [Judgement("right")]
    third = json.dumps({"asserts": [*ROTATE["asserts"], "assert rotate([1], 1) == [2]"]})
    assert judgements([(third, program)], Sandbox()) == [Judgement("wrong", "differs", "assert rotate([1], 1) == [2]")]
    outputs = json.dumps({"stdin": [{"input": "", "output": "3"}, {"input": "", "output": "4"}]})
    assert judgements([(outputs, answer("print(3)"))], Sandbox()) == [Judgement("wrong", "differs", "test 2")]


def slow(tests: int, seconds: float) -> tuple[str, str]:
    """A reference of many tests, and a program that is right and takes so long on each."""
    pairs = [{"input": str(n), "output": str(n)} for n in range(tests)]
    return json.dumps({"stdin": pairs}), answer(f"import time\ntime.sleep({seconds})\nprint(input())")


@needs_bubblewrap
def test_all_tests_of_an_answer_have_one_limit() -> None:
    """Each of 100 tests is within its own limit, and none is begun once the answer's is spent."""
    begun = time.monotonic()
    (judgement,) = judgements([slow(100, 0.4)], Sandbox(time_s=5.0, answer_s=1.0))
    assert (judgement.verdict, judgement.reason) == ("wrong", "answer time")
    assert judgement.detail.startswith(("test 2", "test 3"))  # the first takes 0.4 of its 1 s at least
    assert time.monotonic() - begun < 20
    assert judge([slow(3, 0.1)], Sandbox(time_s=5.0, answer_s=5.0)) == ["right"]


@needs_bubblewrap
def test_the_last_test_is_shortened_and_a_tests_own_limit_keeps_its_name() -> None:
    never = slow(1, 1000.0)
    values = (json.dumps({"asserts": ["assert f() == 1"]}), answer("import time\ndef f(): time.sleep(1000)"))
    begun = time.monotonic()
    short = Sandbox(time_s=100.0, answer_s=0.5)
    assert [j.reason for j in judgements([never, values], short)] == ["answer time", "answer time"]
    assert time.monotonic() - begun < 20
    assert [j.reason for j in judgements([never, values], Sandbox(time_s=0.5))] == ["time", "time"]


def test_what_was_run_before_counts_against_the_next_test(monkeypatch) -> None:
    left: list[float] = []

    def took(seconds: float):
        def run(_program: str, *, left_s: float, **_other: object) -> Ended:
            left.append(left_s)
            return Ended(b"0", "", None, 0, seconds)

        monkeypatch.setattr("stages.rewards.code.verifier.run", run)
        left.clear()

    pairs = json.dumps({"stdin": [{"input": "", "output": "0"}] * 100})
    settings = Sandbox(isolation="unsafe-none", time_s=10.0)
    took(9.0)
    expected = Judgement("wrong", "answer time", "test 8: not begun")
    assert judgements([(pairs, answer("print(0)"))], settings) == [expected]
    assert left == [60.0, 51.0, 42.0, 33.0, 24.0, 15.0, 6.0]
    took(0.5)
    assert judge([(pairs, answer("print(0)"))], settings) == ["right"]


def test_the_limit_of_an_answer_is_no_part_of_a_fingerprint_that_does_not_set_it() -> None:
    assert "answer_s" not in semantic(Sandbox())
    assert semantic(Sandbox(answer_s=60.0))["answer_s"] == 60.0
    assert (Sandbox(time_s=2.0).whole_s, Sandbox(answer_s=7.0).whole_s) == (12.0, 7.0)


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na\n```", "a\n"),
        ("```python\na\n```\nbetter:\n```py\nb\n\n c\n```\nwell", "b\n\n c\n"),
        ("  ```Python  \n  a\n  ```", "  a\n"),
        ("```python\na\n```\n```python\nb", "a\n"),
        ("```cpp\na\n```", None),
        ("```\na\n```", None),
        ("print(1)", None),
        ("```python\nx = '''\n```python\n'''\n```", "x = '''\n```python\n'''\n"),
    ],
)
def test_the_program_is_the_last_python_block(text, program) -> None:
    assert program_of(text) == program


def test_expected_results_are_not_asked_for() -> None:
    """What is sent into the sandbox is calls alone."""
    (check,) = read_asserts("assert f(1)[0] + abs(g('x').y) == 12345 and 'secret' in h()")
    assert check.asked == ("f(1)[0]", "g('x').y", "h()")
    assert check.holds([12344, -1, ["secret"]])
    assert not check.holds([12344, -1, []])
    assert not check.holds([12344, 2, ["secret"]])


def test_values_travel_and_methods_do_not() -> None:
    for value in [
        None,
        True,
        1,
        -(2**63),
        2**63,
        -(2**4000),
        1.5,
        float("inf"),
        "é\ud800",
        [1, [2]],
        (1, (2,)),
        {1, 2},
        {1: {"a": ()}},
        b"\0x",
    ]:
        back = decode(json.loads(json.dumps(encode(value))))
        assert (back, type(back)) == (value, type(value))

    class Sly(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    assert decode(encode(Sly(3))) != 4
    assert isinstance(decode(encode(object())), Opaque)
    assert decode(encode(object())) != decode(encode(object()))


@pytest.mark.parametrize(
    "value", [{"x": 1}, {}, {"int": "z"}, {"int": "f" * 10_001}, {"set": [[1]]}, {"dict": [[1]]}, {"tuple": 3}]
)
def test_what_is_no_value_is_refused(value) -> None:
    with pytest.raises((ValueError, TypeError)):
        decode(value)


@pytest.mark.parametrize(
    "text", ["assert f(1) << 3 == 8", "assert (lambda: 1)() == 1", "assert __import__", "x = 1", "", "assert f(1)\0"]
)
def test_other_asserts_are_refused(text) -> None:
    with pytest.raises(UnreadableTests):
        read_asserts(text)


def test_texts_are_not_multiplied() -> None:
    (check,) = read_asserts("assert f(1) * 10 == 'x'")
    with pytest.raises(TypeError):
        check.holds(["x" * 100])
