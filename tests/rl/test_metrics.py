"""The metrics of RL: one name wherever they are shown, and what they say of groups."""

import pytest

from flows.pipeline import figures, progress
from stages.problems.episode import Reward
from stages.rl.metrics import NAMES, held_out_metrics, reward_metrics, rollout_metrics
from stages.tracking.journal import Line
from stages.tracking.mlflow.client import metric_name
from tests.conftest import group_of


def groups():
    found = [
        group_of(0, [3], [[5, 1], [6, 7, 1], [8, 9, 10, 11]], [1.0, 0.0, 0.0], finishes=["stop", "stop", "length"]),
        group_of(1, [3], [[5, 1], [5, 1], [5, 1]], [0.0, 0.0, 0.0]),
    ]
    verdicts = [["right", "wrong", "wrong"], ["wrong", "none", "wrong"]]
    for group, judged in zip(found, verdicts, strict=True):
        for episode, verdict in zip(group.episodes, judged, strict=True):
            parts = {"accuracy": float(verdict == "right"), "format": 1.0}
            episode.reward = Reward(total=episode.reward.total, parts=parts, verdict=verdict)
            episode.text = "Wait, but no" if verdict == "right" else "so"
    return found


def test_names_are_the_same_in_mlflow_and_in_the_progress_bar():
    assert all(metric_name(name) == name for name in NAMES)
    shown = {key for key in figures._SHOWN if key.split("/")[0] in ("reward", "rollout", "value")}
    assert shown
    assert shown <= NAMES.keys()
    assert all(sentence for sentence in NAMES.values())


def test_a_new_alarm_is_shown_at_once_on_plain_lines():
    shown = []
    lines = progress.Lines(shown.append)
    lines.begin("zero", "rl")
    for step, alarm in enumerate((0, 1, 1, 0, 1), 1):
        metrics = {"reward/accuracy": 0.0, "health/canaries_missed": 0.0} | ({"health/no_signal": 1.0} if alarm else {})
        lines.line("zero", Line(step, 5, 0, metrics))
    assert shown[1:] == ["zero: 2/5  accuracy 0.00  alarm no_signal", "zero: 5/5  accuracy 0.00  alarm no_signal"]


def test_what_groups_say():
    found = rollout_metrics(groups())
    assert found["rollout/length"] == pytest.approx(15 / 6)
    assert found["rollout/length_right"] == 2
    assert found["rollout/length_wrong"] == pytest.approx(11 / 4)  # the one without verdict is neither
    assert found["rollout/truncated"] == pytest.approx(1 / 6)
    assert found["rollout/no_verdict"] == pytest.approx(1 / 6)
    assert found["rollout/zero_variance"] == 0.5
    assert found["rollout/zero_signal_groups"] == 1
    assert found["rollout/pass_at_k"] == 0.5
    assert found["rollout/reflective_words"] == pytest.approx(2 / 6)
    assert found.keys() <= NAMES.keys()


def test_rewards_and_their_spread():
    episodes = [episode for group in groups() for episode in group.episodes]
    found = reward_metrics(episodes)
    assert found["reward/total"] == pytest.approx(1 / 6)
    assert found["reward/std"] == pytest.approx((5 / 36) ** 0.5)  # p (1 - p) of one right in six
    assert found["reward/accuracy_std"] == found["reward/std"]
    assert found["reward/format_std"] == 0
    assert "reward/language" not in found
    assert found.keys() <= NAMES.keys()


def test_held_out_metrics_have_their_own_prefix():
    found = held_out_metrics(groups())
    assert found["eval/accuracy"] == pytest.approx(1 / 6)
    assert found["eval/pass_at_k"] == 0.5
    assert found.keys() <= NAMES.keys()
    assert all(name.startswith("eval/") for name in found)
