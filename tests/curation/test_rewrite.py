"""Curation beyond the choice of answers: rewriting through an endpoint, and the review by people."""

import csv
import json

import pytest

from stages.contract.errors import StageFailed, UserError
from stages.kinds.curate import KIND
from stages.store.files import digest_path
from stages.tracking.journal import read
from tests.doubles.endpoint_server import EndpointServer
from tests.kinds.test_curate import ANSWERS, context, dataset, run_on
from tests.kinds.test_curate import rollout as rollout

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


def test_the_reward_model_of_a_stage_is_found_for_what_is_rewritten_too(tmp_path, rollout, server, monkeypatch):
    asked = set()

    def preferences(settings, episodes):
        asked.add((settings.path, any("So 1+1=2" in e.text for e in episodes)))
        return [0.0] * len(episodes)

    monkeypatch.setattr("stages.rewards.preference.preferences", preferences)
    rewards = {"verifier": "exact", "language_target": "digits", "preference": 0.1, "preference_model": {"stage": "judge"}}
    given = context(tmp_path, **rewriting(server), rewards=rewards)
    given.inputs["rewards.preference_model.stage"] = tmp_path / "judge"
    KIND.run(given)
    assert asked == {(str(tmp_path / "judge"), False), (str(tmp_path / "judge"), True)}
