"""The stage `dataset`: the user's documents become what `curate` writes; rows that cannot be used are named and counted."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from stages.contract.config import external_paths, semantic, stage_inputs
from stages.contract.errors import UserError
from stages.kinds.dataset import KIND, DatasetConfig
from stages.problems.decontamination import Decontamination
from stages.problems.templates import Template
from stages.problems.toy import save_toy_tokenizer
from stages.store.folders import StageFolder
from stages.store.stage import Result, StageContext, StopRequest
from stages.supervised.documents import Document, load_documents


def make(folder: Path, path: Path, model: Path | None = None, **fields: object) -> Result:
    config = DatasetConfig(kind="dataset", path=str(path), **fields)  # type: ignore[arg-type]
    inputs = {"tokenizer": model} if model else {}
    return KIND.run(StageContext(config, StageFolder(folder), inputs, {}, StopRequest()))


def written(folder: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = pq.read_table(folder / "dataset/train.parquet").to_pylist()
    return rows


def lines(path: Path, rows: list[object]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_good_rows_are_kept_as_they_are_and_bad_ones_named_and_counted(tmp_path, capsys):
    path = lines(
        tmp_path / "mine.jsonl",
        [
            {"prompt": " Q: 1+1? A:", "completion": " 2\n", "problem_id": 7, "else": [1]},
            {"prompt": "no answer"},
            "not json",
            {"prompt": "x", "completion": "  "},
            {"prompt": "x", "completion": 5},
            {"prompt": "\ud800", "completion": "y"},
            {"prompt": "x", "completion": None},
            {"prompt": "x", "completion": "y"},
        ],
    )
    result = make(tmp_path / "stage", path)
    assert written(tmp_path / "stage") == [
        {"prompt": " Q: 1+1? A:", "completion": " 2\n", "problem_id": "7", "source": "mine", "row": 1},
        {"prompt": "x", "completion": "y", "problem_id": None, "source": "mine", "row": 8},
    ]
    assert result.metrics == {"documents": 2, "left_out": 6}
    refused = {
        "no column `completion`": 1,
        "not JSON": 1,
        "column `completion` is empty": 1,
        "column `completion` is no text": 2,
        "column `prompt` has half a character in it": 1,
    }
    assert result.notes["refused"] == refused
    assert json.loads((tmp_path / "stage/dataset/report.json").read_text())["refused"] == refused
    assert result.remarks[0].startswith("path: 6 rows left out (1 × no column `completion`, 1 × not JSON")
    said = capsys.readouterr().err.splitlines()
    assert f"{path}: line 3: not JSON; the row is left out" in said[1]
    assert len(said) == 6 and said[5].endswith("6 of 8 rows are left out")
    # It is what `sft` reads.
    assert load_documents(tmp_path / "stage/dataset/train.parquet") == [
        Document(" Q: 1+1? A:", " 2\n", "7"),
        Document("x", "y"),
    ]


def test_parquet_other_columns_and_a_limit(tmp_path):
    table = [{"in": f"p{n}", "out": f"c{n}", "of": f"problem {n // 2}"} for n in range(5)]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "mine.parquet")
    make(tmp_path / "stage", tmp_path / "mine.parquet", prompt="in", completion="out", problem="of", limit=3)
    found = [(row["prompt"], row["completion"], row["problem_id"]) for row in written(tmp_path / "stage")]
    assert found == [("p0", "c0", "problem 0"), ("p1", "c1", "problem 0"), ("p2", "c2", "problem 1")]


def test_questions_go_through_the_template(tmp_path):
    path = lines(tmp_path / "mine.jsonl", [{"question": "1+1?", "completion": "<think>so</think> 2"}])
    template = Template(open_thinking=True)
    make(tmp_path / "stage", path, question="question", template=template)
    row = written(tmp_path / "stage")[0]
    assert row["prompt"] == template.render("1+1?")
    assert str(row["prompt"]).endswith("Assistant: <think>")
    assert row["completion"] == "so</think> 2"  # the template has opened the thinking


def test_nothing_left_is_told_with_the_columns(tmp_path):
    path = lines(tmp_path / "mine.jsonl", [{"input": "a", "output": "b"}])
    with pytest.raises(
        UserError, match=r"no document is left of it \(1 × no column `prompt`\); the columns are: input, output"
    ):
        make(tmp_path / "stage", path)
    assert not (tmp_path / "stage/dataset").exists()


TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}{% endif %}"
    "<{{ m.role }}>{{ m.content.split('</think>')[-1] if m.role == 'assistant' and drop is defined else m.content }}<eos>\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def chat(tmp_path):
    folder = tmp_path / "chat"
    folder.mkdir()
    save_toy_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def message(role, content):
    return {"role": role, "content": content}


def test_conversations_are_rendered_and_only_the_last_answer_is_learned(tmp_path, chat):
    talk = [
        message("user", "1+1"),
        message("assistant", "2"),
        message("user", "2+2"),
        message("assistant", "<think>d</think>4"),
    ]
    rows = [
        {"messages": talk, "problem_id": "a"},
        {"messages": talk[:3]},
        {"messages": [talk[0], message("system", "s"), talk[1]]},
        {"messages": "hello"},
        {"messages": [talk[1]]},
        {"messages": [talk[0], {"role": "assistant"}]},
    ]
    result = make(tmp_path / "stage", lines(tmp_path / "mine.jsonl", rows), chat, tokenizer="base")
    row = written(tmp_path / "stage")[0]
    assert row["prompt"] == "<user>1+1<eos>\n<assistant>2<eos>\n<user>2+2<eos>\n<assistant>"
    assert row["completion"] == "<think>d</think>4"  # `sft` puts the end token there
    assert result.notes["refused"] == {
        "the last of several messages is not an answer of the assistant's": 2,
        "the chat template refuses it (system comes first)": 1,
        "no list of messages": 1,
        "a message without role or text": 1,
    }
    # The same from parquet, where a list of messages has types.
    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "mine.parquet")
    make(tmp_path / "again", tmp_path / "mine.parquet", chat, tokenizer="base")
    assert written(tmp_path / "again") == written(tmp_path / "stage")


def test_a_template_that_drops_the_thinking_is_refused(tmp_path, chat):
    tokenizer = AutoTokenizer.from_pretrained(chat)
    tokenizer.chat_template = "{% set drop = 1 %}" + TEMPLATE
    tokenizer.save_pretrained(chat)
    path = lines(tmp_path / "m.jsonl", [{"messages": [message("user", "1"), message("assistant", "<think>d</think>4")]}])
    with pytest.raises(UserError, match="the chat template leaves out a part of the answer"):
        make(tmp_path / "stage", path, chat, tokenizer="base")


def test_conversations_without_a_chat_template_are_a_mistake(tmp_path):
    save_toy_tokenizer(tmp_path / "plain")
    path = lines(tmp_path / "m.jsonl", [{"messages": [message("user", "1"), message("assistant", "2")]}])
    with pytest.raises(UserError, match="tokenizer: conversations need a chat template; set `tokenizer:`"):
        make(tmp_path / "stage", path)
    with pytest.raises(UserError, match="tokenizer: the model has no chat template"):
        make(tmp_path / "stage", path, tmp_path / "plain", tokenizer="base")


LONG = "A farmer with 12 cows and 31 hens sells 4 cows on Monday, then buys 9 hens: how many animals are his by then?"


def against(tmp_path):
    rows = [{"question": LONG, "answer": "48"}, {"question": "What is 3 + 5?", "answer": "8"}]
    return {"n": 13, "against": [{"source": "file", "path": str(lines(tmp_path / "test.jsonl", rows))}]}


def test_documents_whose_prompts_an_evaluation_asks_are_left_out_and_located(tmp_path, chat):
    part = f"Say: {' '.join(LONG.split()[1:16])} he bought, why?"
    answered = [{"prompt": part, "completion": f"{n}"} for n in range(12)]  # several answers to one question
    rows = [
        {"prompt": "<|user|>What is 3 + 5?<|end|><|assistant|>", "completion": "8"},
        "not json",
        *answered,
        {"messages": [message("system", "s"), message("user", "what is 3+5"), message("assistant", "8")]},
        {"messages": [message("user", "What is 3 - 5?"), message("assistant", f"I do not know. {LONG} What is 3 + 5?")]},
        {"prompt": "What is 3 + 51?", "completion": "54"},
    ]
    path = lines(tmp_path / "mine.jsonl", rows)
    result = make(tmp_path / "stage", path, chat, tokenizer="base", decontaminate=against(tmp_path))
    assert [row["row"] for row in written(tmp_path / "stage")] == [16, 17]  # what is learned is not searched
    assert result.metrics == {"documents": 2, "left_out": 1, "decontaminated": 14}
    told = result.notes["decontaminated"]
    assert told["n"] == 13
    places = {"mine:1": 2, "mine:15": 2} | {f"mine:{row}": 1 for row in range(3, 15)}
    found = {leak["problem"]: leak["found_in"] for leak in told["left_out"]}
    assert found == {row: f"evaluation: test:{number}" for row, number in places.items()}
    what = "path: 14 left out, because an evaluation asks them (14 × evaluation: test; the first: mine:1 is evaluation: test:2)"
    assert result.remarks == ["path: 1 rows left out (1 × not JSON)", what]
    plain = make(tmp_path / "plain", path, chat, tokenizer="base")
    assert (plain.metrics, len(plain.remarks)) == ({"documents": 16, "left_out": 1}, 1)
    lines(path, rows[:1])
    with pytest.raises(UserError, match=r"path: evaluations ask every problem \(mine:1 is evaluation: test:2"):
        make(tmp_path / "none", path, decontaminate=against(tmp_path))
    assert not (tmp_path / "none/dataset").exists()


def test_questions_are_looked_for_without_their_template_and_its_examples_are_told(tmp_path):
    rows = [{"question": q, "completion": "8"} for q in ("What is 3 + 5?", "What is 5 + 3?")]
    example = {"question": "what is 3+5", "thinking": "3 + 5 = 8", "answer": "8"}
    fields = {"question": "question", "template": {"examples": [example]}, "decontaminate": against(tmp_path)}
    result = make(tmp_path / "stage", lines(tmp_path / "mine.jsonl", rows), **fields)
    assert [row["row"] for row in written(tmp_path / "stage")] == [2]
    asked = "warning: worked example 1 is evaluation: test:2: the evaluation's question is shown with its answer"
    assert result.remarks[0] == asked and len(result.remarks) == 2
    assert result.notes["decontaminated"]["examples"][0]["found_in"] == "evaluation: test:2"


def test_decontamination_is_no_part_of_a_fingerprint_that_has_none():
    config = DatasetConfig(kind="dataset", path="x.jsonl")
    assert "decontaminate" not in semantic(config)
    assert semantic(config.model_copy(update={"decontaminate": Decontamination()})) != semantic(config)


def test_the_file_and_the_tokenizers_stage_are_inputs(tmp_path):
    config = DatasetConfig(kind="dataset", path="x.jsonl", tokenizer="base")
    assert external_paths(config) == {"path": "x.jsonl"}
    assert stage_inputs(config) == {"tokenizer": ("base", "model")}
    assert stage_inputs(DatasetConfig(kind="dataset", path="x.jsonl")) == {}
