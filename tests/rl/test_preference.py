"""The last part of the RL for all scenarios: it goes on from the stage before, with a reward model's word in the reward."""

from pathlib import Path

import pytest

from stages.kinds.registry import stage_kind
from stages.recipe.resolve import load_recipe
from stages.tracking.journal import read
from tests.conftest import ROOT
from tests.kinds.test_model import judge  # noqa: F401 - a fixture
from tests.rl.test_resume import base  # noqa: F401 - a fixture
from tests.stage_process import finish, prepare, said

LAST = [
    "stages.zero.steps=4",
    "stages.reward_model={kind: model, task: preference, path: FOLDER}",
    "stages.last={kind: rl, policy: base, continues: zero@4, steps: 6, questions: 4, samples: 4, deepspeed: zero0,"
    " preset: r1, kl: 0.0, minibatches: 1, lr: 1.0e-4, rewards: {accuracy: 1.0, format: 0.2, verifier: exact, preference: 0.5,"
    " preference_model: {stage: reward_model, device: cpu}}}",
]


@pytest.mark.slow
def test_the_reward_model_of_a_stage_judges_a_stage_that_continues_another(tmp_path: Path, base: Path, judge: Path) -> None:  # noqa: F811
    stages = load_recipe(ROOT / "tests/pipeline/tiny.yaml", [text.replace("FOLDER", str(judge)) for text in LAST]).stages
    model = finish(prepare(tmp_path / "reward_model", stages["reward_model"], {})) / stage_kind("model").output
    zero = finish(prepare(tmp_path / "zero", stages["zero"], {"policy": base}))
    inputs = {
        "policy": base,
        "continues": zero / "checkpoints" / "step-000004",
        "rewards.preference_model.stage": model,
    }
    last = finish(prepare(tmp_path / "last", stages["last"], inputs))
    lines = [line for line in read(last / "journal.jsonl") if "reward/preference" in line.metrics]
    assert [line.step for line in lines] == [5, 6], said(last)
    for line in lines:
        parts = line.metrics
        assert parts["reward/preference_std"] > 0
        assert parts["reward/total"] == pytest.approx(
            parts["reward/accuracy"] + 0.2 * parts["reward/format"] + 0.5 * parts["reward/preference"], abs=1e-5
        )
