"""RL stages that learn nothing, in this process: the line, its numbers, the stop; rewards that have no value at all."""

import json

import pytest

from stages.contract.errors import UserError
from stages.kinds.rl import KIND, RLConfig
from stages.store.folders import StageFolder
from stages.store.stage import StageContext, StopRequest
from stages.tracking.journal import read
from tests.doubles.scripted_model import answering, scripted_model, toy_tokenizer

STEPS = 3
NO_SIGNAL = f"no group had a signal in {STEPS} of {STEPS} steps: the model is unchanged"


@pytest.fixture
def train(tmp_path):
    """Train a model whose answers are written beforehand on `1+2=?`, to which the answer is 3."""
    rows = [{"question": question, "answer": "3"} for question in ("1+2=?", "2+1=?", "3+0=?", "0+3=?", "3*1=?", "1*3=?")]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*answers, stage="stage", **fields):
        folder = tmp_path / "policy"
        if not folder.exists():
            scripted_model(folder, toy_tokenizer(folder), answering(*answers))
        source = {"source": "file", "path": str(path)}
        rewards = fields.pop("rewards", {})
        config = RLConfig(
            kind="rl",
            policy="base",
            problems={**source, "limit": 4},
            held_out={**source, "offset": 4},
            template={"name": "question"},
            **{
                "steps": STEPS,
                "questions": 2,
                "samples": 4,
                "sampling": {"max_tokens": 10},
                "evaluation": {"every": STEPS, "problems": 2},
                "lr": 1e-3,
                "kl": 0.0,
                "compute": {"device": "cpu"},
                "rewards": {"verifier": "exact", **rewards},
                **fields,
            },
        )
        target = StageFolder(tmp_path / stage)
        for place in (target.path, target.checkpoints, target.rollouts):
            place.mkdir(parents=True, exist_ok=True)
        return KIND.run(StageContext(config, target, {"policy": folder}, {}, StopRequest())), target

    return run


def test_answers_that_are_all_wrong_are_said_with_what_to_try(train, capsys):
    result, folder = train("4")
    assert result.remarks[0].startswith(f"{NO_SIGNAL}; no answer was right: give easier problems")
    assert f"warning: {NO_SIGNAL}" in capsys.readouterr().err
    assert result.notes["learning"] == {
        "outcome": "no_signal",
        "sentence": result.remarks[0],
        "steps": STEPS,
        "steps_without_signal": STEPS,
        "groups_without_signal": 2 * STEPS,
    }
    lines = read(folder.journal)
    assert [line.metrics["rollout/zero_signal_groups"] for line in lines] == [2.0] * STEPS
    assert [line.metrics["train/updates"] for line in lines] == [0.0] * STEPS


def test_answers_that_are_all_right_want_harder_problems(train):
    result, _ = train("3")
    assert result.remarks[0] == f"{NO_SIGNAL}; every answer was right: give harder problems"


def test_a_kl_term_without_a_signal_leaves_the_model_unchanged_or_says_that_it_moved_it(train):
    result, _ = train("4", kl=0.001, lr=1e-5)
    assert f"no group had a signal in {STEPS} of {STEPS} steps" in result.remarks[0]


def test_rewards_that_differ_are_learned_from(train):
    result, folder = train("3", "4")
    assert result.notes["learning"]["outcome"] == "learned"
    assert not any("signal" in remark or "unchanged" in remark for remark in result.remarks)
    assert any(line.metrics["rollout/zero_variance"] < 1 for line in read(folder.journal))


def test_a_learning_rate_of_next_to_nothing_is_seen_in_the_weights(train):
    result, _ = train("3", "4", lr=1e-60)
    assert result.notes["learning"]["outcome"] == "unchanged"
    assert "its weights are those that the stage started from, after 3 steps" in result.remarks[0]


def test_health_can_refuse_a_stage_that_learned_nothing_and_a_resume_says_the_same(train):
    lines = []
    for _ in range(2):  # the second one goes on from the last checkpoint, of the last step
        with pytest.raises(UserError) as caught:
            train("4", health={"stop": ["no_signal"]}, checkpoints={"every": 1})
        lines.append(str(caught.value))
    assert lines[0] == lines[1]
    assert lines[0].startswith(f"health: {NO_SIGNAL}")
    assert "take `no_signal` out of `health.stop`" in lines[0]
    result, _ = train("4", checkpoints={"every": 1})  # allowed to, it ends from there
    assert result.remarks[0].startswith(NO_SIGNAL)


def test_the_alarm_stops_a_stage_while_it_runs(train):
    with pytest.raises(UserError, match="stopped at step 4: no group had a signal in 4 of the last 4 steps"):
        train("4", steps=9, health={"window": 4, "stop": ["no_signal"]})


@pytest.mark.parametrize("function", ["raising", "not_a_number"])
def test_a_reward_function_without_a_value_for_any_answer_stops_the_stage(train, function):
    odd = {"odd": {"function": f"tests.rewards.reward_functions:{function}"}}
    with pytest.raises(UserError) as caught:
        train("3", "4", rewards={"functions": odd})
    assert caught.value.where == "rewards.functions.odd"
    assert f"`tests.rewards.reward_functions:{function}` has no value for any of the 8 answers of step 1: " in caught.value.what
    assert {"raising": "ValueError", "not_a_number": "is not a number"}[function] in caught.value.what


def test_a_reward_function_without_a_value_for_some_answers_does_not(train):
    some = {"some": {"function": "tests.rewards.reward_functions:raising_on_right_answers"}}
    result, folder = train("3", "4", rewards={"functions": some})
    shares = [line.metrics["rollout/no_verdict"] for line in read(folder.journal)]
    assert all(0 < share < 1 for share in shares)
    assert result.metrics["steps"] == STEPS


def test_texts_that_a_reward_function_cannot_take_do_not_end_a_run(train):
    """It raises on every answer of the model, and has a value for a plain one: nothing that a model writes ends a run."""
    odd = {"odd": {"function": "tests.rewards.reward_functions:raising_on_wrong_answers"}}
    result, folder = train("4", rewards={"functions": odd})
    assert [line.metrics["rollout/no_verdict"] for line in read(folder.journal)] == [1.0] * STEPS
    assert "`rewards.functions.odd` had no value for any answer" in result.remarks[0]


def test_a_verifier_that_fails_on_known_answers_too_stops_the_stage(train, monkeypatch):
    from stages.rewards import coverage

    broken = lambda rewards, names: ["`5` for `5` is none, not right"]  # noqa: E731
    verdicts = lambda asked, rewards: ["none"] * len(asked)  # noqa: E731
    monkeypatch.setattr("stages.rewards.answers.judges.exact", verdicts)
    monkeypatch.setattr("stages.rewards.score.judge", verdicts)
    with pytest.raises(UserError) as caught, monkeypatch.context() as patch:
        patch.setattr(coverage, "canaries_missed", broken)
        train("3", "4")
    assert (
        "`exact` has no verdict for any of the 8 answers of step 1, and fails on known ones: `5` for `5`" in caught.value.what
    )
    # With a verifier that works it is the answers: nothing that a model writes ends a run.
    monkeypatch.setattr(coverage, "canaries_missed", lambda rewards, names: [])
    result, _ = train("3", "4", stage="again")
    assert "no answer had a verdict" in result.remarks[0]
