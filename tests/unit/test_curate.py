import json
from contextlib import nullcontext

import pyarrow.parquet as pq
import pytest

from stages.curation import sampled
from stages.curate import KIND, CurateConfig
from stages.problems.toy import ToySource, toy_problems
from stages.rollout.protocol import Completion
from stages.store.errors import Interrupted, UserError
from stages.store.folders import StageFolder
from stages.store.stage import StageContext, StopRequest
from stages.tracking.journal import read

TOY = {"source": "toy", "count": 8}
ANSWERS = {question.question: question.answer for question in toy_problems(ToySource(**TOY))}


class Scripted:
    """Sample 0 is right and long, 1 right and short, 2 in letters, 3 wrong; problems whose answer is 0 are never solved."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, prompt):
        return tuple(ord(c) for c in prompt)

    def sample(self, requests, sampling, *, seed, purpose, step, done=None):
        for number, r in enumerate(requests):
            done(number, self._answers("".join(map(chr, r.prompt_ids)).removesuffix("<think>")))

    def _answers(self, question):
        self.asked.append(question)
        right = ANSWERS[question] if ANSWERS[question] != "0" else "9"
        thoughts = [("1+1=2,2+1=3", right), ("1+1=2", right), ("b=c", right), ("1", "9")]
        texts = [f"{thought}</think><answer>{answer}</answer>" for thought, answer in thoughts]
        return [Completion(list(map(ord, t)), [0.0] * len(t), t, "stop") for t in texts]


@pytest.fixture
def rollout(monkeypatch):
    scripted = Scripted()
    monkeypatch.setattr(sampled, "opened", lambda context: nullcontext(scripted))
    return scripted


def context(folder, stop=None, **fields):
    given = {
        "kind": "curate", "sampler": "zero", "problems": TOY, "chunk": 3, "samples": 4,
        "template": {"name": "question", "open_thinking": True}, "filters": {"min_language": 1.0},
        "rewards": {"verifier": "exact", "language_target": "digits"},
    }  # fmt: skip
    config = CurateConfig.model_validate(given | fields)
    return StageContext(config, StageFolder(folder), {"sampler": folder}, {"sampler": "d1"}, stop or StopRequest())


def test_one_answer_per_problem_with_provenance(tmp_path, rollout):
    result = KIND.run(context(tmp_path))
    rows = pq.read_table(tmp_path / "dataset" / "train.parquet").to_pylist()
    solved = [question for question, answer in ANSWERS.items() if answer != "0"]
    assert 0 < len(solved) < 8 and [row["question"] for row in rows] == solved
    for row in rows:
        assert row["prompt"] == row["question"] + "<think>"
        assert row["completion"] == f"1+1=2</think><answer>{row['answer']}</answer>"
        assert (row["sample"], row["sampler_digest"], row["language"]) == (1, "d1", 1.0)
        assert row["problem_id"] == f"toy:{row['question']}" and row["filters"][:2] == ["finished", "correct"]
    unsolved = 8 - len(solved)
    assert result.notes["failed_first"] == {
        "finished": 0, "correct": 4 * unsolved + len(solved), "format": 0, "thinking": 0,
        "language": len(solved), "repetition": 0,
    }  # fmt: skip
    report = json.loads((tmp_path / "dataset" / "report.json").read_text())
    assert (report["kept"], report["sampled"]) == (len(solved), 32) and result.metrics["kept"] == len(solved)
    assert [(line.step, line.of) for line in read(tmp_path / "journal.jsonl")] == [(1, 3), (2, 3), (3, 3)]


def test_the_first_sampled_may_be_chosen(tmp_path, rollout):
    KIND.run(context(tmp_path, choose="first", count=2))
    rows = pq.read_table(tmp_path / "dataset" / "train.parquet").to_pylist()
    assert {row["sample"] for row in rows} == {0} and len(rollout.asked) == 2


class StopAfter(StopRequest):
    """Asks to stop at the n-th boundary."""

    def __init__(self, boundaries):
        super().__init__()
        self.left = boundaries

    def check(self):
        self.left -= 1
        self.requested = self.left < 0
        super().check()


def test_a_stopped_stage_goes_on_after_its_last_chunk(tmp_path, rollout):
    whole, part = tmp_path / "whole", tmp_path / "part"
    KIND.run(context(whole))
    rollout.asked.clear()
    with pytest.raises(Interrupted):
        KIND.run(context(part, StopAfter(2)))
    assert len(rollout.asked) == 6 and not (part / "dataset").exists()
    # Killed between a chunk's file and its journal line: the line comes later, and once.
    journal = part / "journal.jsonl"
    journal.write_text(journal.read_text().splitlines(keepends=True)[0])
    rollout.asked.clear()
    KIND.run(context(part))
    assert rollout.asked == list(ANSWERS)[6:]
    assert [line.step for line in read(journal)] == [1, 2, 3]
    assert [line.metrics for line in read(journal)] == [line.metrics for line in read(whole / "journal.jsonl")]
    name = "dataset/train.parquet"
    assert (part / name).read_bytes() == (whole / name).read_bytes()


def test_chunks_cut_otherwise_are_sampled_again(tmp_path, rollout):
    KIND.run(context(tmp_path))
    rollout.asked.clear()
    KIND.run(context(tmp_path, chunk=4))
    assert sorted(rollout.asked) == sorted(ANSWERS)
    assert [(line.step, line.of) for line in read(tmp_path / "journal.jsonl")] == [(1, 2), (2, 2)]


def test_nothing_kept_says_what_failed(tmp_path, rollout):
    with pytest.raises(UserError, match="no answer of 32 passes") as caught:
        KIND.run(context(tmp_path, filters={"min_thinking": 50}))
    assert "× correct" in caught.value.what and "× thinking" in caught.value.what and caught.value.mend
    assert not (tmp_path / "dataset").exists()
