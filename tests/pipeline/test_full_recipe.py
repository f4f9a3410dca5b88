"""The paper's seven stages as a user runs them, in the small; general prompts in the last RL are not judged."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from stages.tracking.journal import read
from tests.commands import r1
from tests.conftest import ROOT

MODELS = ["base", "zero", "cold_start", "reasoning", "rejection_sampling", "all_scenarios", "small_base", "distillation"]


@pytest.mark.slow
def test_the_seven_stages_run_from_one_recipe(tmp_path: Path) -> None:
    config = ROOT / "tests/pipeline/tiny-full.yaml"
    done = r1("run", config, "--json", "--set", f"runs={tmp_path / 'runs'}", timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads(done.stdout)
    assert list(document["models"]) == MODELS
    assert {s["status"] for s in document["stages"]} == {"done"}
    folders = {s["stage"]: Path(s["folder"]) for s in document["stages"]}

    def inputs(stage: str) -> dict[str, str]:
        record: dict[str, Any] = json.loads((folders[stage] / "config.json").read_text())
        return {role: Path(entry["path"]).parent.name for role, entry in record["inputs"].items()}

    both = {"data.0": folders["reasoning_data"].name, "data.1": folders["general_data"].name}
    assert inputs("rejection_sampling") == {"model": folders["base"].name, **both}, "the base again, and both kinds of data"
    assert inputs("distillation") == {"model": folders["small_base"].name, **both}
    for stage in ("reasoning_data", "general_data"):
        assert inputs(stage) == {"sampler": folders["reasoning"].name}
        rows = pq.read_table(folders[stage] / "dataset" / "train.parquet").to_pylist()
        assert rows
        assert all(row["accuracy"] == 1.0 for row in rows), "only right answers are learned"
    answers = [
        row
        for file in sorted((folders["all_scenarios"] / "rollouts").glob("step-*.parquet"))
        for row in pq.read_table(file).to_pylist()
    ]
    general = [row for row in answers if row.get("verifier") == "unjudged"]
    assert len(answers) == 2 * 4 * 4
    assert 0 < len(general) < len(answers)
    assert {row["verdict"] for row in general} == {"unjudged"}
    assert all(row["accuracy"] is None and row["reward"] is not None for row in general)
    judged = [row["verdict"] for row in answers if row not in general]
    assert set(judged) <= {"right", "wrong"}
    lines = read(folders["all_scenarios"] / "journal.jsonl")
    assert [line.step for line in lines] == [1, 2]
    mean = sum(verdict == "right" for verdict in judged) / len(judged)
    shares = [line.metrics["reward/accuracy"] for line in lines if "reward/accuracy" in line.metrics]
    assert min(shares) <= mean <= max(shares), "accuracy is of the judged alone"
