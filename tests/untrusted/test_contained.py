"""What once ended a stage on a text: scorers of lm-eval tasks, preferences, endpoints' replies, results of programs."""

import json
import math

import httpx
import pytest

from stages.contract.errors import UserError
from stages.curation.client import _retry_after
from stages.curation.reply import MOST_TOKENS, read_whole
from stages.evals.task import run_lm_eval
from stages.problems.episode import Episode, Group
from stages.rewards import preference
from stages.rewards.code import verifier
from stages.rewards.code.sandbox import Sandbox
from stages.rewards.code.supervisor import Ended
from stages.rewards.score import score
from stages.rewards.settings import Rewards
from stages.rl.metrics import reward_metrics, rollout_metrics
from stages.store.files import digest_json, read_json, write_json
from tests.evals.test_evals import CONFIG, Table, language_model
from tests.untrusted.calls import episode, problem

TASK = """
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "Q: {{{{q}}}}"
doc_to_target: "{{{{a}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 9, do_sample: false}}
process_results: !function scorer.{function}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: {higher}}}]
"""
SCORER = """
def some(doc, results):
    return {"exact_match": float(int(results[0]) == int(doc["a"]))}
def none(doc, results):
    raise KeyError("answer")
"""


class Answers(Table):
    """Answers the further task with a number, a text, and a digit that `int` does not read."""

    def sample(self, requests, sampling, **rest):
        groups = super().sample(requests, sampling, **rest)
        for request, group in zip(requests, groups, strict=True):
            text = {"Q: one": "1", "Q: two": "in words", "Q: three": "²"}.get(request.key)
            for completion in group if text is not None else []:
                completion.text = text
        return groups


def evaluate(tmp_path, function, higher="true"):
    rows = [{"q": q, "a": a} for q, a in (("one", "1"), ("two", "2"), ("three", "3"))]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    (tmp_path / "scorer.py").write_text(SCORER)
    (tmp_path / "mine.yaml").write_text(TASK.format(data=tmp_path / "data.json", function=function, higher=higher))
    config = CONFIG.model_copy(update={"task_files": (str(tmp_path / "mine.yaml"),)})
    return run_lm_eval(config, language_model(Answers(), tmp_path / "rollouts")).metrics


def test_answers_that_a_task_cannot_score_count_0_and_are_reported(tmp_path, capfd):
    metrics = evaluate(tmp_path, "some")
    assert metrics["mine/exact_match"] == pytest.approx(1 / 3)
    assert metrics["mine/unscored"] == 2.0
    assert metrics["accuracy"] == 0.5, "our own task is scored as ever"
    assert "warning: 2 answers could not be scored" in capfd.readouterr().err


def test_answers_that_a_task_cannot_score_are_left_out_where_less_is_better(tmp_path):
    metrics = evaluate(tmp_path, "some", higher="false")
    assert metrics["mine/exact_match"] == 1.0
    assert metrics["mine/unscored"] == 2.0


def test_task_that_scores_no_answer_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r"mine: the lm-eval task scored no answer \(KeyError"):
        evaluate(tmp_path, "none")


def test_preference_that_is_not_finite_is_no_verdict_and_no_number(monkeypatch):
    values = [math.nan, 0.5, math.inf, -2.0]
    monkeypatch.setattr(preference, "preferences", lambda _, episodes: values[: len(episodes)])
    rewards = Rewards(verifier="exact", preference=1.0, preference_model={"path": "/nowhere"})
    episodes = [episode("<think>a</think><answer>5</answer>", sample=n) for n in range(4)] + [episode("a", finish="length")]
    score(rewards, episodes, max_tokens=8, key="k")
    assert [e.scored.verdict for e in episodes] == ["none", "right", "none", "right", "wrong"]
    assert [e.scored.parts.get("preference") for e in episodes] == [None, 0.5, None, -2.0, -2.0]
    found = reward_metrics(episodes) | rollout_metrics([Group(problem(), episodes)])
    assert all(map(math.isfinite, found.values()))


@pytest.mark.parametrize("tokens", [-1, True, 1.5, "7", MOST_TOKENS, 10**4000, None])
def test_count_of_tokens_that_is_none_is_left_out(tokens):
    body = {"choices": [{"message": {"content": "a\ud800"}, "finish_reason": "stop"}], "usage": {"total_tokens": tokens}}
    document = read_whole(json.dumps(body))
    assert document == {"text": "a\ufffd", "finish": "stop", "model": None, "tokens": None}


@pytest.mark.parametrize(
    "value", ["Mon, 01 Jan 0001 00:00:00 -0000", "9" * 400, "nan", "soon", "", "Fri, 99 Foo 2020", "\u0663"]
)
def test_retry_after_of_any_value_is_a_number_or_none(value):
    found = _retry_after(httpx.Response(429, headers={"retry-after": value.encode()}))
    assert found is None or found >= 0.0


@pytest.mark.parametrize(
    "stdout",
    [
        b"\xff\xfe",
        b"null",
        b"5",
        b'["ab"]',
        b'{"ab": 1}',
        b'[["raised", 5]]',
        b'[["raised", "\\ud800"]]',
        b'[["value", 1e999]]',
        b'[["raised", ' + b"9" * 5000 + b"]]",
        b'[["value", {"int": "' + b"f" * 20_000 + b'"}]]',
        b'[["value", {"int": "\\ud800"}]]',
    ],
)
def test_program_that_gives_back_anything_is_wrong(stdout, monkeypatch):
    assert verdict_of_output(stdout, monkeypatch) == "wrong"


@pytest.mark.parametrize("kind", ["raised", "value"])
def test_program_that_gives_back_a_nested_value_is_wrong_at_every_depth(kind, monkeypatch):
    for depth in (10, 500, *range(880, 1010), 5000, 100_000):
        content = b"[" * depth + b"]" * depth
        assert verdict_of_output(b'[["%s", %s]]' % (kind.encode(), content), monkeypatch) == "wrong"


def verdict_of_output(stdout, monkeypatch):
    monkeypatch.setattr(verifier, "run", lambda *_, **__: Ended(stdout, "", None, 0, 0.1))
    return verifier._judge('{"asserts": ["assert f(1) == 2"]}', "```python\nx\n```", Sandbox()).verdict


def test_text_of_an_episode_can_always_be_encoded():
    assert episode("\ud83d\ude00 \ud800 a").text == "😀 \ufffd a"
    assert Episode(problem(), 0, "q", [1], [2], [0.0], "\udfff", "stop").text.encode() == "\ufffd".encode()


def test_documents_with_lone_surrogates_are_written_read_and_digested(tmp_path):
    document = {"a\ud800": ["\udfff", "😀", "\\ud800"]}
    write_json(tmp_path / "a.json", document)
    assert read_json(tmp_path / "a.json") == document
    assert digest_json(document) != digest_json({"a\ud801": document["a\ud800"]})
    assert digest_json({"b": 1, "a": "ä"}) == "507aab815f2bdfce1c740c0b1ae7b1c874f56b9aa5b9ab109a07b57365148233"
