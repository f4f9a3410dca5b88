"""Inputs that are data: problems in every format, documents to train on, recorded rollouts."""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

from stages.store.files import digest_files, digest_path
from tests.conftest import group_of
from tests.faults import damage
from tests.faults.input import Input, Read

ROWS = [
    {"question": f"What is {i} + 1, and é?", "answer": f"It is\nsoon #### {i + 1}", "more": i, "list": [i]} for i in range(6)
]


def _make_problems(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "p.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
    (folder / "p.json").write_text(json.dumps(ROWS, indent=1))
    quoted = "".join(f'"{r["question"]}","{r["answer"]}",{r["more"]}\n' for r in ROWS)
    (folder / "p.csv").write_text("question,answer,more\n" + quoted)
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "p.parquet", compression="zstd")


def _load_problems(folder: Path) -> Read:
    import pyarrow as pa

    from stages.problems.sources import FileSource, load_problem_set
    from stages.problems.templates import Template

    path = next(path for path in (folder / f"p.{ending}" for ending in ENDINGS) if path.exists())
    source = FileSource(path=str(path), answer_after="####")
    found = load_problem_set(source, "problems")
    assert found.problems
    if path.suffix == ".jsonl":  # every row is taken, or counted among the refused
        assert len(found.problems) + sum(found.refused.values()) == sum(bool(row.strip()) for row in path.open("rb"))
    for problem in found.problems:
        Template().render(problem.question).encode()
        for text in (problem.question, problem.answer):
            assert text.strip()
            assert text not in ("nan", "inf", "-inf", "None")
    assert len({problem.id for problem in found.problems}) == len(found.problems)
    pa.Table.from_pylist([dataclasses.asdict(problem) for problem in found.problems])
    " ".join(found.remarks("problems")).encode()
    return [dataclasses.astuple(problem) for problem in found.problems], digest_path(path)


ENDINGS = ("jsonl", "json", "csv", "parquet")


def problems(ending: str) -> Input:
    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            _make_problems(Path(temporary))
            shutil.copy(Path(temporary, f"p.{ending}"), folder)

    kinds = {"jsonl": damage.JSON, "json": damage.JSON, "csv": damage.TEXT, "parquet": damage.BYTES}[ending]
    return Input(make, _load_problems, {f"p.{ending}": kinds}, whole=False)


def make_dataset(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": f"{i}+1=", "completion": f"<think>é</think>{i + 1}", "accuracy": 1.0} for i in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")


def load_dataset(folder: Path) -> Read:
    from stages.supervised.documents import load_documents

    texts = load_documents(folder / "train.parquet")
    "".join(document.prompt + document.completion for document in texts).encode()
    return texts, digest_files(folder)


def make_rollouts(folder: Path) -> None:
    from stages.rollout.records import write_groups

    groups = [group_of(i, [1, 2, i], [[3, 1], [4, 5, i]], [1.0, 0.5], finishes=["stop", "length"]) for i in range(3)]
    groups[0].episodes[0].text = "<think>é</think>"
    groups[1].episodes[0].reward = None
    write_groups(folder / "chunk-00000.parquet", groups)


def load_rollouts(folder: Path) -> Read:
    from stages.rollout.records import read_groups

    return [dataclasses.asdict(group) for group in read_groups(folder / "chunk-00000.parquet")], None
