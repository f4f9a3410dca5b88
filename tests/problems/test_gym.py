"""Problems of reasoning-gym, and that each task's own answer is right by its own verifier."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import pytest
from pydantic import TypeAdapter

from stages.contract.errors import UserError
from stages.problems.gym import GymSource, gym_score, gym_tasks
from stages.problems.sources import MixtureSource, Part, ProblemSource, load_problem_set, load_problems
from stages.rewards.gym_guard import refused
from tests.conftest import ROOT
from tests.requirements import require

require("reasoning-gym", allow_module_level=True)

WITHOUT_ANSWER = {"boxnet", "rush_hour"}
"""Tasks that give no right answer, not even as an example."""
NO_TASK = {"composite"}
"""A mixture of other tasks: refused, `source: mixture` does that."""


def scored(problem, given):
    return gym_score(problem.question, problem.answer, json.loads(problem.metadata), given)


def test_a_task_gives_problems_with_what_its_verifier_reads():
    found = load_problems(GymSource(task="chain_sum", count=20, seed=3, settings={"min_terms": 2, "max_terms": 2}), "problems")
    assert len(found) == 20 and found[0].id == "chain_sum-3:1" and found[0].source == "chain_sum-3"
    for problem in found:
        left, sign, right = problem.question.rstrip("= ").split()[-3:]  # `… 68 - 23 =`
        assert int(problem.answer) == (int(left) + int(right) if sign == "+" else int(left) - int(right))
        assert json.loads(problem.metadata)["source_dataset"] == "chain_sum"
        assert scored(problem, problem.answer) == 1
        assert scored(problem, str(int(problem.answer) + 1)) < 1


def test_problems_depend_on_the_seed_alone():
    # The first draws from the global generator, the second goes through sets of texts.
    for task, count in (("list_functions", 12), ("ransom_note", 3)):
        first, again = (load_problems(GymSource(task=task, count=count, seed=1), "problems") for _ in range(2))
        assert first == again
    assert load_problems(GymSource(task=task, count=count, seed=2), "problems") != first


def test_tuples_come_back_as_tuples():
    (problem,) = load_problems(GymSource(task="rearc", count=1), "problems")
    assert json.loads(problem.metadata)["reasoning_gym"]["tuples"]
    assert scored(problem, problem.answer) == 1


def test_equal_questions_are_counted_and_a_mixture_takes_tasks():
    # Two different terms at most: 0 + 0 is asked again and again.
    few = GymSource(task="chain_sum", count=30, settings={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
    found = load_problem_set(few.model_copy(update={"count": 300}), "problems")
    assert found.refused["question asked before"] + len(found.problems) == 300
    leg = GymSource(task="leg_counting", count=30)
    mixed = load_problem_set(MixtureSource(parts=(Part(weight=1, problems=few), Part(weight=1, problems=leg)), count=20), "p")
    assert Counter(p.source for p in mixed.problems) == {"chain_sum-0": 10, "leg_counting-0": 10}
    assert all(p.metadata for p in mixed.problems)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"task": "chain_sums"}, r"problems\.task: reasoning-gym has no task `chain_sums`; did you mean `chain_sum`"),
        ({"task": "composite"}, "make a `mixture`"),
        (
            {"task": "chain_sum", "settings": {"min_term": 2}},
            r"problems\.settings: reasoning-gym's `chain_sum` refuses.*min_term",
        ),
        ({"task": "chain_sum", "settings": {"min_terms": 0}}, r"problems\.settings"),
    ],
)
def test_what_does_not_exist_is_refused_in_one_line(more, says):
    source = TypeAdapter(ProblemSource).validate_python({"source": "reasoning_gym", "count": 3, **more})
    with pytest.raises(UserError, match=says):
        load_problems(source, "problems")


def exact(expression):
    return eval(re.sub(r"\d+", r"Fraction(\g<0>)", expression))


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"operators": ["+", "-"], "allow_parentheses": False}, range(1)),
        ({"operators": ["+", "-", "*"]}, range(1)),
        # Each with answers that reasoning-gym 0.1.25 has wrong. When there are none, `_answers_wrongly` can go.
        ({"operators": ["+", "*"], "allow_parentheses": False}, range(50, 300)),
        ({"operators": ["/"], "allow_parentheses": False, "min_terms": 2, "max_terms": 2}, range(100, 400)),
        ({"operators": ["*", "/"]}, range(1, 40)),
    ],
)
def test_wrong_answers_of_basic_arithmetic_are_left_out(settings, wrong):
    source = GymSource(task="basic_arithmetic", count=400, seed=5, settings={"max_terms": 4, **settings})
    found = load_problem_set(source, "problems")
    assert found.problems
    assert all(exact(json.loads(p.metadata)["expression"]) == Fraction(p.answer) for p in found.problems)
    assert found.refused.get("reasoning-gym's answer is not what the expression gives", 0) in wrong


def test_a_missing_package_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match="`reasoning-gym` is not installed; in the clone: pip install"):
        load_problems(GymSource(task="chain_sum", count=3), "problems")


PRINT = """
import hashlib, sys
from stages.problems.gym import GymSource, _make
for task in sys.argv[1:]:
    print(task, hashlib.sha256(repr(list(_make(GymSource(task=task, count=2, seed=7), "p"))).encode()).hexdigest())
"""


@pytest.mark.slow
def test_every_task_gives_problems_whose_own_answer_is_right():
    tasks = [task for task in gym_tasks() if task not in NO_TASK]
    assert len(tasks) >= 105
    wrong = []
    for task in tasks:
        for problem in load_problems(GymSource(task=task, count=3, seed=11), "problems"):
            assert problem.question and problem.metadata
            if (problem.answer == "") != (task in WITHOUT_ANSWER):
                wrong.append((task, problem.id, "answer"))
            elif problem.answer and scored(problem, problem.answer) != 1:
                wrong.append((task, problem.id, scored(problem, problem.answer)))
            elif refused(problem.answer, task):
                wrong.append((task, problem.id, "refused"))
    assert wrong == []


@pytest.mark.slow
def test_every_task_gives_the_same_problems_in_every_process():
    tasks = [task for task in gym_tasks() if task not in NO_TASK]
    environment = os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": str(ROOT)}  # as where problems are made
    command = [sys.executable, "-c", PRINT, *tasks]
    told = [
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
        for _ in range(2)
    ]
    assert len(told[0]) == len(tasks)
    assert [a.split()[0] for a, b in zip(*told, strict=True) if a != b] == []
