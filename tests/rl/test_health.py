"""An RL stage whose rewards have gone bad ends with one line, after a checkpoint; with the alarm off it goes on from there."""

import json
import re

import pytest

from stages.engine.checkpoint.checkpointer import steps
from stages.store.files import read_json
from stages.tracking.journal import read
from tests.rl.test_resume import base, prepare  # noqa: F401 - a fixture
from tests.stage_process import finish

BAD = [
    "stages.zero.steps=8",
    "stages.zero.rewards.functions={odd: {function: 'tests.rewards.reward_functions:raising_on_wrong_answers'}}",
    "stages.zero.checkpoints.every=3",
    "stages.zero.evaluation.every=8",
]


@pytest.mark.slow
def test_a_stage_without_verdicts_is_stopped_and_goes_on_when_told_to(tmp_path, base):  # noqa: F811
    health = "stages.zero.health={window: 4, canary_every: 2, stop: [no_verdict]}"
    folder = prepare(tmp_path / "zero", "zero", {"policy": base}, [*BAD, health])
    for _ in range(2):  # started again it says the same, from its journal
        finish(folder, status=2)
        outcome = read_json(max(folder.glob("attempts/*/outcome.json")))
        assert re.search(r"\d\d% of the answers of 4 steps have no verdict", outcome["message"])
        assert "take the alarm out of `health.stop`" in outcome["message"]
    first = len(read(folder / "journal.jsonl"))
    assert first in (4, 5)
    assert steps(folder / "checkpoints")[-1] == first
    record = json.loads((folder / "config.json").read_text())
    record["config"]["health"]["stop"] = []
    (folder / "config.json").write_text(json.dumps(record))
    finish(folder)
    lines = read(folder / "journal.jsonl")
    assert [line.step for line in lines if line.metrics.get("health/no_verdict")] == [4, 5, 6, 7, 8]
    assert [line.step for line in lines if line.metrics.get("health/canaries_missed") == 0] == [2, 4, 6, 8]
    assert all(0.1 < line.metrics["rollout/no_verdict"] <= 1 for line in lines)
    assert "rewards: alarm `no_verdict` in 5 steps" in read_json(folder / "manifest.json")["remarks"]
