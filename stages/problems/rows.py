"""Rows of data files: each is a mapping of columns or the reason why it is not one, with its line number.

A file is read lazily, so that its first rows cost little. Whether a .json or .jsonl file holds a list or a row per line is seen
from its content: both endings are used for both.
"""

import codecs
import csv
import decimal
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.contract.errors import UserError
from stages.store.json_keys import RepeatedKey, unique_keys


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
        _check_format(path)
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise UserError(f"not {error.encoding.upper()} text ({error})", where=str(path), mend="save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot be read ({error})", where=str(path), mend="repair or replace the file") from error


def _row(number: int, value: Any) -> Row:
    return Row(number, value) if isinstance(value, dict) else Row(number, {}, "not a JSON object")


_SPACE = re.compile(r"[ \t\r\n]*")
_FORMATS = {
    b"\x1f\x8b": "compressed with gzip",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ\0": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"PK\x03\x04": "a ZIP archive or a spreadsheet",
    b"PAR1": "a parquet file",
    b"ARROW1": "an Arrow file",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself",
}
"""First bytes of a file -> what it is, whatever its name says."""
SEPARATORS = {"\t": "tabs", ";": "semicolons", "|": "bars"}
"""What other programs put between the columns of a CSV file."""
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte order mark -> encoding, the longer ones first."""


_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)


def _check_format(path: Path) -> None:
    """Raise UserError for a file in another format than its name says."""
    with path.open("rb") as file:
        start = file.read(32)
    for first, what in _FORMATS.items():
        if start.startswith(first) and not (first == b"PAR1" and path.suffix.lower() == ".parquet"):
            mend = "fetch it with `git lfs pull`" if "LFS" in what else f"unpack or convert it to one of {', '.join(READERS)}"
            raise UserError(f"this is {what}", where=str(path), mend=mend)


def _encoding(path: Path) -> str:
    """The encoding of a text file by its byte order mark, else UTF-8. Spreadsheets and PowerShell write UTF-16."""
    with path.open("rb") as file:
        start = file.read(4)
    return next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8-sig")


def _json(path: Path) -> Iterator[Row]:
    """A list of rows, or a row per line."""
    with path.open("rb") as file:
        start = file.read(1 << 16)
    if start.decode(json.detect_encoding(start), "replace").lstrip("\ufeff \t\r\n").startswith("["):
        return _list(path)
    if path.suffix.lower() != ".json" or _begins_with_lines(path):
        return _lines(path)
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error})", where=str(path), mend="fix the syntax there") from error
    raise UserError("not a list of rows", where=str(path), mend="put the rows into one JSON list, or one row on each line")


def _begins_with_lines(path: Path) -> bool:
    """Whether the first two lines with anything on them are a JSON object each; one object alone is a document."""
    objects = 0
    for line in _text_lines(path):
        if not line.strip():
            continue
        try:
            if not isinstance(json.loads(line), dict):
                return False
        except (ValueError, RecursionError):
            return False
        objects += 1
        if objects == 2:
            return True
    return False


def _text_lines(path: Path) -> Iterator[str | bytes]:
    """The lines of a file. Those of UTF-8 are bytes: decoded one by one, so that a bad one spoils only itself."""
    encoding = _encoding(path)
    if encoding == "utf-8-sig":
        with path.open("rb") as file:
            yield from file
    else:
        with path.open(encoding=encoding) as text:
            yield from text


def _lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_text_lines(path), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=unique_keys)
        except RepeatedKey as error:
            yield Row(number, {}, str(error))
        except (ValueError, RecursionError):
            yield Row(number, {}, "not JSON")
        else:
            yield _row(number, value)


def _list(path: Path) -> Iterator[Row]:
    """The rows of one JSON list, decoded one by one."""
    content = path.read_bytes()
    text = content.decode(json.detect_encoding(content), "surrogatepass").removeprefix("\ufeff")
    place = _after_space(text, _after_space(text, 0) + 1)  # behind the bracket
    number, more = 0, text[place : place + 1] != "]"
    try:
        while more:
            number += 1
            value, end = _DECODER.raw_decode(text, place)
            yield _row(number, value)
            end = _after_space(text, end)
            if text[end : end + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
            more = text[end] == ","
            place = _after_space(text, end + 1) if more else end
        if _after_space(text, place + 1) != len(text):
            raise json.JSONDecodeError("Extra data", text, place + 1)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error})", where=str(path), mend="fix the syntax there") from error


def _after_space(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    return match.end() if match else place


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # 131,072 characters by default: less than a long answer
    with path.open(encoding=_encoding(path), newline="") as file:
        # Strict: a quote that is never closed would swallow the rest of the file in silence.
        reader = csv.DictReader(file, strict=True)
        try:
            names = reader.fieldnames or ()
            _check_names(path, names)
            _check_separator(path, names)
            for values in reader:
                # More columns: a comma in a text that is not quoted has moved what comes after it.
                wrong = "more" if None in values else "fewer" if None in values.values() else ""
                fault = f"{wrong} columns than the head line" if wrong else ""
                yield Row(reader.line_num, {} if wrong else values, fault)
        except csv.Error as error:
            what = f"not CSV ({error})"
            raise UserError(what, where=f"{path}: line {reader.line_num}", mend="fix the quotes there") from error


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _check_names(path, file.schema_arrow.names)
            batches = file.iter_batches(batch_size=1024)
            rows = (row for batch in batches for row in _double(batch).to_pylist())
            for number, values in enumerate(rows, start=1):
                yield Row(number, plain_values(values))
    except (pa.ArrowException, ValueError, OverflowError) as error:  # not Arrow's: times that Python cannot say
        raise UserError(f"not a parquet file ({error})", where=str(path), mend="repair or replace the file") from error


def _check_names(path: Path, names: Iterable[str]) -> None:
    """Raise UserError when two columns of a file have one name."""
    names = list(names)
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        what = f"two columns are named `{twice[0]}`"
        raise UserError(what, where=str(path), mend="rename or remove one: the last would win")


def _check_separator(path: Path, names: Sequence[str]) -> None:
    """Raise UserError when the head line has one column, whose name has another separator in it."""
    if len(names) == 1 and (separator := next((mark for mark in SEPARATORS if mark in names[0]), "")):
        what = f"columns are separated by {SEPARATORS[separator]}, not by commas"
        raise UserError(what, where=f"{path}: line 1", mend="save it with commas, or as .jsonl")


def _double(batch: Any) -> Any:
    """The batch with its 16- and 32-bit floats as the doubles that are written alike: 0.1, not 0.10000000149011612."""
    import pyarrow as pa

    for place, field in enumerate(batch.schema):
        if pa.types.is_float32(field.type) or pa.types.is_float16(field.type):
            narrow = field.type.to_pandas_dtype()  # numpy's type, whose text is the shortest that reads as the same number
            column = [None if value is None else float(str(narrow(value))) for value in batch.column(place).to_pylist()]
            batch = batch.set_column(place, pa.field(field.name, pa.float64()), pa.array(column, pa.float64()))
    return batch


def columns_hint(wanted: Iterable[str], columns: Iterable[Any]) -> str:
    """A hint for columns that are not there: the nearest name that is, and all of them.

    >>> columns_hint(["anser"], {"question", "answer"})
    'did you mean `answer`? the columns are: answer, question'
    """
    present = sorted(map(str, columns))
    if not present:
        return "give it rows with these columns"
    close = [difflib.get_close_matches(name, present, n=1, cutoff=0.6) for name in wanted if name not in present]
    near = " and ".join(f"`{found[0]}`" for found in close if found)
    return (f"did you mean {near}? " if near else "") + f"the columns are: {', '.join(present)}"


def plain_values(values: dict[str, Any]) -> dict[str, Any]:
    """A row of Arrow's with its decimal numbers (decimal128) as those that JSON has.

    >>> plain_values({"a": decimal.Decimal("72.00"), "b": decimal.Decimal("0.25"), "c": "x"})
    {'a': 72, 'b': 0.25, 'c': 'x'}
    """
    return {name: _plain(value) if isinstance(value, decimal.Decimal) else value for name, value in values.items()}


def _plain(value: decimal.Decimal) -> int | float | str:
    """An integer where it is one, a float where one has the same digits, else its text."""
    if not value.is_finite():
        return float(value)
    if value == value.to_integral_value():
        return int(value)
    return float(value) if decimal.Decimal(repr(float(value))) == value else format(value, "f")


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
"""Ending of a file's name -> how its rows are read."""
