import csv
import json
import random
from collections import Counter
from contextlib import nullcontext

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.curate import KIND, CurateConfig
from stages.curation import sampled
from stages.problems.templates import R1_ZERO
from stages.problems.toy import ToySource, toy_problems
from stages.rollout.protocol import Completion
from stages.store.errors import Interrupted, StageFailed, UserError
from stages.store.files import digest_path
from stages.store.folders import StageFolder
from stages.store.stage import StageContext, StopRequest
from stages.tracking.journal import read
from tests.unit.endpoint_server import EndpointServer

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
    monkeypatch.setattr(sampled, "opened", lambda context: nullcontext(rollout))
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
        patch.setattr(sampled, "opened", lambda context: nullcontext(Written(texts)))
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
    monkeypatch.setattr(sampled, "opened", lambda context: nullcontext(rollout))
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


# --- rewriting ---


def rewriter(body):
    """Rewrites rightly, but for three questions: wrongly, without tags, in letters."""
    question = body["messages"][1]["content"].split("\n")[1]
    answer, place = ANSWERS[question], SOLVED.index(question)
    if place == 1:
        return "I cannot do that."
    thought = "a=b" if place == 2 else "So 1+1=2."
    return f"<think>{thought}</think>\n<answer>{'no' if place == 0 else answer}</answer>\n"


SOLVED = [question for question, answer in ANSWERS.items() if answer != "0"]


@pytest.fixture
def server():
    with EndpointServer(rewriter) as running:
        yield running


def rewriting(server, **fields):
    # Room for the `o` of `So`: it counts as a letter of the toy's other script.
    settings = {"url": server.url, "model": "m", "wait_s": 0.02, "attempts": 2, "concurrency": 2} | fields
    return {"filters": {"min_language": 0.5}, "rewrite": {"endpoint": settings}}


def test_rewritten_answers_are_judged_again(tmp_path, rollout, server):
    result = KIND.run(context(tmp_path, **rewriting(server)))
    rows = dataset(tmp_path)
    assert [row["question"] for row in rows] == SOLVED[3:]
    for row in rows:
        assert row["completion"] == f"So 1+1=2.</think>\n<answer>{ANSWERS[row['question']]}</answer>"
        assert (row["rewritten"], row["rewritten_by"], row["sample"], row["accuracy"]) == (True, "m-2026", 1, 1.0)
        assert row["prompt"] == row["question"] + "<think>"
    answers = result.notes["answers"]
    assert {name: n for name, n in answers.items() if name.startswith("rewritten/") and n} == {
        "rewritten/correct": 2, "rewritten/language": 1
    }  # fmt: skip
    assert sum(answers.values()) == 32
    assert [(line.step, line.of) for line in read(tmp_path / "journal.jsonl")] == [(n, 6) for n in range(1, 7)]
    report = json.loads((tmp_path / "dataset" / "report.json").read_text())
    assert report["answers"] == answers
    asked = server.bodies[0]["messages"][1]["content"]
    assert "1+1=2</think>" in asked and asked.startswith("Question:\n")


def test_a_stage_that_ends_amid_rewriting_gives_the_same_dataset(tmp_path, rollout, server):
    whole, part = tmp_path / "whole", tmp_path / "part"
    KIND.run(context(whole, **rewriting(server)))
    asked = len(server.bodies)
    rollout.asked.clear()
    server.bodies.clear()
    server.faults = [None] * 3 + [(500, {}, "")] * 20
    with pytest.raises(StageFailed, match="no answer in 2 attempts"):
        KIND.run(context(part, **rewriting(server, concurrency=1)))
    assert len(rollout.asked) == 8 and len(server.bodies) == 5
    server.faults = []
    server.bodies.clear()
    # Without the last line of the journal, as if it had been killed before.
    journal = part / "journal.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-1]))
    KIND.run(context(part, **rewriting(server)))
    assert len(rollout.asked) == 8, "sampled again"
    assert len(server.bodies) == asked - 3
    assert digest_path(part / "dataset") == digest_path(whole / "dataset")
    assert [line.metrics for line in read(journal)] == [line.metrics for line in read(whole / "journal.jsonl")]
    server.bodies.clear()
    KIND.run(context(part, **rewriting(server)))
    assert server.bodies == []


def test_a_rewriting_cut_at_its_limit_is_no_answer(tmp_path, rollout, server):
    document = {"choices": [{"message": {"content": "<think>1</think><answer>"}, "finish_reason": "length"}]}
    server.faults = [(200, {}, json.dumps(document)), (400, {}, "no")]
    result = KIND.run(context(tmp_path, **rewriting(server, concurrency=1)))
    answers = result.notes["answers"]
    assert (answers["rewritten/finished"], answers["rewritten/refused"]) == (1, 1)
    assert sum(answers.values()) == 32


def test_a_rewriting_that_spoils_everything_leaves_nothing_to_review(tmp_path, rollout, server):
    server.answer = lambda body: "no"
    with pytest.raises(UserError, match=rf"no answer of 32 passes .* {len(SOLVED)} × rewritten/correct"):
        KIND.run(context(tmp_path, **rewriting(server), review="required"))
    assert not (tmp_path / "review").exists()


def test_a_summary_is_judged_by_its_box(tmp_path, rollout, server):
    def summed(body):
        question = body["messages"][1]["content"].split("\n")[1]
        answer = ANSWERS[question] if SOLVED.index(question) else "99"
        return f"<think>I add.</think><answer>Adding step by step, 1 and 1 first, gives \\boxed{{{answer}}}.</answer>"

    server.answer = summed
    fields = rewriting(server)
    fields["rewrite"]["summary"] = True
    result = KIND.run(context(tmp_path, rewards={"verifier": "math", "language_target": "english"}, **fields))
    assert [row["question"] for row in dataset(tmp_path)] == SOLVED[1:]
    assert result.notes["answers"]["rewritten/correct"] == 1
    assert "\\boxed{}" in server.bodies[0]["messages"][0]["content"]


def test_a_missing_key_is_told_before_anything_is_sampled(tmp_path, rollout, server, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(UserError, match="`NO_SUCH_KEY` is not set"):
        KIND.run(context(tmp_path, **rewriting(server, key_variable="NO_SUCH_KEY")))
    assert rollout.asked == []


# --- review ---


def fill(path, decide):
    """Write verdicts as a person with a spreadsheet would: other line ends, rows in another order."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            row["verdict"] = decide(row)
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\r\n")
            writer.writeheader()
            writer.writerows(reversed(rows))
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row | {"verdict": decide(row)}) + "\n" for row in rows))
    return rows


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_review_stops_the_stage_until_every_verdict_is_there(tmp_path, rollout, form):
    fields = {"review": "required", "review_file": form}
    path = tmp_path / "review" / f"review.{form}"
    with pytest.raises(UserError) as caught:
        KIND.run(context(tmp_path, **fields))
    assert str(caught.value) == (
        f"{path}: {len(SOLVED)} of {len(SOLVED)} answers wait for a verdict; write `accept` or `reject` into the column "
        "`verdict` of every row of this file, then go on with `r1 resume RUN`"
    )
    assert not (tmp_path / "dataset").exists()
    sampled_before = list(rollout.asked)
    rows = fill(path, lambda row: "" if row["question"] == SOLVED[0] else " Accept")
    assert [(row["question"], row["reference"]) for row in rows] == [(q, ANSWERS[q]) for q in SOLVED]
    assert rows[0]["answer"] == f"<think>1+1=2</think><answer>{ANSWERS[SOLVED[0]]}</answer>"
    with pytest.raises(UserError, match=f"1 of {len(SOLVED)} answers wait"):
        KIND.run(context(tmp_path, **fields, chunk=8))
    fill(path, lambda row: "reject" if row["question"] == SOLVED[1] else "accept")
    filled = path.read_bytes()
    result = KIND.run(context(tmp_path, **fields | {"review_file": "csv"}))
    assert path.read_bytes() == filled
    assert [row["question"] for row in dataset(tmp_path)] == [SOLVED[0], *SOLVED[2:]]
    assert {row["review"] for row in dataset(tmp_path)} == {"accept"}
    assert result.notes["answers"]["rejected"] == 1
    assert sum(result.notes["answers"].values()) == 32
    assert result.metrics["kept"] == len(SOLVED) - 1
    # Chunks of 8 and again of 3 were sampled anew, to the same answers: the ids held.
    assert rollout.asked[:8] == sampled_before


def test_a_review_of_rewritten_answers_shows_what_was_written(tmp_path, rollout, server):
    fields = rewriting(server) | {"review": "required"}
    with pytest.raises(UserError, match="wait for a verdict"):
        KIND.run(context(tmp_path, **fields))
    rows = fill(tmp_path / "review" / "review.csv", lambda row: "yes")
    assert {row["answer"][:16] for row in rows} == {"<think>So 1+1=2."}
    KIND.run(context(tmp_path, **fields))
    assert len(dataset(tmp_path)) == len(SOLVED) - 3
    assert len(server.bodies) == len(SOLVED)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text.replace(",,", ",acept,", 1), "line 2: `acept` is no verdict; did you mean `accept`"),
        (lambda text: text.replace("verdict", "verdikt", 1), "line 2: no text in the columns `id` and `verdict`"),
        (lambda text: text.replace(",,", ",accept,").replace("\nr", "\nrx", 1), "there is no answer with the id `rx"),
        (lambda text: text.replace(",,", ",no,"), "no answer of 32 passes the filters"),
        (lambda text: text.replace(",,", ",yes,") + text.splitlines()[1].replace(",,", ",no,"), "a second verdict on `r"),
    ],
)  # fmt: skip
def test_a_review_that_went_wrong(tmp_path, rollout, change, says):
    with pytest.raises(UserError, match="wait for a verdict"):
        KIND.run(context(tmp_path, review="required"))
    path = tmp_path / "review" / "review.csv"
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError) as caught:
        KIND.run(context(tmp_path, review="required"))
    assert says in str(caught.value)
    assert not (tmp_path / "dataset").exists()


def test_what_a_spreadsheet_would_compute_or_cut_is_harmless(tmp_path, monkeypatch):
    long = "1 " * 100_000
    texts = {
        question: [f"{long}</think><answer>{answer}</answer>", f"=1+1 {n}</think><answer>{answer}</answer>"]
        for n, (question, answer) in enumerate(list(ANSWERS.items())[:2])
    }
    fields = {"samples": 2, "review": "required", "template": {"name": "question"}, "choose": "first", "per_problem": 2}
    fields |= {"filters": {"max_repeats": 10**6}, "count": 2}
    for question in texts:
        texts[question] = [f"\t<think>{text}" for text in texts[question]]
    with pytest.raises(UserError, match="4 of 4"):
        run_on(tmp_path, monkeypatch, texts, **fields)
    csv.field_size_limit(10**9)
    rows = fill(tmp_path / "review" / "review.csv", lambda row: "accept")
    csv.field_size_limit(131072)
    assert all(row["answer"].startswith("'\t<think>") for row in rows)
    run_on(tmp_path, monkeypatch, texts, **fields)
    assert [row["completion"] for row in dataset(tmp_path)] == [text for group in texts.values() for text in group]
