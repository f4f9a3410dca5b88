"""Whether a stage has learned anything: outcomes of curves made by hand, each hint where its condition holds."""

import pytest
from safetensors.torch import save_file
from torch import ones, zeros

from stages.engine.changed_weights import same_weights
from stages.rewards.health import Health, Watch, alarms
from stages.rewards.learning import has_signal, rl_learning, sft_learning

NOTHING = {"rollout/zero_variance": 1.0, "rollout/zero_signal_groups": 4.0}
SOME = {"rollout/zero_variance": 0.5, "rollout/zero_signal_groups": 2.0}


def steps(count, signal=NOTHING, **metrics):
    names = {"truncated": "rollout/truncated", "no_verdict": "rollout/no_verdict"}
    return [signal | {names.get(key, f"reward/{key}"): value for key, value in metrics.items()}] * count


def test_no_step_with_a_signal_is_said_with_the_counts():
    found = rl_learning(steps(3, accuracy=0.0, format=1.0), unchanged=True)
    assert (found.outcome, found.failed) == ("no_signal", True)
    assert found.sentence.startswith("no group had a signal in 3 of 3 steps: the model is unchanged; no answer was right")
    assert (found.steps, found.without_signal, found.groups_without_signal) == (3, 3, 12)


def test_weights_that_moved_without_a_signal_are_not_called_unchanged():
    found = rl_learning(steps(3, accuracy=0.0), unchanged=False)
    assert "3 of 3 steps: only other terms of the loss moved the weights" in found.sentence


HINTS = {
    "wrong": ({"accuracy": 0.0, "format": 0.5}, ["easier problems", "template.examples", "more `samples`", "`template`"]),
    "no_format": ({"accuracy": 0.0, "format": 0.0}, ["none had the format", "template.examples"]),
    "right": ({"accuracy": 1.0, "format": 1.0}, ["harder problems"]),
    "truncated": ({"accuracy": 0.0, "format": 0.0, "truncated": 1.0}, ["raise `sampling.max_tokens`"]),
    "no_verdict": ({"accuracy": 0.0, "no_verdict": 1.0}, ["no answer had a verdict"]),
    "alike": ({"accuracy": 0.5, "format": 1.0}, ["sampling.temperature"]),
}


@pytest.mark.parametrize("seen", HINTS)
def test_the_hint_is_about_what_was_seen(seen):
    metrics, words = HINTS[seen]
    sentence = rl_learning(steps(5, **metrics), unchanged=True).sentence
    assert all(word in sentence for word in words), sentence
    others = [word for name, (_, theirs) in HINTS.items() if name != seen for word in theirs if word not in words]
    if seen not in ("wrong", "no_format"):  # these two share words
        assert not any(word in sentence for word in others), sentence


def test_a_function_without_any_value_is_named():
    every = steps(4, accuracy=0.5, brevity=-1.0)
    sentence = rl_learning(every, unchanged=True, functions=["brevity", "odd"]).sentence
    assert "`rewards.functions.odd` had no value for any answer" in sentence
    assert "brevity" not in sentence


def test_unchanged_weights_are_said_although_there_was_a_signal():
    found = rl_learning(steps(4, SOME, accuracy=0.5), unchanged=True)
    assert (found.outcome, found.failed) == ("unchanged", True)
    assert "its weights are those that the stage started from, after 4 steps, 0 of which had no group" in found.sentence


def test_a_few_steps_without_a_signal_are_counted_and_not_said():
    found = rl_learning([*steps(1), *steps(3, SOME, accuracy=0.5)], unchanged=False)
    assert (found.outcome, found.sentence, found.without_signal, found.groups_without_signal) == ("learned", "", 1, 10)
    most = rl_learning([*steps(3, accuracy=1.0), *steps(1, SOME, accuracy=1.0)], unchanged=False)
    assert most.outcome == "learned"
    assert most.sentence.startswith("no group had a signal in 3 of 4 steps; every answer was right")


def test_a_format_that_rises_alone_is_said_and_not_with_accuracy():
    alone = [SOME | {"reward/format": n / 10, "reward/accuracy": 0.3} for n in range(10)]
    found = rl_learning(alone, unchanged=False)
    what = (
        "only the format was learned: it rose by 0.50 from the first to the second half of 10 steps while accuracy rose by 0.00"
    )
    assert (found.outcome, found.sentence.split(";")[0]) == ("format_only", what)
    both = [SOME | {"reward/format": n / 10, "reward/accuracy": n / 10} for n in range(10)]
    assert rl_learning(both, unchanged=False).outcome == "learned"
    assert rl_learning(alone, unchanged=False, format_gain=None).outcome == "learned"


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"rollout/zero_variance": 1.0, "reward/std": 0.5}, False),  # groups differ, answers to a problem do not
        ({"reward/std": 0.0}, False),
        ({"reward/std": 0.1}, True),
        ({"rollout/zero_variance": 1.0, "reward/std": 0.5, "value/mean": 0.1}, True),  # PPO compares with values
        ({}, None),
    ],
)
def test_what_a_signal_is(metrics, expected):
    assert has_signal(metrics) is expected


def test_a_loss_that_does_not_fall_is_said_and_one_that_does_is_not():
    losses = [2.0, 2.1, 1.9, 2.0, 2.0, 2.1, 2.1, 2.2]
    found = sft_learning([{"train/loss": loss} for loss in losses], unchanged=False)
    assert (found.outcome, found.failed) == ("flat_loss", False)
    assert found.sentence.startswith("the loss did not fall: 2.050 in the first quarter of 8 steps, 2.150 in the last")
    falling = [{"train/loss": 2.0 - n / 10} for n in range(8)]
    assert sft_learning(falling, unchanged=False).sentence == ""
    assert sft_learning(falling, unchanged=True).outcome == "unchanged"
    assert sft_learning([{"train/loss": 2.0}] * 7, unchanged=False).outcome == "learned"  # too few to say


def test_the_alarm_is_of_a_whole_window_and_can_be_set_or_switched_off():
    health = Health(window=4)
    assert alarms(steps(3), health) == {}
    assert alarms(steps(4), health) == {"no_signal": "no group had a signal in 4 of the last 4 steps"}
    three_of_four = [*steps(3), *steps(1, SOME)]
    assert alarms(three_of_four, health) == {}
    assert set(alarms(three_of_four, Health(window=4, no_signal=0.75))) == {"no_signal"}
    assert alarms(steps(4), Health(window=4, no_signal=None)) == {}
    assert alarms([{"reward/std": 0.5}] * 4, health) == {}


def test_a_resumed_watch_has_the_same_alarm(capsys):
    health = Health(window=4, stop=("no_signal",), canary_every=0)
    whole, resumed = Watch(health, [], list), Watch(health, steps(3), list)
    found = [whole.see(number, step) for number, step in enumerate(steps(4), 1)][-1]
    assert found == resumed.see(4, steps(1)[0]) == {"health/no_signal": 1.0}
    assert whole.stopping == resumed.stopping == "stopped at step 4: no group had a signal in 4 of the last 4 steps"


def folder(path, **tensors):
    path.mkdir()
    for number, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, path / f"model-{number}.safetensors")
    return path


def test_weights_are_compared_tensor_by_tensor(tmp_path):
    start = folder(tmp_path / "start", a=ones(2, 2), b=zeros(3))
    assert same_weights(start, folder(tmp_path / "same", a=ones(2, 2), b=zeros(3)))
    assert same_weights(start, folder(tmp_path / "wider", a=ones(2, 2).double(), b=zeros(3)))
    moved = ones(2, 2)
    moved[1, 1] += 1e-6
    assert not same_weights(start, folder(tmp_path / "moved", a=moved, b=zeros(3)))
    assert not same_weights(start, folder(tmp_path / "shape", a=ones(4), b=zeros(3)))
    assert not same_weights(start, folder(tmp_path / "more", a=ones(2, 2), b=zeros(3), c=zeros(1)))
    assert not same_weights(start, folder(tmp_path / "empty"))


def test_adapters_beside_the_weights_count_once_their_b_is_not_zero(tmp_path):
    start = folder(tmp_path / "start", a=ones(2, 2))
    parts = {"a": ones(2, 2), "a.lora_A.weight": ones(1, 2)}
    assert same_weights(start, folder(tmp_path / "zero", **parts, **{"a.lora_B.weight": zeros(2, 1)}))
    assert not same_weights(start, folder(tmp_path / "moved", **parts, **{"a.lora_B.weight": ones(2, 1)}))
