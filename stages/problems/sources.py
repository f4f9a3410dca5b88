"""Where problems come from: the toy, a file, a dataset on the Hugging Face hub, reasoning-gym, or a mixture of these.

Each source may name what judges its answers (`verifier`): a mixture can be of mathematics, programs and general prompts.

Rows that are no problem (not JSON, a column missing or empty, no answer marker) are refused, named by file and line, and
counted; a source of which none is left stops the run.
"""

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from stages.contract.config import Config, ExternalPath
from stages.contract.errors import UserError
from stages.problems.columns import Chosen, Columns, read_columns
from stages.problems.episode import Problem, ProblemVerifier
from stages.problems.gym import GymSource, gym_rows
from stages.problems.mixture import draw, shares_of
from stages.problems.pass_rate import keep_by_pass_rate
from stages.problems.rows import Row, columns_hint, plain_values, read_rows
from stages.problems.toy import ToySource, toy_problems

SHOWN = 5
"""Refused rows that are named one by one; the rest are counted."""


class FileSource(Columns):
    """Problems in a file: .jsonl, .json (a list), .csv (with a head line) or .parquet."""

    source: Literal["file"] = "file"
    """A file of the user's."""
    path: ExternalPath
    """The file; its content's digest is part of the fingerprint."""


class HubSource(Columns):
    """Problems in a dataset on the Hugging Face hub, read with the `datasets` library."""

    source: Literal["hub"] = "hub"
    """The Hugging Face hub."""
    name: str
    """Name of the dataset, such as `openai/gsm8k`."""
    config: str | None = None
    """Configuration of the dataset, such as `main`."""
    split: str = "train"
    """Split of the dataset."""
    revision: str | None = None
    """Commit, tag or branch; give a commit, because the fingerprint knows only this text, not the data."""


class Part(Config):
    """A source in a mixture."""

    weight: float = Field(gt=0)
    """Its share of the mixture, relative to the other parts' weights."""
    problems: Annotated[ToySource | FileSource | HubSource | GymSource, Field(discriminator="source")]
    """Where its problems come from."""


class MixtureSource(Config):
    """Several sources, each with its share. What is drawn depends on the seed and the parts alone."""

    source: Literal["mixture"] = "mixture"
    """Several sources."""
    parts: tuple[Part, ...] = Field(min_length=1)
    """The sources. A question that an earlier part has asked is left out of a later one."""
    count: int | None = Field(default=None, ge=1)
    """Problems in all; by default as many as the weights allow, none twice."""
    seed: int = Field(default=0, ge=0)
    """Which problems of each part are drawn, and their order."""


Plain = ToySource | FileSource | HubSource | GymSource
"""A source that is no mixture."""
ProblemSource = Annotated[ToySource | FileSource | HubSource | GymSource | MixtureSource, Field(discriminator="source")]


@dataclass(frozen=True)
class ProblemSet:
    """The problems of a source, and what was left out of it."""

    problems: list[Problem]
    refused: dict[str, int] = field(default_factory=dict)
    """Reason -> number of rows, such as `{"not JSON": 2, "question asked before": 1}`."""
    filtered: dict[str, int] = field(default_factory=dict)
    """Reason -> number of sound problems that a filter left out, such as `{"pass rate above 0.8": 31}`."""
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Of a mixture: its part -> problems drawn, problems there were."""

    def remarks(self, where: str) -> list[str]:
        """What to tell of a mixture's shares, and of what was left out, if anything was."""
        remarks = []
        if self.parts:
            shares = ", ".join(f"{drawn} of {size} × {name}" for name, (drawn, size) in self.parts.items())
            remarks.append(f"{where}: a mixture of {len(self.problems)} ({shares})")
        for what, counts in (("rows left out", self.refused), ("problems filtered out", self.filtered)):
            if counts:
                remarks.append(f"{where}: {sum(counts.values())} {what} ({_counted(counts)})")
        return remarks

    def report(self) -> dict[str, Any]:
        """The counts, for a stage's notes."""
        parts = {name: {"drawn": drawn, "of": size} for name, (drawn, size) in self.parts.items()}
        return {"problems": len(self.problems), "refused": self.refused, "filtered": self.filtered, "parts": parts}


def plain_sources(source: ProblemSource, where: str) -> Iterator[tuple[str, Plain]]:
    """The sources that a source is made of, each with its key: `problems.parts.0.problems`."""
    if isinstance(source, MixtureSource):
        for index, part in enumerate(source.parts):
            yield f"{where}.parts.{index}.problems", part.problems
    else:
        yield where, source


def verifiers_asked(*sources: ProblemSource) -> set[ProblemVerifier | None]:
    """What judges the answers to some sources' problems; None is the stage's own verifier."""
    return {plain.verifier for source in sources for _, plain in plain_sources(source, "")}


def unjudged_at(source: ProblemSource, where: str) -> str | None:
    """The key of the first source whose problems are unjudged, or None."""
    return next((key for key, plain in plain_sources(source, where) if plain.verifier == "unjudged"), None)


def load_problems(source: ProblemSource, where: str) -> list[Problem]:
    """The problems of a source, in their order; see `load_problem_set`."""
    return load_problem_set(source, where).problems


def load_problem_set(source: ProblemSource, where: str) -> ProblemSet:
    """The problems of a source, and the numbers of rows refused by reason, which are also warned of on stderr.

    `where` is the configuration's key that names the source. Raises UserError when the source cannot be read or nothing
    is left of it.
    """
    if isinstance(source, MixtureSource):
        return _mix(source, where)
    found = _load(source, where)
    if source.verifier is None:
        return found
    return replace(found, problems=[replace(problem, verifier=source.verifier) for problem in found.problems])


def _load(source: Plain, where: str) -> ProblemSet:
    if isinstance(source, ToySource):
        try:
            return ProblemSet(toy_problems(source))
        except ValueError as error:
            raise UserError(str(error), where=f"{where}.count", mend="ask for fewer, or for longer chains") from error
    if isinstance(source, GymSource):
        rows, stem = gym_rows(source, where), f"{source.task}-{source.seed}"
        return _select(source, rows, _made, place=f"reasoning-gym {source.task}", stem=stem, where=where)
    columns = source

    def read(row: Row, stem: str) -> tuple[Problem, str]:
        name, question, answer, fault = read_columns(row, columns)
        return Problem(f"{stem}:{name}", question, answer, stem), fault

    if isinstance(source, FileSource):
        path = Path(source.path)
        return _select(source, read_rows(path), read, place=str(path), stem=path.stem, where=where)
    return _select(source, _hub_rows(source, where), read, place=source.name, stem=source.name.split("/")[-1], where=where)


def _made(row: Row, stem: str) -> tuple[Problem, str]:
    values = {"question": "", "answer": "", "metadata": None, **row.values}
    return Problem(f"{stem}:{row.number}", values["question"], values["answer"], stem, values["metadata"]), row.fault


def _select(
    source: Chosen, rows: Iterable[Row], read: Callable[[Row, str], tuple[Problem, str]], *, place: str, stem: str, where: str
) -> ProblemSet:
    problems: dict[str, Problem] = {}
    names: set[str] = set()
    refused: dict[str, int] = {}
    columns: set[str] = set()
    for row in rows:
        columns |= row.values.keys()
        problem, fault = read(row, stem)
        if not fault and problem.question in problems:
            fault = "question asked before"
        if not fault and problem.id in names:
            fault = "id used before"
        if fault:
            if sum(refused.values()) < SHOWN:
                print(f"warning: {place}: line {row.number}: {fault}; the row is left out", file=sys.stderr)
            refused[fault] = refused.get(fault, 0) + 1
        else:
            problems[problem.question] = problem
            names.add(problem.id)
    total = sum(refused.values())
    if total > SHOWN:
        print(f"warning: {place}: {total} of {total + len(problems)} rows are left out", file=sys.stderr)
    if not problems:
        what = f"no problem is left of it ({_counted(refused) or 'no rows'})"
        named: tuple[str, ...] = ()
        if isinstance(source, Columns):
            named = source.questions if source.needs_no_answer else (*source.questions, source.answer)
            wanted = " and ".join(f"`{column}`" for column in named)
            what += f"; `{where}` wants the columns {wanted}"
        raise UserError(what, where=place, mend=columns_hint(named, columns))
    longest = source.longest_question
    ordered = [problem for problem in problems.values() if longest is None or len(problem.question) <= longest]
    filtered: dict[str, int] = {}
    if source.pass_rate is not None and ordered:
        ordered, filtered = keep_by_pass_rate(source.pass_rate, ordered, where)
        if not ordered:
            what = f"no problem has a pass rate in these bounds ({_counted(filtered)})"
            raise UserError(what, where=f"{where}.pass_rate", mend="widen `low` and `high`")
    if source.shuffle_seed is not None:
        random.Random(source.shuffle_seed).shuffle(ordered)
    end = None if source.limit is None else source.offset + source.limit
    chosen = ordered[source.offset : end]
    if not chosen:
        what = f"no problem is left: `offset` is {source.offset}, there are {len(ordered)}"
        if longest is not None:
            what += f" with questions of at most {longest} characters"
        raise UserError(what, where=f"{where}.offset", mend="make it smaller" if ordered else "raise `longest_question`")
    return ProblemSet(chosen, refused, filtered)


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} × {reason}" for reason, number in counts.items())


def _mix(source: MixtureSource, where: str) -> ProblemSet:
    asked: set[str] = set()
    pools: list[list[Problem]] = []
    refused: dict[str, int] = {}
    filtered: dict[str, int] = {}
    for index, part in enumerate(source.parts):
        found = load_problem_set(part.problems, f"{where}.parts.{index}.problems")
        fresh = [problem for problem in found.problems if problem.question not in asked]
        again = {"asked in an earlier part": len(found.problems) - len(fresh)} if len(fresh) < len(found.problems) else {}
        for counts, more in ((refused, found.refused), (filtered, found.filtered), (filtered, again)):
            counts.update({reason: counts.get(reason, 0) + number for reason, number in more.items()})
        asked.update(problem.question for problem in fresh)
        random.Random(f"mixture-{source.seed}-{index}").shuffle(fresh)
        pools.append(fresh)
    shares = shares_of([part.weight for part in source.parts], [len(pool) for pool in pools], source.count, where)
    drawn, parts = draw(pools, shares, source.seed)
    return ProblemSet(drawn, refused, filtered, parts)


def _hub_rows(source: HubSource, where: str) -> Iterator[Row]:
    import datasets
    import httpx

    try:
        rows: Any = datasets.load_dataset(source.name, source.config, split=source.split, revision=source.revision)
    except (OSError, ValueError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the hub's dataset `{source.name}` cannot be loaded ({reason})",
            where=f"{where}.name",
            mend="check name, config, split, revision and the network; offline, use `source: file` with a downloaded file",
        ) from error
    for number, values in enumerate(rows, start=1):
        yield Row(number, plain_values(dict(values)))
