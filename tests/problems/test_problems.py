import itertools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter, ValidationError

from stages.contract.errors import UserError
from stages.problems.episode import Episode, Problem
from stages.problems.sources import FileSource, ProblemSource, load_problem_set, load_problems
from stages.problems.templates import Example, Template
from stages.problems.toy import ToySource
from stages.rewards.score import Rewards, final_answer, score
from tests.requirements import needs

DATA = Path(__file__).parents[3] / "shared" / "data"


def episode(text: str, answer: str) -> Episode:
    return Episode(Problem("p:1", "q", answer, "p"), 0, "q", [1], [2], [0.0], text, "stop")


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def test_bad_rows_are_named_by_line_and_counted(tmp_path, capsys):
    path = jsonl(
        tmp_path / "bad.jsonl",
        {"question": "a", "answer": "work #### $1,200"},
        "{not json",
        {"question": "b"},
        {"question": "", "answer": "#### 1"},
        {"question": "c", "answer": "no marker"},
        {"question": "a", "answer": "#### 2"},
        {"question": "d", "answer": "#### "},
        [1],
        "",
        {"question": "e", "answer": "1 #### 2 #### 3"},
        {"question": "f", "answer": ["#### 3"]},
    )
    found = load_problem_set(FileSource(path=str(path), answer_after="####"), "problems")
    assert [(p.id, p.question, p.answer, p.source) for p in found.problems] == [
        ("bad:1", "a", "1200", "bad"),
        ("bad:10", "e", "3", "bad"),
    ]
    assert found.refused == {
        "not JSON": 1,
        "no column `answer`": 1,
        "column `question` is empty": 1,
        "no `####` in column `answer`": 1,
        "question asked before": 1,
        "nothing after `####` in column `answer`": 1,
        "not a JSON object": 1,
        "column `answer` is neither text nor number": 1,
    }
    told = capsys.readouterr().err.splitlines()
    assert f"{path}: line 2: not JSON" in told[0] and "line 3" in told[1]
    assert len(told) == 6 and "8 of 10 rows" in told[5]


def test_one_line_in_another_encoding_spoils_only_itself(tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(b'{"question": "a", "answer": 1}\n{"question": "\xe9", "answer": 2}\n')
    found = load_problem_set(FileSource(path=str(path)), "problems")
    assert [p.answer for p in found.problems] == ["1"] and found.refused == {"not JSON": 1}


def test_nothing_left_stops_with_the_columns_there_are(tmp_path):
    path = jsonl(tmp_path / "other.jsonl", {"problem": "a", "solution": "b"})
    with pytest.raises(UserError) as caught:
        load_problems(FileSource(path=str(path)), "stages.zero.problems")
    line = str(caught.value)
    assert str(path) in line and "1 × no column `question`" in line and "problem, solution" in line
    assert "stages.zero.problems" in line
    with pytest.raises(UserError, match="no problem is left"):
        load_problems(FileSource(path=str(jsonl(tmp_path / "empty.jsonl"))), "problems")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [("a.json", b"{", "not JSON"), ("a.json", b"{}", "not a list"), ("a.parquet", b"PAR", "not a parquet"),
     ("a.txt", b"", "cannot read `.txt`"), ("a.csv", b"question,answer\n\xff\xfe,1\n", "not UTF-8 text")],
)  # fmt: skip
def test_unreadable_files(tmp_path, name, content, what):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=what):
        load_problems(FileSource(path=str(tmp_path / name)), "problems")
    with pytest.raises(UserError, match="no such file"):
        load_problems(FileSource(path=str(tmp_path / "absent.jsonl")), "problems")


def test_every_format_gives_the_same_problems(tmp_path):
    rows = [{"q": f"question, {i}?", "a": str(i)} for i in range(7)]
    jsonl(tmp_path / "s.jsonl", *rows)
    (tmp_path / "s.json").write_text(json.dumps(rows))
    (tmp_path / "s.csv").write_text("q,a\n" + "".join(f'"{r["q"]}",{r["a"]}\n' for r in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "s.parquet")
    for ending in ("jsonl", "json", "csv", "parquet"):
        source = FileSource(path=str(tmp_path / f"s.{ending}"), question="q", answer="a", offset=1, limit=3)
        assert [(p.question, p.answer) for p in load_problems(source, "problems")] == [(r["q"], r["a"]) for r in rows[1:4]]


def test_shuffling_comes_before_offset_and_limit(tmp_path):
    path = str(jsonl(tmp_path / "s.jsonl", *({"question": f"q{i}", "answer": i} for i in range(20))))
    whole = load_problems(FileSource(path=path, shuffle_seed=3), "problems")
    part = load_problems(FileSource(path=path, shuffle_seed=3, offset=5, limit=4), "problems")
    assert part == whole[5:9] and whole != load_problems(FileSource(path=path), "problems")
    with pytest.raises(UserError, match="`offset` is 20"):
        load_problems(FileSource(path=path, offset=20), "problems")


def test_sources_are_told_apart():
    adapter = TypeAdapter(ProblemSource)
    assert adapter.validate_python({"source": "file", "path": "x"}).answer_after is None
    assert adapter.validate_python({"source": "hub", "name": "openai/gsm8k"}).split == "train"
    with pytest.raises(ValidationError, match="toy"):
        adapter.validate_python({"source": "disk"})
    with pytest.raises(UserError, match=r"problems\.count"):
        toy = ToySource(source="toy", count=200, operations_min=1, operations_max=1)
        load_problems(toy, "problems")


def test_templates():
    question = "What is {x} of <think>?"
    assert Template(name="question").render(question) == question
    assert Template(name="question", open_thinking=True).render(question) == question + "<think>"
    plain = Template().render(question)
    assert plain.endswith(f"answer here </answer>.\n\nUser: {question}\nAssistant:") and Template().opened == ""
    worked = Template(examples=(Example(question="1+1?", thinking="1 and 1", answer="2"),), open_thinking=True)
    assert worked.opened == "<think>"
    shown = "User: 1+1?\nAssistant: <think> 1 and 1 </think>\n<answer> 2 </answer>\n\nUser: 2+2?\nAssistant: <think>"
    assert worked.render("2+2?").endswith(shown)
    with pytest.raises(ValidationError, match="takes no examples"):
        Template(name="question", examples=worked.examples)


@needs("problem sets")
@pytest.mark.parametrize("verifier", ["numeric", "math"])
def test_gsm8k_references_judge_themselves_right_and_their_neighbours_wrong(verifier):
    problems = load_problems(FileSource(path=str(DATA / "gsm8k_test.jsonl"), answer_after="####"), "problems")
    assert len(problems) == 1319
    rewards = Rewards(verifier=verifier)
    own = [episode(f"<think>so</think><answer>{p.answer}</answer>", p.answer) for p in problems]
    score(rewards, own, max_tokens=64, key="")
    assert {(e.scored.verdict, e.scored.total) for e in own} == {("right", 2.0)}
    pairs = [(a, b) for a, b in itertools.pairwise(problems) if a.answer != b.answer]
    others = [episode(f"<think>so</think><answer>{b.answer}</answer>", a.answer) for a, b in pairs]
    score(rewards, others, max_tokens=64, key="")
    assert len(others) > 1200 and {e.scored.verdict for e in others} == {"wrong"}
    assert final_answer(own[0].text) == "18"


def test_only_short_questions_are_taken_when_asked_for(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"question": "q" * n, "answer": "1"}) + "\n" for n in (3, 9, 4, 5)))
    found = load_problems(FileSource(source="file", path=str(file), longest_question=4), "problems")
    assert [problem.question for problem in found] == ["qqq", "qqqq"]
    with pytest.raises(UserError, match="at most 2 characters; raise `longest_question`"):
        load_problems(FileSource(source="file", path=str(file), longest_question=2), "problems")
