"""Readers of data files: what users' files really look like is read, and what cannot be is named."""

import decimal
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.problems.rows import Row, plain_values, read_rows
from stages.problems.sources import FileSource, load_problems
from stages.store.errors import UserError

ROWS = [{"question": f"{n}+1", "answer": str(n + 1)} for n in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def values(path: Path) -> list[dict[str, Any]]:
    return [row.values for row in read_rows(path)]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "A.JSON"])
@pytest.mark.parametrize(
    "text",
    [LINES, "\n\n" + LINES, json.dumps(ROWS), json.dumps(ROWS, indent=2), "\ufeff" + LINES, "\ufeff " + json.dumps(ROWS)],
    ids=["lines", "blank lines", "list", "indented list", "lines with BOM", "list with BOM"],
)
def test_json_rows_are_read_by_content_whatever_the_ending(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert values(tmp_path / name) == ROWS


def test_json_list_is_decoded_row_by_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS)[:-1] + ', {"cut')
    rows = read_rows(tmp_path / "a.json")
    assert [next(rows).values for _ in ROWS] == ROWS
    with pytest.raises(UserError, match="not JSON"):
        next(rows)


@pytest.mark.parametrize(("text", "numbers"), [("[]", []), (" [ ] ", []), ("[1, {}]", [1, 2])])
def test_json_list_edges(tmp_path: Path, text: str, numbers: list[int]) -> None:
    (tmp_path / "a.json").write_text(text)
    assert [row.number for row in read_rows(tmp_path / "a.json")] == numbers


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[1, 2", "not JSON"),
        ("[1] 2", "not JSON"),
        ("[1 2]", "not JSON"),
        ("[1,]", "not JSON"),
        ("", "not JSON"),
        ("[" * 5000 + "]" * 5000, "not JSON"),
        ('{"data": []}', "not a list of rows"),
        ('{\n "data": []\n}\n', "not a list of rows"),
        ("3\n4\n", "not JSON"),
    ],
)
def test_json_that_holds_no_rows_is_refused(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=what):
        values(tmp_path / "a.json")


def test_json_list_of_utf16_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(json.dumps(ROWS).encode("utf-16"))
    assert values(tmp_path / "a.json") == ROWS


def test_csv_field_longer_than_pythons_limit_is_read(tmp_path: Path) -> None:
    long = "x" * 200_000
    (tmp_path / "a.csv").write_text(f"question,answer\n1+1,{long}\n")
    assert values(tmp_path / "a.csv") == [{"question": "1+1", "answer": long}]


def test_csv_column_named_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("answer,question,answer\n1,2,3\n")
    with pytest.raises(UserError, match="names the column `answer` twice"):
        values(tmp_path / "a.csv")


@pytest.mark.parametrize("kind", [pa.decimal128(10, 2), pa.decimal256(70, 2)])
def test_decimal_column_is_a_number(tmp_path: Path, kind: pa.DataType) -> None:
    answers = pa.array([decimal.Decimal("72.00"), decimal.Decimal("0.25"), decimal.Decimal("-3.50")], kind)
    pq.write_table(pa.table({"question": ["a", "b", "c"], "answer": answers}), tmp_path / "a.parquet")
    problems = load_problems(FileSource(path=str(tmp_path / "a.parquet")), "problems")
    assert [problem.answer for problem in problems] == ["72", "0.25", "-3.5"]
    extracted = load_problems(FileSource(path=str(tmp_path / "a.parquet"), extract="number"), "problems")
    assert [problem.answer for problem in extracted] == ["72", "0.25", "-3.5"]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("1E+3", 1000),
        ("0.1", 0.1),
        ("0.1234567890123456789012345", "0.1234567890123456789012345"),
        ("9" * 60 + ".5", "9" * 60 + ".5"),
        ("9" * 60, int("9" * 60)),
    ],
)
def test_plain_values_keep_every_digit(text: str, plain: float | str) -> None:
    assert plain_values({"a": decimal.Decimal(text)}) == {"a": plain}


def test_rows_number_lines_of_a_json_lines_file_named_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(LINES + "\nbad\n")
    assert list(read_rows(tmp_path / "a.json"))[-1] == Row(5, {}, "not JSON")
