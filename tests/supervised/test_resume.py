"""Supervised training that is killed and stopped in its middle ends with the same bits: model, curves, held-out loss."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.kinds.sft import SFTConfig
from stages.problems.toy import END, PAD, SYMBOLS, VOCABULARY, save_toy_tokenizer
from stages.store.files import digest_files
from stages.tracking.journal import read
from tests import stage_process
from tests.rl.test_resume import results
from tests.stage_process import finish, killed, stopped

STEPS = 20


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model and two datasets."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    end, pad = SYMBOLS.index(END), SYMBOLS.index(PAD)
    size = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=end, pad_token_id=pad, **size))
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    model.save_pretrained(folder / "model")
    save_toy_tokenizer(folder / "model")
    rng = random.Random(0)
    for name, count in (("0", 130), ("1", 30)):
        rows = [
            {
                "prompt": "".join(rng.choices("0123456", k=8)) + "=?",
                "completion": "<think>" + "".join(rng.choices("0123456+*,=", k=rng.randrange(20, 90))) + "</think>",
                "problem_id": f"{name}:{number // 2}",
            }
            for number in range(count)
        ]
        (folder / name).mkdir()
        pq.write_table(pa.Table.from_pylist(rows), folder / name / "train.parquet")
    return {"model": folder / "model", "data.0": folder / "0", "data.1": folder / "1"}


def prepare(folder: Path, inputs: dict[str, Path], **fields: Any) -> Path:
    config = SFTConfig.model_validate({"kind": "sft", "model": "base", "data": {"large": 3, "small": 1}, **SETTINGS, **fields})
    return stage_process.prepare(folder, config, inputs)


# 144 of 160 documents are trained on, twice: 20 steps of 15, the last of 3.
SETTINGS = {
    "epochs": 2,
    "batch": 15,
    "lr": 3e-3,
    "warmup_steps": 3,
    "validation": {"share": 0.1, "every": 4},
    "checkpoints": {"every": 3},
    "packing": {"micro_tokens": 200},
}
LORA = {"lora": {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj", "up_proj"]}}


def finished(folder: Path, *, processes: int = 1) -> dict[str, Any]:
    """Let the stage run to its end; its manifest."""
    finish(folder, processes)
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return manifest


@pytest.mark.parametrize(
    ("fields", "and_stopped"),
    [
        pytest.param({}, False, id="killed"),
        pytest.param({}, True, id="killed-and-stopped", marks=pytest.mark.slow),
        pytest.param(LORA, True, id="adapters", marks=pytest.mark.slow),
    ],
)
def test_killed_and_stopped_equals_uninterrupted(
    tmp_path: Path, inputs: dict[str, Path], fields: dict[str, Any], and_stopped: bool
) -> None:
    whole, cut = (prepare(tmp_path / name, inputs, **fields) for name in ("whole", "cut"))
    expected = finished(whole)

    killed(cut, 5)  # after a checkpoint, between two
    assert len(read(cut / "journal.jsonl")) < STEPS
    if and_stopped:
        stopped(cut, 8, STEPS)
    found = finished(cut)

    assert found["digest"] == expected["digest"]
    assert found["metrics"] == expected["metrics"]
    assert results(cut) == results(whole)
    lines = read(cut / "journal.jsonl")
    assert [line.step for line in lines] == list(range(1, STEPS + 1))
    # Before the first step, every fourth, after the last; the headline is the last.
    assert [line.step for line in lines if "eval/loss" in line.metrics] == [4, 8, 12, 16, 20]
    assert [line.step for line in lines if "eval/loss_before" in line.metrics] == [1]
    metrics = expected["metrics"]
    assert metrics["eval/loss"] == lines[-1].metrics["eval/loss"]
    assert metrics["eval/loss_before"] == lines[0].metrics["eval/loss_before"] > metrics["eval/loss"]
    assert metrics["documents"] + metrics["held_out_documents"] == 160
    assert 16 <= metrics["held_out_documents"] <= 17
    assert {"eval/loss/large", "eval/loss/small"} <= metrics.keys()
    assert [round(line.metrics["train/lr"] * 1000, 9) for line in lines[:4]] == [1, 2, 3, 3]
    assert digest_files(whole / "model") != digest_files(inputs["model"])
    names = {
        name: json.loads((path / "config.json").read_text()) for name, path in (("a", whole / "model"), ("b", inputs["model"]))
    }
    assert names["a"]["architectures"] == names["b"]["architectures"]


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"lora": {**LORA["lora"], "merge": True}}], ids=["all", "lora"])
def test_two_processes_under_zero3_end_as_one_does(tmp_path: Path, inputs: dict[str, Path], fields: dict[str, Any]) -> None:
    from safetensors.torch import load_file

    one = finished(prepare(tmp_path / "one", inputs, **fields))
    two = finished(prepare(tmp_path / "two", inputs, deepspeed="zero3", **fields), processes=2)
    for name in ("loss", "eval/loss", "eval/loss_before", "eval/loss/large", "eval/loss/small"):
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-4)
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")]
    begin = load_file(inputs["model"] / "model.safetensors")
    assert begin.keys() == weights[0].keys() == weights[1].keys()
    moved = sum(float((weights[0][name] - tensor).square().sum()) for name, tensor in begin.items()) ** 0.5
    apart = sum(float((weights[0][name] - weights[1][name]).square().sum()) for name in begin) ** 0.5
    assert moved > 0.5
    assert apart / moved <= 1e-2
