"""Sampled answers to read: models beside each other on the same problems, or what training began and ended with."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.report.evaluated import TEXTS, Model, answer_files, read_columns
from stages.report.facts import Run, Stage
from stages.report.text import shown

MOST_PROBLEMS = 6
"""Problems of an evaluation that are shown."""
MOST_MODELS = 8
"""Models whose answers are shown."""
MOST_TEXT = 2_000
"""Characters of an answer that are shown."""
SEARCHED = 256
"""Problems among which those to be shown are looked for: the first ones, so that few files are read."""


@dataclass(frozen=True)
class Answer:
    """One answer, as it is shown."""

    label: str
    verdict: str
    tokens: int
    cut: bool
    """Whether it was cut at the limit of tokens."""
    text: str


@dataclass
class Problem:
    """A problem and its answers."""

    question: str
    reference: str
    answers: list[Answer] = field(default_factory=list)


def beside_each_other(models: Sequence[Model], faults: list[str]) -> list[Problem]:
    """An answer of every model to the same problems: some that only the last one solves, one that it misses, one both solve."""
    models = [*models[:1], *models[1:][-(MOST_MODELS - 1) :]]
    chosen = _chosen(models)
    problems: dict[str, Problem] = {}
    for model in models:
        for problem, row in _rows(model.stage, chosen, faults).items():
            shared = problems.setdefault(problem, Problem(shown(row["question"], MOST_TEXT), shown(row["answer"], MOST_TEXT)))
            shared.answers.append(_answer(model.label, row))
    return [problems[problem] for problem in chosen if problem in problems]


def _chosen(models: Sequence[Model]) -> list[str]:
    """The first answers (number 0) are what is shown, so they decide."""
    first, last = models[0].right, models[-1].right
    searched = [problem for problem in first if problem in last][:SEARCHED]
    learned = [p for p in searched if last[p][0] and not first[p][0]]
    missed = [p for p in searched if not last[p][0]]
    known = [p for p in searched if last[p][0] and first[p][0]]
    chosen = learned[: MOST_PROBLEMS - 2] + missed[:1] + known[:1]
    chosen += [p for p in searched if p not in chosen][: MOST_PROBLEMS - len(chosen)]
    return chosen


def _rows(stage: Stage, wanted: Sequence[str], faults: list[str]) -> dict[str, dict[str, Any]]:
    """Problem -> the row of its first answer."""
    found: dict[str, dict[str, Any]] = {}
    for file in answer_files(stage):
        if len(found) == len(wanted):
            break
        left = [problem for problem in wanted if problem not in found]
        for row in read_columns(file, TEXTS, faults, left):
            if row["sample"] == 0 and row["verdict"] is not None:
                found.setdefault(row["problem_id"], row)
    return found


def _answer(label: str, row: dict[str, Any]) -> Answer:
    return Answer(label, row["verdict"], row["tokens"], row["finish"] == "length", shown(row["text"], MOST_TEXT))


def in_training(run: Run) -> list[tuple[str, list[Problem]]]:
    """Training stage -> right and wrong answers of its first and of its last step."""
    found = []
    for stage in run.stages:
        files = [file for file in answer_files(stage) if file.name.startswith("step-")] if stage.kind == "rl" else []
        problems = [p for file in dict.fromkeys([*files[:1], *files[-1:]]) for p in _of_step(file, run.faults)]
        if problems:
            found.append((stage.name, problems))
    return found


def _of_step(file: Any, faults: list[str]) -> list[Problem]:
    step = re.sub("[^0-9]", "", file.stem).lstrip("0")
    found: dict[str, Problem] = {}
    for row in read_columns(file, TEXTS, faults):
        if row["verdict"] in ("right", "wrong") and row["verdict"] not in found:
            problem = Problem(shown(row["question"], MOST_TEXT), shown(row["answer"], MOST_TEXT))
            problem.answers.append(_answer(f"step {step}", row))
            found[row["verdict"]] = problem
    return list(found.values())
