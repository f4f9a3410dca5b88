"""Readers of data files: what users' files really look like is read, and what cannot be is named."""

import bz2
import decimal
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.contract.errors import UserError
from stages.problems.rows import Row, plain_values, read_rows
from stages.problems.sources import FileSource, load_problems

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
    with pytest.raises(UserError, match="two columns are named `answer`"):
        values(tmp_path / "a.csv")


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_csv_with_another_separator_is_refused_by_its_name(tmp_path: Path, separator: str, name: str) -> None:
    (tmp_path / "a.csv").write_text(f"question{separator}answer\n1+1{separator}2\n")
    with pytest.raises(UserError, match=f"a.csv: line 1: columns are separated by {name}, not by commas"):
        values(tmp_path / "a.csv")


def test_text_in_another_encoding_is_refused_with_the_one_to_use(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("question,answer\ncaf\u00e9,1\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"not UTF-8 text .* save it as UTF-8"):
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


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_text_files_are_decoded_by_their_byte_order_mark(tmp_path: Path, name: str, encoding: str) -> None:
    rows = [{"question": "2²+é?", "answer": "4"}, {"question": "行?", "answer": "1"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    table = "question,answer\r\n" + "".join(f"{row['question']},{row['answer']}\r\n" for row in rows)
    (tmp_path / name).write_bytes((table if name.endswith("csv") else lines).encode(encoding))
    assert values(tmp_path / name) == rows


@pytest.mark.parametrize("text", ['{"answer": 2, "answer": 5}', '{"a": {"answer": 2, "answer": 5}}'], ids=["row", "inside"])
def test_json_row_with_a_repeated_key_is_named_and_left_out(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.jsonl").write_text(f"{text}\n{LINES}")
    rows = list(read_rows(tmp_path / "a.jsonl"))
    assert rows[0] == Row(1, {}, "the key `answer` twice in one object")
    assert [row.values for row in rows[1:]] == ROWS


def test_json_list_with_a_repeated_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"answer": 2, "answer": 5}]')
    with pytest.raises(UserError, match="the key `answer` twice"):
        values(tmp_path / "a.json")


def test_parquet_column_named_twice_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["1+1"]), pa.array(["2"]), pa.array(["7"])], names=["question", "answer", "answer"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="two columns are named `answer`"):
        values(tmp_path / "a.parquet")


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
def test_floats_of_any_width_keep_the_digits_they_were_written_with(tmp_path: Path, kind: pa.DataType) -> None:
    """Widened as it is, the float32 0.1 would be the reference answer 0.10000000149011612."""
    column = pa.array(np.array([0.1, 2.5, -3.0, np.nan], dtype=kind.to_pandas_dtype()), kind)
    pq.write_table(pa.table({"answer": column, "other": ["a", "b", "c", "d"]}), tmp_path / "a.parquet")
    rows = values(tmp_path / "a.parquet")
    assert [row["answer"] for row in rows[:3]] == [0.1, 2.5, -3.0]
    assert rows[3]["answer"] != rows[3]["answer"]
    assert [row["other"] for row in rows] == ["a", "b", "c", "d"]


def test_parquet_texts_in_every_arrow_type_are_read(tmp_path: Path) -> None:
    texts = pa.array([row["question"] for row in ROWS])
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        column = texts.dictionary_encode() if pa.types.is_dictionary(kind) else texts.cast(kind)
        pq.write_table(pa.table({"question": column}), tmp_path / "a.parquet")
        assert [row["question"] for row in values(tmp_path / "a.parquet")] == texts.to_pylist(), kind


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (gzip.compress(LINES.encode()), "compressed with gzip"),
        (lzma.compress(LINES.encode()), "compressed with xz"),
        (bz2.compress(LINES.encode()), "compressed with bzip2"),
        (b"PK\x03\x04rest", "a ZIP archive or a spreadsheet"),
        (b"PAR1rest", "a parquet file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
    ],
    ids=["gzip", "xz", "bzip2", "zip", "parquet", "git lfs"],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_file_in_another_format_than_its_name_says_is_refused_by_what_it_is(
    tmp_path: Path, name: str, content: bytes, what: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=what):
        values(tmp_path / name)


def test_pointer_of_git_lfs_in_the_place_of_a_parquet_file_says_how_to_fetch_it(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match="git lfs pull"):
        values(tmp_path / "a.parquet")
