"""A stage that is stopped and started again computes the same bits as one that is not."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.engine.checkpoint.checkpointer import steps
from stages.recipe.resolve import load_recipe
from stages.rl.metrics import NAMES
from stages.store.files import digest_files
from stages.tracking.journal import read
from tests import stage_process
from tests.conftest import ROOT
from tests.stage_process import finish, killed, start, stopped, wait_for_steps

STEPS = 10


def prepare(folder: Path, name: str, inputs: dict[str, Path], overrides: list[str]) -> Path:
    config = load_recipe(ROOT / "tests/pipeline/tiny.yaml", overrides).stages[name]
    return stage_process.prepare(folder, config, inputs)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small recipe's base model: it is right often enough for its rewards to differ."""
    folder = prepare(tmp_path_factory.mktemp("base") / "stage", "base", {}, [])
    return finish(folder) / "model"


def results(folder: Path) -> dict[str, Any]:
    """What has to be the same: weights, rollouts, and every metric that is not a time."""
    rollouts = digest_files(folder / "rollouts") if (folder / "rollouts").exists() else {}
    curves = [
        (x.step, {k: v for k, v in x.metrics.items() if not k.startswith("time/")}) for x in read(folder / "journal.jsonl")
    ]
    return {"model": digest_files(folder / "model"), "rollouts": rollouts, "curves": curves}


# A KL term brings the reference in; minibatches the old log-probabilities; the best step is not always the last.
RL = [
    f"stages.zero.steps={STEPS}",
    "stages.zero.checkpoints.every=3",
    "stages.zero.evaluation.every=1",
    "stages.zero.kl=0.01",
    "stages.zero.minibatches=2",
    "stages.zero.lr=1e-3",
]
OVERRIDES = {
    "grpo": [*RL, "stages.zero.mask_truncated=true"],
    # Everything that a checkpoint has to hold: a value model, pre-trained; a reference that is renewed between two checkpoints;
    # a sampler whose place depends on what was drawn again.
    "ppo": [
        *RL,
        "stages.zero.algorithm=ppo",
        "stages.zero.critic={pretrain: 2, lr: 1e-3}",
        "stages.zero.epochs=2",
        "stages.zero.max_resamples=2",
        "stages.zero.reference_every=4",
    ],
    "ahead": [*RL, "stages.zero.one_step_off=true"],
    "base": [f"stages.base.steps={STEPS}", "stages.base.checkpoints.every=3"],
}


@pytest.mark.slow
@pytest.mark.parametrize("ahead", ["false", "true"])
def test_a_budget_of_tokens_ends_with_the_same_step(tmp_path: Path, base: Path, ahead: str) -> None:
    budget = [*RL, "stages.zero.steps=50", "stages.zero.most_tokens=1600", f"stages.zero.one_step_off={ahead}"]
    whole, cut = (prepare(tmp_path / name, "zero", {"policy": base}, budget) for name in ("whole", "cut"))
    finish(whole)
    killed(cut, 4)  # after a checkpoint, before the next
    finish(cut)
    assert results(cut) == results(whole)
    sampled = [line.metrics["rollout/sampled_tokens"] for line in read(whole / "journal.jsonl")]
    assert 4 < len(sampled) < 50
    assert sampled[-2] < 1600 <= sampled[-1]
    assert len(list((whole / "rollouts").iterdir())) == len(sampled), "nothing is sampled for a step that is not taken"
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (whole, cut)]
    assert manifests[0]["tokens"] == manifests[1]["tokens"] == sampled[-1]
    assert all(manifest["peak_memory"] > 50 << 20 for manifest in manifests)


@pytest.mark.parametrize("case", ["ppo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("grpo", "ahead", "base"))])
def test_killed_and_stopped_equals_uninterrupted(tmp_path: Path, base: Path, case: str) -> None:
    name = "base" if case == "base" else "zero"
    inputs = {"policy": base} if name == "zero" else {}
    whole = prepare(tmp_path / "whole", name, inputs, OVERRIDES[case])
    cut = prepare(tmp_path / "cut", name, inputs, OVERRIDES[case])

    finish(whole)

    killed(cut, 5)  # after a checkpoint, between two
    stopped(cut, 7, STEPS)
    if not (cut / "manifest.json").exists():
        finish(cut)

    assert [x.step for x in read(cut / "journal.jsonl")] == list(range(1, STEPS + 1))
    assert results(cut) == results(whole)
    if name == "zero":  # there was something to lose: a signal, moved weights, a choice among evaluations
        lines = read(whole / "journal.jsonl")
        assert max(line.metrics.get("train/grad_norm", 0) for line in lines) > 0
        assert {key for line in lines for key in line.metrics} <= NAMES.keys()
        for line in lines:  # where the time goes adds up
            times = {k: v for k, v in line.metrics.items() if k.startswith("time/") and k != "time/tokens_per_second"}
            step = times.pop("time/step")
            assert sum(times.values()) == pytest.approx(step, rel=1e-6)
        assert results(whole)["model"]["model.safetensors"] != digest_files(base)["model.safetensors"]
        assert len({line.metrics["eval/reward"] for line in lines}) > 1
    if case == "ppo":
        assert [line.metrics["train/updates"] for line in lines[:3]] == [0, 0, 4]  # two steps of the value model alone
        assert max(line.metrics["rollout/resamples"] for line in lines) > 0
        assert {"value/loss", "reward/kl_penalty"} <= lines[-1].metrics.keys()
    digests = [json.loads((folder / "manifest.json").read_text())["digest"] for folder in (cut, whole)]
    assert digests[0] == digests[1]

    if case == "ahead":  # two rollouts of the first policy, then one step behind
        assert "off-policy by one step" in (whole / "manifest.json").read_text()
        assert lines[0].metrics["train/mismatch_kl"] < 1e-6 < max(line.metrics["train/mismatch_kl"] for line in lines[1:])
    if case in ("base", "ahead"):
        return
    # Going on from a checkpoint of it, as another stage with the same settings, takes the same steps.
    newest = max(step for step in steps(whole / "checkpoints") if step < STEPS)
    again = prepare(
        tmp_path / "again",
        name,
        inputs | {"continues": whole / "checkpoints" / f"step-{newest:06d}"},
        [*OVERRIDES[case], "stages.extra={kind: rl, policy: base}", f"stages.zero.continues=extra@{newest}"],
    )
    finish(again)
    found, expected = results(again), results(whole)
    before = dict(expected["curves"])[newest]["rollout/sampled_tokens"]  # each stage counts what it sampled itself
    for _, metrics in found["curves"]:
        metrics["rollout/sampled_tokens"] += before
    assert found["curves"] == expected["curves"][newest:]
    assert found["rollouts"].items() <= expected["rollouts"].items()
    assert len(found["rollouts"]) == STEPS - newest


def killed_after(folder: Path, base: Path, steps: int) -> Path:
    """An RL stage that was killed after so many steps, with a checkpoint every second one."""
    prepare(folder, "zero", {"policy": base}, [*RL, "stages.zero.checkpoints.every=2"])
    process = start(folder)
    wait_for_steps(folder, process, steps)
    process.kill()
    process.wait()
    return folder


@pytest.mark.slow
def test_a_torn_checkpoint_is_named_and_passed_over(tmp_path: Path, base: Path) -> None:
    folder = killed_after(tmp_path / "stage", base, steps=6)
    newest = max((folder / "checkpoints").glob("step-*"))
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    finish(folder)
    assert f"{newest.name} is passed over" in (folder / "log.txt").read_text()
    assert [x.step for x in read(folder / "journal.jsonl")] == list(range(1, STEPS + 1))
