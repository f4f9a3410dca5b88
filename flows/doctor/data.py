"""Data of the stages: problems, documents, worked examples, through the stages' own readers; prompts rendered."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flows.doctor.finding import Finding, mistake
from flows.doctor.scope import Scope
from stages.contract.config import StageConfig
from stages.contract.errors import UserError
from stages.curation.few_shot import load_examples
from stages.kinds.dataset import DatasetConfig, first_document
from stages.problems.first_rows import first_rows, whole_set
from stages.problems.gym import GymSource
from stages.problems.sources import ProblemSource, plain_sources

SOURCES = ("problems", "held_out")
"""Fields of stages that name problems."""


def examine_data(scope: Scope) -> Iterator[Finding]:
    """One finding for each stage with data, or for each mistake in them."""
    for name, config in scope.stages.items():
        if isinstance(config, DatasetConfig):
            yield _documents(scope, name, config)
        sources = {key: source for key in SOURCES if (source := getattr(config, key, None)) is not None}
        findings = [finding for key, source in sources.items() for finding in _problems(scope, name, key, source)]
        if not findings and len(sources) == len(SOURCES):
            findings += _all_held_out(scope, name, **sources)
        findings += _examples(scope, name, config)
        findings += _against(scope, name, config)
        if sources:
            yield from findings or [Finding(f"{name}: data", "ok", _counted(scope, name, sources), about="recipe")]


def first_of(scope: Scope, config: StageConfig) -> Any:
    """The first problem that a stage asks, None where none is known yet."""
    for key in SOURCES:
        source = getattr(config, key, None)
        try:
            found = None if source is None else scope.problems(source, key)
        except UserError:  # told by `examine_data`
            continue
        if found is not None:
            return found.problems[0]
    return None


def _problems(scope: Scope, name: str, key: str, source: ProblemSource) -> Iterator[Finding]:
    where = scope.where(name, key)
    for place, plain in plain_sources(source, where):
        if isinstance(plain, GymSource):
            yield from _gym(name, plain, place)
    try:
        scope.problems(source, key)
    except UserError as error:
        yield mistake(f"{name}: data", error, where)


def _gym(name: str, source: GymSource, where: str) -> Iterator[Finding]:
    """The task and its settings, by making one problem; a package that is missing is told with this machine's."""
    if importlib.util.find_spec("reasoning_gym") is None:
        return
    one = source.model_copy(update={"count": 1, "offset": 0, "limit": None, "pass_rate": None, "longest_question": None})
    try:
        whole_set(one, where)
    except UserError as error:
        yield mistake(f"{name}: data", error)
    except ChildProcessError as error:
        last = str(error).strip().splitlines()[-1]
        yield Finding(f"{name}: data", "fail", last, "check the task's `settings`", where, "recipe")


def _all_held_out(scope: Scope, name: str, problems: ProblemSource, held_out: ProblemSource) -> list[Finding]:
    if not (scope.is_whole(problems) and scope.is_whole(held_out)):
        return []
    some, others = scope.problems(problems, "problems"), scope.problems(held_out, "held_out")
    if some is None or others is None:
        return []
    kept_back = {problem.question for problem in others.problems}
    if any(problem.question not in kept_back for problem in some.problems):
        return []
    mend = "train on others than `held_out`"
    where = scope.where(name, "problems")
    return [Finding(f"{name}: data", "fail", "every problem is held out", mend, where, "recipe")]


def _examples(scope: Scope, name: str, config: Any) -> Iterator[Finding]:
    few_shot = getattr(config, "few_shot", None)
    if few_shot is None:
        return
    try:
        load_examples(few_shot)
    except UserError as error:
        yield mistake(f"{name}: worked examples", error, scope.where(name, "few_shot"))


def _against(scope: Scope, name: str, config: Any) -> Iterator[Finding]:
    """What is kept out of training by the recipe's own word; evaluations' sources are looked at with them."""
    settings = getattr(config, "decontaminate", None)
    for number, source in enumerate((settings.against or ()) if settings is not None else ()):
        yield from _problems(scope, name, f"decontaminate.against.{number}", source)


def _documents(scope: Scope, name: str, config: DatasetConfig) -> Finding:
    check = f"{name}: data"
    try:
        row = first_document(config, first_rows(Path(config.path)))
    except UserError as error:
        return mistake(check, error, scope.where(name, "path"))
    conversation = row.values.get(config.messages) is not None
    if conversation and config.tokenizer is None:
        mend = "set `tokenizer:` to a stage of kind `model` whose model has a chat template"
        where = scope.where(name, "tokenizer")
        return Finding(check, "fail", "conversations need a chat template", mend, where, "recipe")
    what = f"a conversation in column `{config.messages}`" if conversation else "a prompt and a completion"
    return Finding(check, "ok", f"line {row.number} of {Path(config.path).name} has {what}", about="recipe")


def _counted(scope: Scope, name: str, sources: dict[str, ProblemSource]) -> str:
    parts = []
    for key, source in sources.items():
        found = scope.problems(source, key)
        if found is None:
            parts.append(f"{key}: not read yet")
        elif scope.is_whole(source):
            parts.append(f"{key}: {len(found.problems):,}")
        else:
            parts.append(f"{key}: the first rows can be read")
    config: Any = scope.stages[name]
    problem = first_of(scope, config)
    template = getattr(config, "template", None)
    if problem is not None and template is not None:
        parts.append(f"a prompt has {len(template.render(problem.question)):,} characters")
    return ", ".join(parts)
