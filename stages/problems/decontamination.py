"""Training problems and documents that an evaluation asks are left out: what was trained on cannot be measured.

The R1 paper leaves out whatever shares 10 words in a row with an evaluation's question; the default here is 13, as is usual.
Only questions are compared, and of a document what is read, its prompt: an answer works out many short sums that are short
questions too. A worked example that an evaluation asks is told and stays, for the recipe's author chose it. A problem that was
paraphrased or translated is not found by this.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import Field

from stages.contract.config import ADDED, Config, StageConfig
from stages.problems.episode import Problem
from stages.problems.ngrams import Questions
from stages.problems.sources import ProblemSource
from stages.problems.task_files import TaskFile
from stages.problems.templates import Example


class Decontamination(Config):
    """Which questions are kept out, and what makes two questions the same."""

    n: int = Field(default=13, ge=3)
    """Words in a row that make two questions the same (GPT-3: 13, the R1 paper: 10). Shorter questions are compared whole."""
    against: tuple[ProblemSource, ...] | None = None
    """Sources whose questions are kept out; by default those of all the recipe's `evaluate` stages."""
    tasks: tuple[str, ...] | None = None
    """lm-eval tasks, by name, whose questions are kept out; by default those of all the recipe's `evaluate` stages."""
    task_files: tuple[TaskFile, ...] | None = None
    """lm-eval tasks, as YAML files, whose questions are kept out; by default those of all the recipe's `evaluate` stages."""


class Decontaminated(StageConfig):
    """What stages have that train on problems, or bring data for that."""

    decontaminate: Annotated[Decontamination | None, ADDED] = None
    """Leaves out problems, or documents by their prompts, that an evaluation asks, by n-grams; `{}` for the defaults. By
    default only problems held out word for word are left out."""


@dataclass(frozen=True)
class Leak:
    """A problem left out, and where it was found."""

    problem: str
    """Its id."""
    found_in: str
    """The evaluation's source and problem, such as `evaluation: gsm8k_test:17`."""
    words: str
    """The words that both have, or the whole question where it is short or parted otherwise."""


@dataclass(frozen=True)
class Cleaned:
    """Problems that no evaluation asks, and those that one does."""

    problems: list[Problem]
    leaks: list[Leak]
    n: int
    examples: list[Leak] = field(default_factory=list)
    """Worked examples that an evaluation asks."""

    def remarks(self, where: str) -> list[str]:
        """What to tell of what was left out, if anything was."""
        shown = "the evaluation's question is shown with its answer"
        told_first = [f"warning: {leak.problem} is {leak.found_in}: {shown}" for leak in self.examples]
        if not self.leaks:
            return told_first
        counts: dict[str, int] = {}
        for leak in self.leaks:
            source = leak.found_in.rpartition(":")[0]
            counts[source] = counts.get(source, 0) + 1
        told = ", ".join(f"{number} × {source}" for source, number in counts.items())
        first = self.leaks[0]
        example = f"the first: {first.problem} is {first.found_in}"
        left_out = f"{where}: {len(self.leaks)} left out, because an evaluation asks them ({told}; {example})"
        return [*told_first, left_out]

    def report(self) -> dict[str, Any]:
        """Every problem left out, for a stage's notes."""
        report = {"n": self.n, "left_out": [asdict(leak) for leak in self.leaks]}
        return report | ({"examples": [asdict(leak) for leak in self.examples]} if self.examples else {})


def without_leaks(
    problems: list[Problem], asked: Iterable[tuple[str, str]], n: int, examples: Sequence[Example] = ()
) -> Cleaned:
    """Leave out the problems whose question is found among those asked.

    `asked`: name (`evaluation: gsm8k_test:17`) and text of each evaluation's question. `examples`: the template's, which stay.
    """
    questions = Questions(n)
    for name, question in asked:
        questions.add(name, question)
    kept, leaks = list[Problem](), list[Leak]()
    for problem, found in zip(problems, questions.find([problem.question for problem in problems]), strict=True):
        if found is None:
            kept.append(problem)
        else:
            leaks.append(Leak(problem.id, found.name, found.words))
    shown = [
        Leak(f"worked example {number}", found.name, found.words)
        for number, found in enumerate(questions.find([example.question for example in examples]), start=1)
        if found is not None
    ]
    return Cleaned(kept, leaks, n, shown)
