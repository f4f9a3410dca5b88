"""Problems of reasoning-gym: procedural tasks by name, each with a verifier of its own (package `reasoning-gym`, optional).

A problem carries as `metadata` what that verifier reads: the entry's own metadata, in which `source_dataset` names the task
and `reasoning_gym` says its settings and where JSON has made lists of tuples. Some tasks have many right answers and give one
of them, or none (`boxnet`, `rush_hour`): then the reference answer is empty and only the verifier can tell.
"""

import ast
import contextlib
import copy
import importlib.util
import json
import operator
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, Literal

from pydantic import Field

from stages.contract.errors import ExitStatus, UserError
from stages.contract.suggest import nearest
from stages.problems.columns import Chosen
from stages.problems.rows import Row
from stages.store.user_code import child_environment

EXAMPLES = ("possible_answer", "example_answer", "example_correct_answer")
"""Where tasks of many right answers keep one of them."""
OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class GymSource(Chosen):
    """Problems of one reasoning-gym task, made as they are asked for."""

    source: Literal["reasoning_gym"] = "reasoning_gym"
    """reasoning-gym's procedural tasks."""
    task: str
    """Name of the task, such as `chain_sum`; of several make a `mixture`."""
    count: int = Field(ge=1)
    """Number of problems made; of equal questions the first stays."""
    seed: int = Field(default=0, ge=0)
    """Which problems are made. Many tasks make problem i from seed + i: seeds closer than `count` share problems."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """The task's own settings, such as `{min_terms: 2, max_terms: 4}`; its defaults for the rest."""


def gym_tasks() -> list[str]:
    """Names of the tasks that the installed version has.

    Raises UserError when the package is missing.
    """
    _check_installed("problems")
    return sorted(_factory().DATASETS)


def gym_rows(source: GymSource, where: str) -> Iterator[Row]:
    """A row per problem: question, answer, metadata.

    Some tasks go through sets of texts, whose order differs from process to process: they are made in a process of its own,
    whose order is fixed, so that every rank and every attempt has the same problems. Raises UserError when the package, the
    task or one of its settings does not exist.
    """
    _check_installed(where)
    done = subprocess.run(
        [sys.executable, "-m", "stages.problems.gym"],
        input=json.dumps({"source": source.model_dump(mode="json"), "where": where}),
        env={**child_environment(), "PYTHONHASHSEED": "0"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode == ExitStatus.MISTAKE:
        raise UserError(**json.loads(done.stdout))
    if done.returncode:
        raise ChildProcessError(f"reasoning-gym's `{source.task}` failed:\n{done.stderr[-4000:]}")
    for number, line in enumerate(done.stdout.splitlines(), start=1):
        values = json.loads(line)
        fault = values.pop("fault", "")
        yield Row(number, values, fault)


def _make(source: GymSource, where: str) -> Iterator[dict[str, str]]:
    """Every problem as JSON values, in the process made for it."""
    import numpy as np

    tasks = _factory().DATASETS
    if source.task not in tasks:
        raise UserError(f"reasoning-gym has no task `{source.task}`", where=f"{where}.task", mend=nearest(source.task, tasks))
    if source.task == "composite":
        raise UserError("`composite` is no task of its own", where=f"{where}.task", mend="make a `mixture` of its tasks")
    dataset = _dataset(source.task, {**source.settings, "seed": source.seed, "size": source.count}, where)
    for number in range(source.count):
        # A few tasks draw from the global generators.
        random.seed(f"reasoning-gym-{source.task}-{source.seed}-{number}")
        np.random.seed(random.getrandbits(32))
        try:
            entry = dataset[number]
        except ArithmeticError as error:
            yield {"fault": f"reasoning-gym fails to make it ({error})"}
            continue
        metadata = _metadata(source, entry)
        if _answers_wrongly(source.task, entry):
            yield {"fault": "reasoning-gym's answer is not what the expression gives"}
        elif metadata is None:
            yield {"fault": "the entry cannot be kept as JSON"}
        elif not str(entry["question"]).strip():
            yield {"fault": "the question is empty"}
        else:
            yield {"question": str(entry["question"]).rstrip(), "answer": reference(entry), "metadata": metadata}


def reference(entry: dict[str, Any]) -> str:
    """An entry's own answer, or the example that it gives, or nothing."""
    given = entry["answer"]
    if given is None:
        given = next((entry["metadata"][key] for key in EXAMPLES if entry["metadata"].get(key) is not None), "")
    return given if isinstance(given, str) else json.dumps(given)


def gym_score(question: str, answer: str, metadata: dict[str, Any], given: str) -> float:
    """What the task's own verifier gives an answer: 1 is right; some tasks give part of it for what is nearly right.

    `question`, `answer` and (read from JSON) `metadata` are a problem's, `given` is what is judged. Raises UserError when the
    package is missing.
    """
    _check_installed("metadata")
    # A copy: it is changed below, and some verifiers change what they are given.
    known = copy.deepcopy({key: value for key, value in metadata.items() if key != "reasoning_gym"})
    ours = metadata.get("reasoning_gym", {"settings": {}, "tuples": []})  # not there in items exported by reasoning-gym itself
    for path in sorted(ours["tuples"], key=len, reverse=True):  # the inner ones first: nothing in a tuple can be replaced
        place: Any = known
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = tuple(place[path[-1]])
    entry = {"question": question, "answer": answer, "metadata": known}
    return float(_dataset(known["source_dataset"], ours["settings"], "metadata").score_answer(given, entry))


def _check_installed(where: str) -> None:
    try:
        found = importlib.util.find_spec("reasoning_gym") is not None
    except ValueError:  # it was imported, and is no module
        found = False
    if not found:
        mend = "in the clone: pip install -c constraints.txt -e '.[reasoning-gym]'"
        raise UserError("the package `reasoning-gym` is not installed", where=where, mend=mend)


def _factory() -> Any:
    import reasoning_gym.factory

    return reasoning_gym.factory


def _dataset(task: str, settings: dict[str, Any], where: str) -> Any:
    try:
        return _factory().create_dataset(task, **settings)
    except (AssertionError, TypeError, ValueError) as error:  # how its configurations refuse
        what = f"reasoning-gym's `{task}` refuses its settings ({error})"
        raise UserError(what, where=f"{where}.settings", mend="see the task's configuration in reasoning-gym") from error


def _answers_wrongly(task: str, entry: dict[str, Any]) -> bool:
    """Whether `basic_arithmetic` gives another answer than its expression has (reasoning-gym 0.1.25).

    Without parentheses it computes from left to right (4 + 2 * 2 is 12) and divides by another number than it asks; with them
    quotients are rounded down on the way.
    """
    if task != "basic_arithmetic":
        return False
    try:
        return _exact(ast.parse(entry["metadata"]["expression"].strip(), mode="eval").body) != Fraction(entry["answer"])
    except ZeroDivisionError:
        return True


def _exact(node: ast.AST) -> Fraction:
    """The value of a sum, difference, product or quotient of integers, unrounded."""
    match node:
        case ast.Constant(value=int(number)):
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_exact(operand)
        case ast.BinOp(left=left, op=op, right=right):
            return OPERATORS[type(op)](_exact(left), _exact(right))
    raise ValueError(f"no arithmetic: {ast.dump(node)}")


def _metadata(source: GymSource, entry: dict[str, Any]) -> str | None:
    ours = {"settings": source.settings, "tuples": list(_tuples(entry["metadata"], []))}
    try:
        return json.dumps({**entry["metadata"], "source_dataset": source.task, "reasoning_gym": ours})
    except (TypeError, ValueError):
        return None


def _tuples(value: Any, path: list[Any]) -> Iterator[list[Any]]:
    if isinstance(value, tuple):
        yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _tuples(item, [*path, str(key)])  # as JSON has keys
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _tuples(item, [*path, number])


def main() -> int:
    """Read a source as JSON, write a line of JSON per problem, or what the user has to mend."""
    given = json.load(sys.stdin)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a task may print is none of the problems
            made = list(_make(GymSource.model_validate(given["source"]), given["where"]))
    except UserError as error:
        print(json.dumps({"what": error.what, "where": error.where, "mend": error.mend}))
        return ExitStatus.MISTAKE
    sys.stdout.writelines(json.dumps(values) + "\n" for values in made)
    return ExitStatus.DONE


if __name__ == "__main__":
    sys.exit(main())
