"""Where problems come from: the toy, a file of the user's, a dataset on the Hugging Face hub.

Rows that are no problem (not JSON, a column missing or empty, no answer marker) are refused, named by file and line, and
counted; a source of which none is left stops the run.
"""

import math
import random
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from stages.problems.episode import Problem
from stages.problems.rows import Row, read_rows
from stages.problems.toy import ToySource, toy_problems
from stages.store.config import Config, ExternalPath
from stages.store.errors import UserError

SHOWN = 5
"""Refused rows that are named one by one; the rest are counted."""


class Columns(Config):
    """Which columns of a row make a problem, and which problems are taken."""

    question: str = "question"
    """Column with the question."""
    answer: str = "answer"
    """Column with the reference answer."""
    answer_after: str | None = Field(default=None, min_length=1)
    """The reference answer is what follows the last occurrence of this text in the answer column; GSM8K: `####`."""
    offset: int = Field(default=0, ge=0)
    """Problems to leave out at the start (after shuffling)."""
    longest_question: int | None = Field(default=None, ge=1)
    """Characters of the longest question taken: short ones tend to be easy, and their prompts cost less. All by default."""
    limit: int | None = Field(default=None, ge=1)
    """At most so many problems; all by default."""
    shuffle_seed: int | None = Field(default=None, ge=0)
    """Shuffles the problems before `offset` and `limit`; by default they keep the file's order."""


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


ProblemSource = Annotated[ToySource | FileSource | HubSource, Field(discriminator="source")]


@dataclass(frozen=True)
class ProblemSet:
    """The problems of a source, and what was left out of it."""

    problems: list[Problem]
    refused: dict[str, int] = field(default_factory=dict)
    """Reason -> number of rows, such as `{"not JSON": 2, "question asked before": 1}`."""

    def remarks(self, where: str) -> list[str]:
        """What to tell of the rows left out, if any were."""
        counts = ", ".join(f"{number} × {reason}" for reason, number in self.refused.items())
        return [f"{where}: {sum(self.refused.values())} rows left out ({counts})"] if counts else []


def load_problems(source: ProblemSource, where: str) -> list[Problem]:
    """The problems of a source, in their order; see `load_problem_set`."""
    return load_problem_set(source, where).problems


def load_problem_set(source: ProblemSource, where: str) -> ProblemSet:
    """The problems of a source, and the numbers of rows refused by reason, which are also warned of on stderr.

    `where` is the configuration's key that names the source. Raises UserError when the source cannot be read or nothing
    is left of it.
    """
    if isinstance(source, ToySource):
        try:
            return ProblemSet(toy_problems(source))
        except ValueError as error:
            raise UserError(str(error), where=f"{where}.count", mend="ask for fewer, or for longer chains") from error
    if isinstance(source, FileSource):
        path = Path(source.path)
        return _select(source, read_rows(path), place=str(path), stem=path.stem, where=where)
    return _select(source, _hub_rows(source, where), place=source.name, stem=source.name.split("/")[-1], where=where)


def _select(source: FileSource | HubSource, rows: Iterable[Row], *, place: str, stem: str, where: str) -> ProblemSet:
    problems: dict[str, Problem] = {}
    refused: dict[str, int] = {}
    columns: set[str] = set()
    for row in rows:
        columns |= row.values.keys()
        question, answer, fault = _read(row, source)
        if not fault and question in problems:
            fault = "question asked before"
        if fault:
            if sum(refused.values()) < SHOWN:
                print(f"warning: {place}: line {row.number}: {fault}; the row is left out", file=sys.stderr)
            refused[fault] = refused.get(fault, 0) + 1
        else:
            problems[question] = Problem(f"{stem}:{row.number}", question, answer, stem)
    total = sum(refused.values())
    if total > SHOWN:
        print(f"warning: {place}: {total} of {total + len(problems)} rows are left out", file=sys.stderr)
    counts = ", ".join(f"{number} × {reason}" for reason, number in refused.items())
    if not problems:
        mend = f"the columns are: {', '.join(sorted(map(str, columns)))}" if columns else "give it rows with these columns"
        wanted = f"`{source.question}` and `{source.answer}`"
        what = f"no problem is left of it ({counts or 'no rows'}); `{where}` wants the columns {wanted}"
        raise UserError(what, where=place, mend=mend)
    longest = source.longest_question
    ordered = [problem for problem in problems.values() if longest is None or len(problem.question) <= longest]
    if source.shuffle_seed is not None:
        random.Random(source.shuffle_seed).shuffle(ordered)
    end = None if source.limit is None else source.offset + source.limit
    chosen = ordered[source.offset : end]
    if not chosen:
        what = f"no problem is left: `offset` is {source.offset}, there are {len(ordered)}"
        if longest is not None:
            what += f" with questions of at most {longest} characters"
        raise UserError(what, where=f"{where}.offset", mend="make it smaller" if ordered else "raise `longest_question`")
    return ProblemSet(chosen, refused)


def _read(row: Row, source: Columns) -> tuple[str, str, str]:
    """Question, answer, and the fault that makes them unusable (empty when there is none)."""
    if row.fault:
        return "", "", row.fault
    texts = []
    for column in (source.question, source.answer):
        value = row.values.get(column)
        if column not in row.values:
            return "", "", f"no column `{column}`"
        if isinstance(value, bool) or not isinstance(value, str | int | float | None):
            return "", "", f"column `{column}` is neither text nor number"
        if isinstance(value, float) and not math.isfinite(value):
            return "", "", f"column `{column}` is no finite number"
        text = "" if value is None else str(value).strip()
        if not text:
            return "", "", f"column `{column}` is empty"
        if any("\ud800" <= character <= "\udfff" for character in text):
            return "", "", f"column `{column}` has half a character in it"
        texts.append(text)
    question, answer = texts
    if source.answer_after is not None:
        _, found, after = answer.rpartition(source.answer_after)
        if not found:
            return "", "", f"no `{source.answer_after}` in column `{source.answer}`"
        # `$1,200` is how data sets write 1200; a comma that does not part thousands is kept.
        answer = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", after.replace("$", "")).strip()
        if not answer:
            return "", "", f"nothing after `{source.answer_after}` in column `{source.answer}`"
    return question, answer, ""


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
        yield Row(number, dict(values))
