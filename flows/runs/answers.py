"""Recorded answers of a stage as rows: which files, which of their answers, in which order. A live stage has whole files."""

import heapq
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.contract.errors import UserError
from stages.store.files import TEMPORARY

Row = dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """Which answers are asked for; None: all."""

    step: int | None = None
    """The number in a file's name: a step of training, a chunk of problems."""
    last: int | None = None
    """Of so many newest files."""
    verdict: str | None = None
    problem: str | None = None
    """A problem's id."""

    def files(self, folder: Path) -> list[Path]:
        """The files to read, the newest step first."""
        found = sorted(answer_files(folder), key=number_of, reverse=True)
        if self.step is not None:
            found = [path for path in found if number_of(path) == self.step]
        return found[: self.last]

    def fits(self, row: Row) -> bool:
        """Whether an answer is asked for."""
        right_verdict = self.verdict is None or row["verdict"] == self.verdict
        return right_verdict and (self.problem is None or row["problem_id"] == self.problem)


ORDERS: dict[str, Callable[[Row], float]] = {
    "reward": lambda row: -math.inf if row["reward"] is None else row["reward"],
    "length": lambda row: row["tokens"],
}
"""What `--sort` takes; the largest comes first."""


def answer_files(folder: Path) -> list[Path]:
    """The whole files of answers there."""
    return [path for path in folder.glob("*.parquet") if not path.name.startswith(TEMPORARY)]


def number_of(path: Path) -> int:
    """The step or chunk in a file's name: `step-000012.parquet` is 12."""
    found = re.search("([0-9]+)$", path.stem)
    return int(found[1]) if found else -1


def read_rows(files: Iterable[Path], wanted: Wanted, damaged: Callable[[UserError], None]) -> Iterator[Row]:
    """The answers of files, one file in memory at a time; `damaged` is told of a file that cannot be read, and it goes on."""
    for file in files:
        try:
            rows = rows_of(file)
        except UserError as error:
            damaged(error)
            continue
        yield from filter(wanted.fits, rows)


def first_rows(rows: Iterator[Row], order: str | None, limit: int) -> tuple[list[Row], bool]:
    """The first `limit` rows in that order (0: all; no order: as they come), and whether there are more."""
    if order is not None:
        key = ORDERS[order]
        found = heapq.nlargest(limit + 1, rows, key=key) if limit else sorted(rows, key=key, reverse=True)
    else:
        found = list(itertools.islice(rows, limit + 1 if limit else None))
    return (found[:limit], len(found) > limit) if limit else (found, False)


def rows_of(file: Path) -> list[Row]:
    """Every answer in a file.

    Raises UserError when it cannot be read, or is not what was written.
    """
    from stages.rollout.records import read_groups

    return [
        {
            "file": file.name,
            "step": number_of(file),
            "problem_id": group.problem.id,
            "source": group.problem.source,
            "question": group.problem.question,
            "reference": group.problem.answer,
            "sample": episode.sample,
            "prompt": episode.prompt,
            "text": episode.text,
            "tokens": len(episode.completion_ids),
            "finish": episode.finish,
            "reward": episode.reward.total if episode.reward else None,
            "verdict": episode.reward.verdict if episode.reward else None,
            "parts": episode.reward.parts if episode.reward else {},
            "mean_logprob": mean_logprob(episode.logprobs),
        }
        for group in read_groups(file)
        for episode in group.episodes
    ]


def mean_logprob(logprobs: list[float]) -> float | None:
    """Mean over the tokens (nats); None without tokens, or where a token had no probability at all."""
    mean = sum(logprobs) / len(logprobs) if logprobs else math.nan
    return mean if math.isfinite(mean) else None
