"""No answer has reasoning-gym's scorers do anything but compare; right answers and prose are not refused; memory ends."""

import ast
import json
import os
import random
import string
from itertools import product
from pathlib import Path

import pytest

from stages.contract.config import semantic
from stages.problems.episode import Problem
from stages.problems.gym import GymSource
from stages.problems.sources import load_problems
from stages.rewards import gym as scorer
from stages.rewards.answers.verifiers import Asked, judge
from stages.rewards.gym_guard import FORMULAS, LISTS, refused
from stages.rewards.score import Rewards
from stages.rewards.verifier_pool.pool import Limits, Worker
from tests.requirements import require

require("reasoning-gym", allow_module_level=True)

METADATA = {"numbers": [2, 3], "target": 6, "variable": "x", "integrand": "x", "valid_answers": []}
"""All that the scorers of the tasks that compute an answer read."""


def spelled(text):
    """A text that sympy's names give, without quotes, underscores in pairs, or a function of Python."""
    signs = {"(": "srepr(x)[6]", ")": "srepr(x)[-1]", "'": "srepr(x)[7]", ",": "srepr(x+y)[15]"}
    return "+".join(f"z{c}.name[1]" if c in string.ascii_letters else signs[c] for c in text)


MAKE = "open('made','w')"
ATTACKS = {
    "open": MAKE,
    "import": "__import__('os').mkdir('made')",
    "path": "__import__('pathlib').Path('made').touch()",
    "getattr": "getattr(__import__('os'), 'mkdir')('made')",
    "getattr chain": "getattr(getattr(getattr((), '__class__'), '__base__'), '__subclasses__')() and open('made', 'w')",
    "subclasses": "[c for c in ().__class__.__base__.__subclasses__() if c.__name__ == '_wrap_close'][0]"
    ".__init__.__globals__['mkdir']('made')",
    "builtins": "__builtins__['open']('made','w')",
    "globals": "sympify.__globals__['__builtins__']['open']('made','w')",
    "eval": f'eval("{MAKE}")',
    "exec": f'exec("{MAKE}")',
    "nested eval": "eval('eval(\"open(\\\\\\'made\\\\\\',\\\\\\'w\\\\\\')\")')",
    "compile": f"eval(compile(\"{MAKE}\", 'f', 'eval'))",
    "S": f'S("{MAKE}")',
    "sympify": f'sympify("{MAKE}")',
    "parse_expr": f'parse_expr("{MAKE}")',
    "nsimplify": f'nsimplify("{MAKE}")',
    "lambdify": f'lambdify((), "{MAKE}")()',
    "a quoted text": f'"{MAKE}"',
    "a quoted text in a list": f'["{MAKE}"]',
    "sin of a text": f'sin("{MAKE}")',
    "power of a text": f'1 + exp("{MAKE}")',
    "triple quotes": f'cos("""{MAKE}""")',
    "pieces": "cos('open' '(\"made\",' '\"w\")')",
    "no quotes": f"sin({spelled(MAKE)})",
    "characters": f"open({'+'.join(f'chr({ord(c)})' for c in 'made')}, chr(119))",
    "lambda": f"(lambda: {MAKE})()",
    "key": "min(['made'], key=lambda name: open(name, 'w').fileno())",
    "map": "list(map(open, ['made'], ['w']))",
    "in a list": "[open][0]('made','w')",
    "one of two": "(open if 1 else 0)('made','w')",
    "comprehension": f"[{MAKE} for i in [1]]",
    "walrus": f"(y := {MAKE})",
    "formatted": f'f"{{{MAKE}}}"',
    "look-alikes": "ｏｐｅｎ('made','w')",
    "look-alike underscores": "_＿import__('os').mkdir('made')",
    "a script letter": "𝓮val(\"open('made','w')\")",
    "lines": f"(\n1,\n{MAKE}\n)",
    "a comment": f"{MAKE} # 2 * 3",
    "a comment within": f"(2 * 3, # )\n{MAKE})",
    "white space": f" \t\n{MAKE}\n",
    "a line that goes on": f"{MAKE}\\\n\r\n",
    "a method": f"1 + {MAKE}.fileno()",
    "environment": "__import__('os').environ.update(MADE='1')",
    "putenv": "[__import__('os')][0].environ.setdefault('MADE', '1')",
    "statement": "import os; os.mkdir('made')",
    "from": "from os import mkdir\nmkdir('made')",
}
NEVER = {"statement", "from"}
"""What `eval` does not read: refused all the same."""


def gym_verdict(task, answer, reference="no such answer"):
    return scorer.score("?", reference, {**METADATA, "source_dataset": task}, answer)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Whether an attack has done what it wants to, since it was last asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MADE", raising=False)

    def look():
        path = Path("made")
        found = path.exists() or os.environ.pop("MADE", None) is not None
        if path.exists():
            path.rmdir() if path.is_dir() else path.unlink()
        return found

    return look


@pytest.mark.parametrize("task", sorted(FORMULAS | LISTS))
def test_no_attack_is_evaluated(task, made):
    for name, answer in ATTACKS.items():
        # A text that is one is nothing but data where no sympy reads it.
        assert refused(answer, task) or (task in LISTS and name.startswith("a quoted text")), name
        assert gym_verdict(task, answer) == "wrong", name
        assert not made(), name


@pytest.mark.filterwarnings("ignore")
def test_every_attack_would_succeed_without_the_guard(made, monkeypatch):
    monkeypatch.setattr(scorer, "refused", lambda answer, task: False)
    worked = {
        name
        for (name, answer), task in product(ATTACKS.items(), sorted(FORMULAS | LISTS))
        if gym_verdict(task, answer) == "wrong" and made()
    }
    assert set(ATTACKS) - worked == NEVER


def test_a_file_that_is_read_makes_no_answer_right(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("secret").write_text("5")
    answer = "eval(open('secret').read()) + 3 - 2"
    assert gym_verdict("countdown", answer) == "wrong"
    monkeypatch.setattr(scorer, "refused", lambda answer, task: False)
    assert gym_verdict("countdown", answer) == "right"


@pytest.mark.parametrize("name", sorted(set(ATTACKS) - {"a quoted text", "a quoted text in a list"}))
def test_an_attack_is_refused_where_nothing_is_computed_today(name):
    # What works by sympy's names alone looks like prose with brackets; none of these scorers would read it.
    assert refused(ATTACKS[name], "word_ladder") != (name == "no quotes")


@pytest.mark.parametrize(
    "answer",
    [
        "open the door", "import taxes (2020)", "import taxes", '["open", "the", "door"]', "(a) first", "door (b)", "f(x)",
        "sin(x)", "____", "the __init__ of", "S", "print", "eval", "lambda", '{"open": 1, "S": [2]}', "(x + 1)(x - 1)", "x",
        "open (the) door (slowly)", "if x then y", "1, 2, 3", "e.g. (this)", "U.S.A", "Yes, S(x) holds!", "pass", "-3.5", "",
        "P(A) (B)", "'",
    ],
)  # fmt: skip
def test_prose_is_not_refused(answer):
    assert not refused(answer, "word_ladder")


@pytest.mark.parametrize(
    "answer",
    ["x**2/2 + C", "sqrt(x)*log(x) - 2", "exp(-x)/3", "(1 + 2)*3", " 6 ", "-x**3*cos(x) + asin(x/2)", "1.5e3", "log(abs(x))"],
)
def test_a_formula_is_not_refused(answer):
    assert [task for task in FORMULAS if refused(answer, task)] == []


def test_a_formula_calls_known_functions_only():
    for answer in ("test()", "srepr(x)", "plot(x)", "preview(x)", "f(x)", "ones(9)", "sin(x)(x)", "log(x, evaluate=False)"):
        assert refused(answer, "simple_integration")


def test_a_board_and_a_list_are_not_refused():
    for answer in ("_ Q _ _\n_ _ _ Q", "0 1\n1 0", "[[0, 1], [1, 0]]", "1 -2", "ABCDE", '["A", "B"]', "[['_', 'Q']]"):
        assert [task for task in LISTS if refused(answer, task)] == []


def test_what_is_nested_too_deeply_is_refused():
    for answer in ("(" * 5000 + ")" * 5000, "-" * 100_000 + "1"):
        assert refused(answer, "countdown")


def test_what_eval_would_call_is_refused_however_it_is_written():
    rng = random.Random(0)
    parts = [
        *"()'\"#\n\r\\ \t1+*!\f\0.[],=`;:\u2028\x85\x1c\ufeff",
        "\\\n",
        "\r\n",
        "open",
        "sin(x)",
        "ｏpen",
        "x",
        "0.2",
        "lambda",
    ]
    calls = 0
    for _ in range(40_000):
        answer = rng.choice(["", "f()", "f()#", "(1,"]) + "".join(rng.choices(parts, k=rng.randint(1, 9)))
        try:
            tree = ast.parse(answer.lstrip(" \t"), mode="eval")
        except (SyntaxError, ValueError):
            continue
        if any(isinstance(node, ast.Call | ast.Attribute) for node in ast.walk(tree)):
            calls += 1
            assert refused(answer, "n_queens"), repr(answer)
    assert calls > 500


def test_other_right_answers_than_the_stored_one():
    assert gym_verdict("countdown", "3*2") == gym_verdict("simple_integration", "C + x*x/2") == "right"
    assert gym_verdict("puzzle24", "(4 + 4)*(1 + 2)") == "right"
    assert gym_verdict("polynomial_multiplication", "x*x - 1", "x**2 - 1") == "right"


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(FORMULAS))
def test_formulas_that_the_task_makes_are_right(task):
    for problem in load_problems(GymSource(task=task, count=50, seed=5), "problems"):
        given = problem.question, problem.answer, json.loads(problem.metadata)
        assert scorer.score(*given, problem.answer) == "right", problem.answer


# --- memory ---


def test_memory_is_limited_beside_what_is_loaded():
    worker = Worker("tests.rewards.reward_functions:hold", Limits(20.0, 60.0, 256 << 20))
    try:
        assert worker.ask([100]).value == 100
        assert worker.ask([400]).fault.startswith("MemoryError")
        assert worker.ask([100]).value == 100  # it goes on
    finally:
        worker.end()


def test_big_powers_and_repeats_end():
    rewards = Rewards(verifier="reasoning_gym", verify_timeout_s=1.5)
    problem = Problem("g:1", "?", "6", "gym", json.dumps({**METADATA, "source_dataset": "countdown"}))
    lists = Problem("g:2", "?", "6", "gym", json.dumps({**METADATA, "source_dataset": "spiral_matrix"}))
    huge = [
        Asked(problem, "9**9**9**9 * 2 + 3"),
        Asked(problem, "7**(10**9)"),
        Asked(lists, "[0]*10**10"),
        Asked(problem, "2*3"),
    ]
    found = judge(huge, rewards)
    assert found[-1] == "right" and "right" not in found[:-1]


def test_the_limit_of_memory_is_a_setting_that_changes_no_fingerprint():
    assert Rewards().limits().memory_bytes == 4 << 30
    assert Rewards(verify_memory_mb=0).limits().memory_bytes == 0
    assert semantic(Rewards(verify_memory_mb=64)) == semantic(Rewards()), "as the other limits of verifiers: execution"
