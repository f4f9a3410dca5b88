"""Finished stages read as measurements, and `r1 plan --calibrate`."""

import json
from pathlib import Path

import pytest

from flows.cli.app import main
from flows.plan.measured import measured
from stages.costs.amounts import ADAM_TRAFFIC
from stages.costs.shape import shape_of
from stages.kinds.registry import stage_kind
from stages.rollout.records import write_groups
from stages.store.files import write_json
from stages.store.folders import StageFolder
from stages.store.manifest import StageRecord, write_manifest
from stages.tracking.journal import Journal
from tests.conftest import group_of

MODEL = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 32,
    "dtype": "float32",
}
TIMES = {"step": 10.0, "eval": 1.0, "forward": 2.0, "backward": 3.0, "optimizer": 0.5, "sample": 2.5, "checkpoint": 0.25}


def finished(folder: Path, **changes: object) -> StageFolder:
    """An `rl` stage of two steps, two groups each: prompts of 4 tokens, answers of 5 and 3."""
    settings = {"kind": "rl", "policy": "base", "problems": {"source": "toy", "count": 9}, "kl": 0.0, "steps": 2, "samples": 2}
    config = stage_kind("rl").config.model_validate(
        settings | {"held_out": {"source": "toy", "count": 9, "split": "held_out"}, "questions": 2, **changes}
    )
    stage = StageFolder(folder)
    record = StageRecord(
        kind="rl", version=2, fingerprint=folder.name.ljust(64, "0"), config=config.model_dump(mode="json"), inputs={}
    )
    stage.output("model").mkdir(parents=True)
    (stage.output("model") / "config.json").write_text(json.dumps(MODEL))
    write_json(stage.config, record.model_dump())
    journal = Journal(stage.journal, keep_through=0)
    for step in (1, 2):
        groups = [group_of(n, [1, 2, 3, 4], [[5] * 5, [6] * 3], [1.0, 0.0]) for n in range(2)]
        write_groups(stage.rollouts / f"step-{step:06d}.parquet", groups)
        metrics = {f"time/{name}": seconds for name, seconds in TIMES.items()}
        journal.append(step, 2, metrics | {"rollout/zero_variance": 0.5, "rollout/length": 4.0})
    facts = {"metrics": {}, "notes": {}, "remarks": [], "tokens": 32, "device_seconds": 1.0}
    write_manifest(stage, record, "model", wall_seconds=27.0, **facts)
    return stage


def test_an_rl_stage_is_counted_from_its_rollouts(tmp_path: Path) -> None:
    found = measured(finished(tmp_path / "rl-a"))
    assert found is not None
    shape, spans = shape_of(MODEL, ""), found.spans
    assert {name: span.seconds for name, span in spans.items()} == {
        "update": 2 * 5.0,
        "optimizer": 2 * 0.5,
        "sample": 2 * 2.5,
        "rest": 2 * (10 - 1 - 2 - 3 - 0.5 - 2.5),
        "start": 27.0 - 20.0,
    }
    assert found.seconds == 18.0
    # One of two groups has a signal: its prompt once, answers without their last token; 8 tokens predicted.
    tokens, attended = 4 + 4 + 2, 10 + (4 * 4 + 10) + (2 * 4 + 3)
    forward = 2 * shape.body * tokens + shape.seen() * attended + 2 * shape.head * 8
    assert spans["update"].amounts["product_flop"] == pytest.approx(2 * 3 * forward)
    assert spans["optimizer"].amounts["optimizer_bytes"] == 2 * ADAM_TRAFFIC * shape.parameters
    # Both groups were sampled: four answers fly until the longest ends.
    assert spans["sample"].amounts["token_steps"] == 2 * 5
    assert spans["sample"].amounts["decode_flop"] == pytest.approx(
        2 * (2 * (shape.body + shape.head) * 16 + shape.seen() * 2 * (5 * 4 + 15 + 3 * 4 + 6))
    )
    assert spans["rest"].amounts == {"answers": 8.0, "steps": 2.0, "stored_bytes": 0.0}
    assert found.facts["mean length"] == 4.0


def test_two_processes_halve_the_texts_and_share_the_processor(tmp_path: Path) -> None:
    one, two = (measured(finished(tmp_path / f"rl-{n}", kl=0.001, deepspeed="zero2", compute={"processes": n})) for n in (1, 2))
    assert one is not None
    assert two is not None
    assert two.spans["update"].amounts["product_flop"] == pytest.approx(one.spans["update"].amounts["product_flop"])
    assert one.spans["update"].amounts["exchange_bytes"] == 0
    assert two.spans["update"].amounts["exchange_bytes"] == 2 * 2 * shape_of(MODEL, "").parameters * 4 / 2
    assert two.processes == 2


def test_stages_that_tell_nothing_are_passed_over(tmp_path: Path) -> None:
    assert measured(StageFolder(tmp_path / "rl-none")) is None
    assert measured(finished(tmp_path / "model-a")) is None  # of a kind without work on a model
    assert measured(finished(tmp_path / "rl-cuda", compute={"device": "cuda"})) is None
    assert measured(finished(tmp_path / "rl-lora", lora={"rank": 4})) is None


def test_calibrate_writes_what_later_plans_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    for number in range(2):
        finished(runs / "stages" / f"rl-{number}")
    assert main(["plan", "--calibrate", str(runs)]) == 2
    assert "2 finished stages can be measured, 3 are wanted" in capsys.readouterr().err
    finished(runs / "stages" / "rl-2", questions=2, minibatches=2)
    assert main(["plan", "--json", "--calibrate", str(runs)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [entry["run"] for entry in document["runs"]] == ["rl-0", "rl-1", "rl-2"]
    assert Path(document["file"]) == runs / "calibration.json"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: little\nruns: {runs}\nstages:\n  base: {{kind: toy_base}}\n")
    assert main(["plan", str(recipe)]) == 0
    assert "3 runs measured on this machine" in capsys.readouterr().out
