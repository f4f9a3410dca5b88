"""The first rows of a source of problems, read as a stage reads all of them: what is wrong with them shows before a run.

Small sources are read whole, so that filters, offsets and mixtures are looked at too.
"""

import contextlib
import io
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from stages.contract.errors import UserError
from stages.problems.columns import Columns, read_columns
from stages.problems.episode import Problem
from stages.problems.pass_rate import PassRate
from stages.problems.rows import Row, columns_hint, read_rows
from stages.problems.sources import FileSource, MixtureSource, Plain, ProblemSet, ProblemSource, load_problem_set
from stages.problems.toy import ToySource

SMALL_BYTES = 8 << 20
"""Files up to this size are read whole."""
SMALL_COUNT = 20_000
"""Problems of the toy that are made."""
ROWS = 1000
"""Rows of a larger file that are looked at, while none of them is a problem."""
SECONDS = 2.0
"""The longest that looking for one takes."""


def is_small(source: ProblemSource) -> bool:
    """Whether a source is read whole."""
    if isinstance(source, MixtureSource):
        return all(is_small(part.problems) for part in source.parts)
    if isinstance(source, ToySource):
        return source.count <= SMALL_COUNT
    return isinstance(source, FileSource) and _bytes(Path(source.path)) + _rates_bytes(source.pass_rate) <= SMALL_BYTES


def whole_set(source: ProblemSource, where: str) -> ProblemSet:
    """All problems of a small source; the rows that are left out are not printed. Raises UserError as the stage would."""
    with contextlib.redirect_stderr(io.StringIO()):
        return load_problem_set(source, where)


def first_problem(source: Plain, where: str) -> Problem | None:
    """The first problem of a file; None where its first rows do not tell, and for the hub's datasets and a task's generator.

    Raises UserError when a column is missing in all of the first rows, or the file cannot be read.
    """
    if not isinstance(source, FileSource):
        return None
    path = Path(source.path)
    names: set[str] = set()
    faults: dict[str, int] = {}
    for row in first_rows(path):
        names |= row.values.keys()
        name, question, answer, fault = read_columns(row, source)
        if not fault:
            return Problem(f"{path.stem}:{name}", question, answer, path.stem, verifier=source.verifier)
        faults[fault] = faults.get(fault, 0) + 1
    if not all(fault.startswith("no column") for fault in faults):
        return None  # later rows may be better
    wanted = columns_of(source)
    counted = ", ".join(f"{number} × {reason}" for reason, number in faults.items()) or "no rows"
    what = f"none of its first {sum(faults.values())} rows is a problem ({counted}); `{where}` wants the columns "
    raise UserError(what + " and ".join(f"`{name}`" for name in wanted), where=str(path), mend=columns_hint(wanted, names))


def columns_of(source: Columns) -> tuple[str, ...]:
    """The columns that a row must have."""
    return source.questions if source.needs_no_answer else (*source.questions, source.answer)


def first_rows(path: Path) -> Iterator[Row]:
    """At most `ROWS` rows, for at most `SECONDS`; at least one, if there is one."""
    end = time.monotonic() + SECONDS
    for row in islice(read_rows(path), ROWS):
        yield row
        if time.monotonic() > end:
            return


def _rates_bytes(rate: PassRate | None) -> int:
    return 0 if rate is None else _bytes(Path(rate.path))


def _bytes(path: Path) -> int:
    try:
        if path.is_file():
            return path.stat().st_size
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    except OSError:  # the reader will say so
        return 0
