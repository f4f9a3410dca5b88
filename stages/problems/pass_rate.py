"""Problems of the right difficulty: those whose pass rate, measured before, lies between two bounds.

A problem that is always or never solved gives a group whose advantages are all zero (GRPO learns nothing from it). DAPO drops
such groups while it trains (`max_resamples`); this leaves them out before, with rates from a file or from the answers that an
earlier stage sampled (curate, evaluate, rl).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from stages.contract.config import Config, ExternalPath
from stages.contract.errors import UserError
from stages.problems.episode import Problem
from stages.problems.rows import read_rows


class PassRate(Config):
    """Which measured pass rates are kept."""

    path: ExternalPath
    """Where the rates stand: the `rollouts` folder of a finished stage (right answers among those with a verdict), or a file
    (.parquet, .jsonl, .json, .csv) with a row per problem, named by its question or, without that column, by its id."""
    low: float = Field(ge=0, le=1)
    """Lowest pass rate kept."""
    high: float = Field(ge=0, le=1)
    """Highest pass rate kept."""
    unmeasured: Literal["leave_out", "keep"] = "leave_out"
    """What happens to problems of which no rate is known."""
    question: str = "question"
    """The file's column with the question, as it stands in the source."""
    id: str = "problem_id"
    """The file's column with the problem's id (`gsm8k_train:17`), used when it has no question."""
    rate: str = "pass_rate"
    """The file's column with the pass rate, from 0 to 1; of several rows about a problem the mean counts."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError("low is larger than high")
        return self


def keep_by_pass_rate(chosen: PassRate, problems: Iterable[Problem], where: str) -> tuple[list[Problem], dict[str, int]]:
    """The problems to keep, in their order, and how many were left out by reason.

    Raises UserError when the rates cannot be read, or are about none of the problems.
    """
    by_question, by_id = _rates(chosen)
    kept, left_out = list[Problem](), dict[str, int]()
    measured = 0
    for problem in problems:
        rate = by_question.get(problem.question, by_id.get(problem.id))
        measured += rate is not None
        if rate is None and chosen.unmeasured == "keep":
            reason = ""
        elif rate is None:
            reason = "pass rate unknown"
        elif rate < chosen.low:
            reason = f"pass rate below {chosen.low:g}"
        else:
            reason = f"pass rate above {chosen.high:g}" if rate > chosen.high else ""
        if reason:
            left_out[reason] = left_out.get(reason, 0) + 1
        else:
            kept.append(problem)
    if not measured:
        what = f"none of the {len(by_question) + len(by_id)} problems with a pass rate is one of the source's"
        raise UserError(what, where=f"{where}.pass_rate.path", mend="name rates that were measured on these problems")
    return kept, left_out


def _rates(chosen: PassRate) -> tuple[dict[str, float], dict[str, float]]:
    """Question -> rate, and id -> rate for what has no question."""
    sums: dict[tuple[str, str], list[float]] = defaultdict(list)
    path = Path(chosen.path)
    for kind, name, rate in _judged(path) if path.is_dir() else _measured(path, chosen):
        sums[kind, name].append(rate)
    means = {key: sum(rates) / len(rates) for key, rates in sums.items()}
    found = ({name: rate for (k, name), rate in means.items() if k == kind} for kind in ("question", "id"))
    return next(found), next(found)


def _judged(folder: Path) -> Iterator[tuple[str, str, float]]:
    """1 or 0 for every answer with a verdict below a folder of rollouts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(folder.glob("*.parquet"))
    if not files:
        inside = folder / "rollouts"
        mend = f"name {inside}" if inside.is_dir() else "name a stage's `rollouts` folder, or a file"
        raise UserError("no .parquet file in this folder", where=str(folder), mend=mend)
    judged = False
    for file in files:
        try:
            table = pq.read_table(file, columns=["question", "verdict"])
        except (OSError, ValueError, pa.ArrowException) as error:
            what = f"these are no sampled answers ({error})"
            raise UserError(what, where=str(file), mend="name a stage's `rollouts` folder") from error
        for row in table.to_pylist():
            if row["verdict"] in ("right", "wrong"):
                judged = True
                yield "question", row["question"], float(row["verdict"] == "right")
    if not judged:
        raise UserError("no answer here has a verdict", where=str(folder), mend="name the rollouts of a stage that judges them")


def _measured(path: Path, chosen: PassRate) -> Iterator[tuple[str, str, float]]:
    for row in read_rows(path):
        where = f"{path}: line {row.number}"
        if row.fault:
            raise UserError(row.fault, where=where, mend="mend the row: a rate that is lost would drop its problem in silence")
        kind = "question" if chosen.question in row.values else "id"
        name: Any = row.values.get(chosen.question if kind == "question" else chosen.id)
        if not isinstance(name, str | int) or name == "":
            columns = f"`{chosen.question}` or `{chosen.id}`"
            what, mend = f"no problem is named in {columns}", f"the columns are: {', '.join(sorted(map(str, row.values)))}"
            raise UserError(what, where=where, mend=mend)
        try:
            rate = float(row.values.get(chosen.rate))  # type: ignore[arg-type]
        except (TypeError, ValueError):
            rate = -1.0
        if not 0 <= rate <= 1:
            what = f"no rate from 0 to 1 in column `{chosen.rate}`"
            raise UserError(what, where=where, mend="set `pass_rate.rate` to the column that has it")
        yield kind, str(name).strip() if kind == "question" else str(name), rate
