"""Review by people: the answers go out as a file with an empty column `verdict`, and come back with it filled in.

The file is written once and never over. What counts is its columns `id` and `verdict`: an editor may change the order of the
rows, the white space in the texts, or the columns, without harm.
"""

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from stages.contract.errors import RESUME, UserError
from stages.contract.suggest import nearest
from stages.problems.rows import read_rows
from stages.store.files import digest_json, whole_folder

VERDICTS = {"accept": True, "accepted": True, "yes": True, "reject": False, "rejected": False, "no": False}
"""What may be written, in any case of letters -> whether the answer is kept."""
COLUMNS = ("id", "verdict", "problem_id", "question", "reference", "answer")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def review_id(problem_id: str, sample: int, text: str) -> str:
    """What identifies an answer: another text of the same sample is another one."""
    # The letter: a spreadsheet would take sixteen digits, or digits with an e among them, for a number.
    return "r" + digest_json([problem_id, sample, text])[:15]


def review_path(folder: Path, form: Literal["csv", "jsonl"]) -> Path:
    """The stage's review file: the one that is there, or the one to be written."""
    there = [path for path in (folder / "review.csv", folder / "review.jsonl") if path.exists()]
    if len(there) > 1:
        raise UserError("there are two review files", where=str(folder), mend="remove the one that is not filled in")
    return there[0] if there else folder / f"review.{form}"


def write_review(path: Path, rows: Iterable[dict[str, str]]) -> int:
    """Write the file so that it appears whole; each row has the columns but `verdict`. Returns their number."""
    count = 0
    errors = "backslashreplace"  # of what cannot be encoded: in JSON lines the escape means the same
    with (
        whole_folder(path.parent) as folder,
        (folder / path.name).open("w", encoding=_encoding(path), errors=errors, newline="") as file,
    ):
        writer = csv.DictWriter(file, COLUMNS)
        if path.suffix == ".csv":
            writer.writeheader()
        for row in ({"id": row["id"], "verdict": "", **row} for row in rows):
            count += 1
            if path.suffix == ".csv":
                writer.writerow({name: _harmless(text) for name, text in row.items()})
            else:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return count


def _encoding(path: Path) -> str:
    return "utf-8-sig" if path.suffix == ".csv" else "utf-8"  # without the mark Excel takes it for another encoding


def _harmless(text: str) -> str:
    """A spreadsheet would compute what begins like a formula; a model may write one."""
    return "'" + text if text.startswith(_FORMULA) else text


def read_verdicts(path: Path) -> dict[str, bool | None]:
    """Id -> whether the answer is accepted; None where nothing was written yet.

    Raises UserError, with the line, for a verdict that is none and for two verdicts on one answer.
    """
    csv.field_size_limit(sys.maxsize)  # answers are longer than the 131,072 characters that Python allows a field
    verdicts: dict[str, bool | None] = {}
    for number, identity, text in _rows(path):
        where = f"{path}: line {number}"
        if text and text not in VERDICTS:
            mend = f"{nearest(text, VERDICTS)}; write `accept` or `reject`"
            raise UserError(f"`{text}` is no verdict", where=where, mend=mend)
        verdict = VERDICTS[text] if text else None
        if verdicts.get(identity, verdict) != verdict:
            raise UserError(f"a second verdict on `{identity}`", where=where, mend="remove one of the two rows")
        verdicts[identity] = verdict
    return verdicts


def _rows(path: Path) -> Iterator[tuple[int, str, str]]:
    for row in read_rows(path):
        where = f"{path}: line {row.number}"
        identity, verdict = row.values.get("id"), row.values.get("verdict")
        if row.fault or "verdict" not in row.values or not isinstance(identity, str) or not isinstance(verdict, str | None):
            what = row.fault or "no text in the columns `id` and `verdict`"
            raise UserError(what, where=where, mend=f"the columns, with commas between them, are {', '.join(COLUMNS)}")
        yield row.number, identity.strip(), (verdict or "").strip().lower()


def review_needed(path: Path, missing: int, of: int) -> UserError:
    """What the stage ends with as long as verdicts are missing."""
    what = f"{missing} of {of} answers wait for a verdict"
    mend = f"write `accept` or `reject` into the column `verdict` of every row of this file, then go on with `{RESUME}`"
    return UserError(what, where=str(path), mend=mend)
