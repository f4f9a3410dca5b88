"""RL with low-rank adapters: sampler and renewed reference have them in place; they are handed over beside the weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stages.tracking.journal import read
from tests.rl.test_resume import prepare
from tests.stage_process import finish
from tests.supervised.test_resume import inputs  # noqa: F401  a fixture

RL = [
    "stages.zero.steps=3",
    "stages.zero.lr=1e-1",
    "stages.zero.questions=2",
    "stages.zero.evaluation={every: 3, problems: 2}",
    "stages.zero.kl=0.01",
    "stages.zero.reference_every=2",
    "stages.zero.select=last",
    # A coin, so that a model that knows nothing earns something.
    "stages.zero.rewards={accuracy: 0, format: 0, language: 0, random: 1}",
    "stages.zero.lora={rank: 3, alpha: 6, targets: [q_proj, down_proj]}",
]


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero0", "zero3"])
def test_the_sampler_and_the_reference_follow_the_adapters(tmp_path: Path, inputs: dict[str, Path], zero: str) -> None:  # noqa: F811
    folder = prepare(tmp_path / "stage", "zero", {"policy": inputs["model"]}, [*RL, f"stages.zero.deepspeed={zero}"])
    finish(folder)
    lines = [line.metrics for line in read(folder / "journal.jsonl")]
    # On-policy: what sampled says of its tokens what the trainer says, after updates too.
    assert max(line["train/mismatch_max"] for line in lines) < 1e-4
    assert lines[0]["train/kl"] == pytest.approx(0, abs=1e-9)
    assert lines[1]["train/kl"] > 1e-4  # the policy has moved away
    assert lines[2]["train/kl"] == pytest.approx(0, abs=1e-7)  # the reference has become the policy
    before, after = (load_file(path / "model.safetensors") for path in (inputs["model"], folder / "model"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    adapter = load_file(folder / "model" / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in adapter} == {"q_proj", "down_proj"}
    assert all(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
    assert json.loads((folder / "manifest.json").read_text())["status"] == "done"
