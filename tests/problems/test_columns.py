"""Columns of real and made-up data sets -> problems."""

import json

import datasets
import pytest
from pydantic import ValidationError

from stages.contract.config import semantic
from stages.contract.errors import UserError
from stages.problems.columns import FORMATS, last_boxed
from stages.problems.sources import FileSource, HubSource, load_problem_set, load_problems
from tests.problems.test_problems import DATA, jsonl
from tests.requirements import needs

# Lines counted with `wc -l` (the MAWPS file's last has no end); MAWPS asks some questions several times.
REAL = [
    ("gsm8k_train", "gsm8k", 7473, 0, "72"),
    ("gsm8k_test", "gsm8k", 1319, 0, "18"),
    ("math500_test", "math", 500, 0, r"\left( 3, \frac{\pi}{2} \right)"),
    ("aime24_test", "aime", 30, 0, "204"),
    ("amc23_test", "amc", 40, 0, "27"),
    ("mawps_singleop", "mawps", 562, None, "14"),
]


@needs("problem sets")
@pytest.mark.parametrize(("name", "form", "lines", "repeated", "first"), REAL)
def test_every_real_file_loads_whole_with_its_ready_map(name, form, lines, repeated, first):
    path = DATA / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    found = load_problem_set(FileSource(path=str(path), format=form), "problems")
    if repeated is None:
        repeated = lines - len({row["input"] for row in rows})
        assert repeated > 0
    assert len(rows) == lines and len(found.problems) + repeated == lines
    assert found.refused == ({"question asked before": repeated} if repeated else {})
    assert found.problems[0].answer == first
    if form == "math":  # the file says itself what is in the boxes
        assert [p.answer.replace(" ", "") for p in found.problems] == [row["answer"].replace(" ", "") for row in rows]
    if form in ("gsm8k", "aime", "amc"):
        assert all(str(int(p.answer)) == p.answer for p in found.problems)


def test_svamp_asks_in_two_columns(tmp_path):
    rows = [
        {"ID": "chal-1", "Body": "Tom has 3 pens.", "Question": "How many pens are there?", "Equation": "", "Answer": 3.0},
        {"ID": "chal-2", "Body": "Ann ate half a pie.", "Question": "How much is left?", "Equation": "", "Answer": 0.5},
    ]
    (tmp_path / "SVAMP.json").write_text(json.dumps(rows))
    found = load_problems(FileSource(path=str(tmp_path / "SVAMP.json"), format="svamp", id="ID"), "problems")
    assert [(p.id, p.question, p.answer) for p in found] == [
        ("SVAMP:chal-1", "Tom has 3 pens. How many pens are there?", "3"),
        ("SVAMP:chal-2", "Ann ate half a pie. How much is left?", "0.5"),
    ]


def test_a_ready_map_is_its_values_and_each_can_be_set():
    named, spelled = FileSource(path="x", format="gsm8k"), FileSource(path="x", answer_after="####")
    assert semantic(named) == semantic(spelled)
    assert FileSource.model_validate(named.model_dump(mode="json")) == named
    mine = FileSource(path="x", format="math", answer="answer", extract=None)
    assert (mine.question, mine.answer, mine.extract) == ("problem", "answer", None)
    with pytest.raises(ValidationError, match="gsm8k"):
        FileSource(path="x", format="gsm9k")
    assert set(FORMATS) == {"gsm8k", "math", "aime", "amc", "mawps", "svamp"}


def test_what_came_later_is_no_part_of_a_fingerprint_until_it_is_used():
    before = {"source", "question", "answer", "answer_after", "offset", "longest_question", "limit", "shuffle_seed"}
    assert semantic(FileSource(path="x")).keys() == before
    assert semantic(FileSource(path="x", id="name")).keys() == before | {"id"}
    assert semantic(HubSource(name="x")).keys() == before | {"name", "config", "split", "revision"}


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"first \boxed{1}, then $\fbox{ 2 }$.", "2"),
        (r"\boxed 7.", "7"),
        (r"\boxed{\{1, 2\}} done", r"\{1, 2\}"),
        (r"\boxed{never closed", ""),
        (r"\boxedtext{3}", ""),
        ("no box", ""),
        (r"\boxed{}", ""),
    ],
)
def test_the_last_box(text, box):
    assert last_boxed(text) == box


def test_answers_by_pattern_by_number_and_what_has_none(tmp_path):
    rows = [
        {"question": f"q{i}", "answer": a} for i, a in enumerate(["The answer is (B)", "answer is (A), no: answer is (C)", "B"])
    ]
    path = str(jsonl(tmp_path / "p.jsonl", *rows))
    found = load_problem_set(FileSource(path=path, answer_pattern=r"answer is \((.)\)"), "problems")
    assert [p.answer for p in found.problems] == ["B", "C"]
    assert found.refused == {"no match of `answer_pattern` in column `answer`": 1}
    assert [p.answer for p in load_problems(FileSource(path=path, answer_pattern="[AB]"), "problems")] == ["B", "A", "B"]
    numbers = ["$1,234", 27.0, 0.25, 5, "-3", "2.50", "seven", 1e300, "1/2"]
    path = str(jsonl(tmp_path / "n.jsonl", *({"question": f"q{i}", "answer": a} for i, a in enumerate(numbers))))
    found = load_problem_set(FileSource(path=path, extract="number"), "problems")
    assert [p.answer for p in found.problems] == ["1234", "27", "0.25", "5", "-3", "2.5", str(int(1e300))]
    assert found.refused == {"no number in column `answer`": 2}
    with pytest.raises(ValidationError, match="only one can cut out"):
        FileSource(path=path, answer_after="####", extract="boxed")
    with pytest.raises(ValidationError, match="not a regular expression"):
        FileSource(path=path, answer_pattern="(")


def test_an_id_column_names_problems_and_no_two_the_same(tmp_path):
    rows = [{"question": f"q{i}", "answer": 1, "key": key} for i, key in enumerate(["a", 7, "a", None])]
    found = load_problem_set(FileSource(path=str(jsonl(tmp_path / "p.jsonl", *rows)), id="key"), "problems")
    assert [p.id for p in found.problems] == ["p:a", "p:7"]
    assert found.refused == {"id used before": 1, "column `key` is empty": 1}


def test_a_hub_dataset_has_the_same_maps(tmp_path):
    # `load_dataset` reads a folder as it reads a repository of the hub.
    rows = [{"question": f"How many are {i} and 1?", "answer": f"{i}+1={i + 1}\n#### {i + 1}"} for i in range(4)]
    folder = tmp_path / "mine"
    folder.mkdir()
    datasets.Dataset.from_list(rows).to_parquet(folder / "train-00000-of-00001.parquet")
    found = load_problems(HubSource(name=str(folder), format="gsm8k", offset=1), "problems")
    assert [(p.id, p.answer) for p in found] == [("mine:2", "2"), ("mine:3", "3"), ("mine:4", "4")]
    with pytest.raises(UserError, match="cannot be loaded"):
        load_problems(HubSource(name=str(tmp_path / "absent"), format="gsm8k"), "problems")
