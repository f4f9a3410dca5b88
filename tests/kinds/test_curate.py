import json
import random
from collections import Counter
from contextlib import nullcontext

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.contract.errors import Interrupted, UserError
from stages.curation import sampled
from stages.kinds.curate import KIND, CurateConfig
from stages.problems.templates import R1_ZERO
from stages.problems.toy import ToySource, toy_problems
from stages.rollout.protocol import Completion
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
    monkeypatch.setattr(sampled, "opened", lambda context, prompts: nullcontext(scripted))
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


class Written:
    """Answers with the texts that it is given: question -> texts."""

    def __init__(self, texts):
        self.texts, self.prompts = texts, []

    def encode(self, prompt):
        return tuple(ord(c) for c in prompt)

    def sample(self, requests, sampling, *, seed, purpose, step, done=None):
        for number, r in enumerate(requests):
            self.prompts.append("".join(map(chr, r.prompt_ids)))
            texts = self.texts[r.key]
            done(number, [Completion(list(map(ord, t)), [0.0] * len(t), t, "stop") for t in texts])


def dataset(folder):
    return pq.read_table(folder / "dataset" / "train.parquet").to_pylist()


def run_on(folder, monkeypatch, texts, **fields):
    rollout = Written(texts)
    monkeypatch.setattr(sampled, "opened", lambda context, prompts: nullcontext(rollout))
    result = KIND.run(context(folder, **fields))
    return result, rollout


def test_up_to_n_answers_per_problem_in_the_order_of_choice(tmp_path, rollout):
    solved = [question for question, answer in ANSWERS.items() if answer != "0"]
    result = KIND.run(context(tmp_path, per_problem=3, filters={"min_language": 0}))
    rows = dataset(tmp_path)
    # Sample 2 thinks in letters and has the fewest characters, sample 1 comes next, sample 0 is longest, 3 is wrong.
    assert [(row["question"], row["sample"]) for row in rows] == [(q, n) for q in solved for n in (2, 1, 0)]
    assert result.metrics["kept"] == 3 * len(solved)
    assert result.metrics["kept_share"] == len(solved) / 8
    assert result.notes["answers"]["surplus"] == 0


def test_random_choice_depends_on_the_seed_and_the_question_alone(tmp_path, rollout):
    chosen = {}
    for name, seed, chunk in (("a", 1, 3), ("b", 1, 8), ("c", 2, 3)):
        KIND.run(context(tmp_path / name, choose="random", filters={"min_language": 0}, seed=seed, chunk=chunk))
        chosen[name] = [row["sample"] for row in dataset(tmp_path / name)]
    assert chosen["a"] == chosen["b"] != chosen["c"]
    assert set(chosen["a"]) <= {0, 1, 2} and len(set(chosen["a"])) > 1


@pytest.mark.parametrize("among", ["problem", "dataset"])
def test_planted_near_duplicates_are_found_and_honest_answers_stay(tmp_path, monkeypatch, among):
    rng, texts, planted = random.Random(0), {}, set()
    for question, answer in ANSWERS.items():
        # Two honest answers of 60 sums each, and one that differs from the first in its last sum.
        thoughts = [",".join(f"{rng.randrange(90)}+{rng.randrange(90)}={rng.randrange(90)}" for _ in range(60)) for _ in "ab"]
        copy = thoughts[0].rsplit(",", 1)[0] + ",1+1=2,3+3=6"
        texts[question] = [f"{thought}</think><answer>{answer}</answer>" for thought in [*thoughts, copy]]
        planted.add((question, max((len(texts[question][n]), n) for n in (0, 2))[1]))
    result, _ = run_on(tmp_path, monkeypatch, texts, per_problem=3, duplicates={"among": among, "words": 5}, samples=3)
    kept = {(row["question"], row["sample"]) for row in dataset(tmp_path)}
    assert kept == {(question, n) for question in ANSWERS for n in range(3)} - planted
    assert result.notes["answers"]["duplicate"] == len(ANSWERS)
    assert dataset(tmp_path)[0]["filters"][-1] == "duplicate"


def test_copies_across_problems_are_found_among_the_dataset_only(tmp_path, monkeypatch):
    words = " ".join(f"{n}*{n}" for n in range(40))
    texts = {question: [f"{words}</think><answer>{ANSWERS[question]}</answer>"] for question in ANSWERS}
    for among, kept in (("problem", 8), ("dataset", 1)):
        run_on(tmp_path / among, monkeypatch, texts, samples=1, duplicates={"among": among})
        assert len(dataset(tmp_path / among)) == kept


THOUGHTS = st.sampled_from(["1+1=2", "b=c", "", "1+1=2,2+1=3", "3=3,3=3,3=3,3=3", "one\n\nlong 1 paragraph 1", "```1```"])


@st.composite
def answered(draw):
    """Texts per question: right, wrong, malformed, thoughtless, repeated, copied."""
    texts, size = {}, draw(st.integers(1, 6))
    for question, answer in list(ANSWERS.items())[: draw(st.integers(1, 8))]:
        shapes = draw(st.lists(st.tuples(THOUGHTS, st.booleans(), st.booleans()), min_size=size, max_size=size))
        texts[question] = [
            f"{thought}</think>{'' if formed else '!'}<answer>{answer if right else 'no'}</answer>"
            for thought, right, formed in shapes
        ]
    return texts, size


@settings(max_examples=40, deadline=None)
@given(
    answered(),
    st.sampled_from([None, {}, {"among": "dataset", "words": 1}]),
    st.integers(1, 3),
    st.sampled_from(["shortest", "first", "random"]),
    st.integers(1, 9),
)
def test_every_sampled_answer_is_accounted_for_once(tmp_path_factory, given_, duplicates, per_problem, choose, chunk):
    texts, size = given_
    filters = {"repetition_words": 1, "longest_paragraph": 10, "code_blocks": False, "min_length": 20, "max_length": 60}
    fields = {"filters": filters, "per_problem": per_problem, "duplicates": duplicates, "choose": choose}
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("run")
        patch.setattr(sampled, "opened", lambda context, prompts: nullcontext(Written(texts)))
        try:
            result = KIND.run(context(folder, count=len(texts), samples=size, chunk=chunk, **fields))
        except UserError as error:
            assert f"no answer of {len(texts) * size} passes" in error.what
            shown = error.what.split("failed: ")[1].rstrip(")").split(", ")
            assert sum(int(part.split(" × ")[0]) for part in shown) == len(texts) * size
            return
    answers = result.notes["answers"]
    assert sum(answers.values()) == len(texts) * size == result.metrics["sampled"]
    assert answers["kept"] == len(rows := dataset(folder))
    assert all(number >= 0 for number in answers.values())
    assert max(Counter(row["question"] for row in rows).values()) <= per_problem
    assert all(row["accuracy"] == row["format"] == 1.0 and 20 <= len("<think>" + row["completion"]) <= 60 for row in rows)
    wrong = sum(
        "no</answer>" in text or "!" in text or text.startswith("</think>") for group in texts.values() for text in group
    )
    assert answers["correct"] + answers["format"] == wrong


@pytest.mark.parametrize(
    ("filters", "name", "passes"),
    [
        ({"max_length": 43}, "length", {"plain"}),
        ({"min_length": 56}, "length", {"paragraphs", "code"}),
        ({"longest_paragraph": 14}, "paragraph", {"plain", "code"}),
        ({"longest_paragraph": 15}, "paragraph", {"plain", "code", "paragraphs"}),
        ({"code_blocks": False}, "code", {"plain", "paragraphs"}),
    ],
)
def test_filters_that_are_asked_for(tmp_path, monkeypatch, filters, name, passes):
    # Whole answers of 43, 56 and 56 characters; paragraphs of at most 10, 15 and 11.
    thoughts = {"plain": "1+1=2,2+2=", "paragraphs": "1+1=2\n \n1+2=3 1+3=4 1+4", "code": "```\n1+1\n```\n\n1+2=3 1+3="}
    texts = {q: [f"{t}</think><answer>{a}</answer>" for t in thoughts.values()] for q, a in list(ANSWERS.items())[:1]}
    result, _ = run_on(tmp_path, monkeypatch, texts, filters=filters, count=1, samples=3, per_problem=3, choose="first")
    assert {list(thoughts)[row["sample"]] for row in dataset(tmp_path)} == passes
    assert result.notes["answers"][name] == 3 - len(passes)
    assert dataset(tmp_path)[0]["filters"] == ["finished", "correct", "format", "thinking", "language", "repetition", name]


def test_worked_examples_come_before_the_question_and_stay_out_of_the_dataset(tmp_path, monkeypatch):
    (tmp_path / "few.jsonl").write_text(
        "".join(json.dumps({"question": q, "thinking": "slowly", "answer": "6"}) + "\n" for q in [*list(ANSWERS)[:1], "2*3"])
    )
    few, problems = {"path": str(tmp_path / "few.jsonl")}, list(ANSWERS)[1:]
    texts = {question: [f" <think> 1 </think>\n<answer> {ANSWERS[question]} </answer>"] for question in ANSWERS}
    given_ = context(tmp_path / "run", template={"name": "r1_zero"}, few_shot=few, samples=1)
    given_.input_digests["few_shot.path"] = "d2"
    rollout = Written(texts)
    monkeypatch.setattr(sampled, "opened", lambda context, prompts: nullcontext(rollout))
    result = KIND.run(given_)
    assert len(rollout.prompts) == 7
    for prompt, question in zip(rollout.prompts, problems, strict=True):
        shown = prompt[prompt.index("User: 2*3") :]
        assert shown == f"User: 2*3\nAssistant: <think> slowly </think>\n<answer> 6 </answer>\n\nUser: {question}\nAssistant:"
    for row in dataset(tmp_path / "run"):
        assert row["prompt"] == f"{R1_ZERO}\n\nUser: {row['question']}\nAssistant:"
        assert row["examples_digest"] == "d2"
        assert row["completion"] == texts[row["question"]][0]
    assert result.remarks == ["few_shot: 1 problems are worked examples and were left out"]


@pytest.mark.parametrize(
    ("content", "count", "says"),
    [
        ('{"question": "q", "thinking": "", "answer": "a"}', None, "line 1: no text in column `thinking`"),
        ('{"question": "q", "thinking": "t", "answer": "a"}\n{', None, "line 2: not JSON"),
        ('{"question": "q", "thinking": "t", "answer": "a"}', 2, "the file has 1 worked examples"),
        ("", None, "the file has 0 worked examples"),
    ],
)
def test_worked_examples_that_are_none(tmp_path, rollout, content, count, says):
    (tmp_path / "few.jsonl").write_text(content)
    few = {"path": str(tmp_path / "few.jsonl"), "count": count}
    with pytest.raises(UserError) as caught:
        KIND.run(context(tmp_path / "run", template={"name": "r1_zero"}, few_shot=few))
    assert says in str(caught.value)


def test_settings_that_contradict_each_other():
    rewrite = {"endpoint": {"url": "http://h/v1", "model": "m"}, "summary": True}
    for fields, says in (
        ({"few_shot": {"path": "x"}}, "takes no worked examples"),
        ({"rewrite": rewrite}, "needs the verifier `math`"),
        ({"filters": {"min_length": 3, "max_length": 2}}, "min_length is larger"),
    ):
        with pytest.raises(ValidationError, match=says):
            context("x", **fields)
