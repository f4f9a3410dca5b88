"""The questions that a recipe's evaluations ask, for the stages that must not train on them."""

from collections.abc import Iterator, Mapping, Sequence

from stages.contract.config import StageConfig
from stages.contract.errors import UserError
from stages.evals.settings import EvaluationConfig
from stages.problems.decontamination import Cleaned, Decontaminated, without_leaks
from stages.problems.episode import Problem
from stages.problems.sources import load_problem_set
from stages.problems.templates import Example


def told_the_evaluations(stages: Mapping[str, StageConfig]) -> dict[str, StageConfig]:
    """The stages, those that decontaminate told what all `evaluate` stages ask where their settings do not say it.

    So that their configuration alone decides what they leave out, and their fingerprint knows it.
    """
    evaluations = [config for config in stages.values() if isinstance(config, EvaluationConfig)]
    asked = {
        "against": tuple({config.held_out.model_dump_json(): config.held_out for config in evaluations}.values()),
        "tasks": tuple(dict.fromkeys(task for config in evaluations for task in config.tasks)),
        "task_files": tuple(dict.fromkeys(file for config in evaluations for file in config.task_files)),
    }
    told: dict[str, StageConfig] = {}
    for name, config in stages.items():
        settings = config.decontaminate if isinstance(config, Decontaminated) else None
        if settings is not None:
            unsaid = {field: value for field, value in asked.items() if getattr(settings, field) is None}
            config = config.model_copy(update={"decontaminate": settings.model_copy(update=unsaid)})
        told[name] = config
    return told


def decontaminated(
    config: Decontaminated,
    problems: list[Problem],
    held_out: Sequence[Problem] = (),
    examples: Sequence[Example] = (),
    where: str = "problems",
) -> Cleaned:
    """The problems that no evaluation asks; all of them where the settings ask for no decontamination.

    `held_out`: what the stage itself measures with; `examples`: the worked examples that it shows, which are told of and kept;
    `where`: the field that brings the problems. Raises UserError when an evaluation's questions cannot be read, or when
    evaluations ask every problem.
    """
    settings = config.decontaminate
    if settings is None:
        return Cleaned(problems, [], 0)
    asked = [
        (f"evaluation: {problem.id}", problem.question)
        for index, source in enumerate(settings.against or ())
        for problem in load_problem_set(source, f"decontaminate.against.{index}").problems
    ]
    asked += lm_eval_questions(settings.tasks or (), settings.task_files or ())
    asked += [(f"held_out: {problem.id}", problem.question) for problem in held_out]
    cleaned = without_leaks(problems, asked, settings.n, examples)
    if not cleaned.problems:
        what = f"evaluations ask every problem ({cleaned.leaks[0].problem} is {cleaned.leaks[0].found_in}, and so on)"
        raise UserError(what, where=where, mend="train on others than the evaluations ask")
    return cleaned


def lm_eval_questions(names: tuple[str, ...], files: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """`<task>: <number>` and text of every question of lm-eval's tasks.

    A prompt may have words of the task's own around the question, so that the longest field that stands in it is given too.
    """
    if not names and not files:
        return
    from lm_eval.tasks import TaskManager

    from stages.evals.task import datasets_cache, with_further

    with datasets_cache():
        loaded = with_further([], names, files, TaskManager(include_defaults=bool(names)))
        for name, task in loaded["tasks"].items():
            for number, document in enumerate(task.eval_docs, start=1):
                prompt = task.doc_to_text(document)
                if isinstance(prompt, str):  # a choice task may give the number of a choice
                    texts = [value for value in document.values() if isinstance(value, str) and value.strip() in prompt]
                    yield from ((f"{name}: {number}", text) for text in (max(texts, key=len, default=""), prompt) if text)
