"""Rows of data files: each is a mapping of columns or the reason why it is not one, with its line number."""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.store.errors import UserError


@dataclass(frozen=True)
class Row:
    """One row of a file."""

    number: int
    """Its line (.jsonl, .csv) or its position from 1 (.json, .parquet)."""
    values: dict[str, Any]
    fault: str = ""
    """Why it could not be read; then it has no values."""


def read_rows(path: Path) -> Iterator[Row]:
    """Every row of a .jsonl, .json, .csv or .parquet file, in order; a row that cannot be read comes with its fault.

    Raises UserError when the file as a whole cannot be read.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"cannot read `{path.suffix}` files", where=str(path), mend=f"use one of {', '.join(READERS)}")
    if not path.is_file():
        raise UserError("no such file", where=str(path), mend="name one that exists")
    try:
        yield from reader(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read ({error})", where=str(path), mend="mend or replace the file") from error


def _row(number: int, value: Any) -> Row:
    return Row(number, value) if isinstance(value, dict) else Row(number, {}, "not a JSON object")


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:  # decoded line by line: one line in another encoding spoils only itself
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                yield Row(number, {}, "not JSON")
            else:
                yield _row(number, value)


def _json(path: Path) -> Iterator[Row]:
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error})", where=str(path), mend="mend the syntax there") from error
    if not isinstance(document, list):
        raise UserError("not a list of rows", where=str(path), mend="put the rows into one JSON list, or use .jsonl")
    for number, value in enumerate(document, start=1):
        yield _row(number, value)


def _csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        # Strict: a quote that is never closed would swallow the rest of the file in silence.
        reader = csv.DictReader(file, strict=True)
        try:
            for values in reader:
                # More columns: a comma in a text that is not quoted has moved what comes after it.
                wrong = "more" if None in values else "fewer" if None in values.values() else ""
                fault = f"{wrong} columns than the head line" if wrong else ""
                yield Row(reader.line_num, {} if wrong else values, fault)
        except csv.Error as error:
            what = f"not CSV ({error})"
            raise UserError(what, where=f"{path}: line {reader.line_num}", mend="mend the quotes there") from error


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=1024)
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, values in enumerate(rows, start=1):
                yield Row(number, values)
    except (pa.ArrowException, ValueError, OverflowError) as error:  # not Arrow's: times that Python cannot say
        raise UserError(f"not a parquet file ({error})", where=str(path), mend="mend or replace the file") from error


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
"""Ending of a file's name -> how its rows are read."""
