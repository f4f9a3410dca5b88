"""A tiny study as a user meets it: killed in the middle and resumed, it reports the same as one that was not."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands import environment, r1, refused
from tests.conftest import ROOT
from tests.pipeline.test_whole_run import kill_tree_when

STUDY = {
    "extends": str(ROOT / "tests/pipeline/tiny.yaml"),
    "name": "tiny-study",
    "stages": {"zero": {"steps": 9, "most_tokens": 1200, "select": "last", "evaluation": {"every": 2}}},
    "study": {
        "seeds": [0, 1],
        "variants": {"grpo": {"kl": 0.01}, "ppo": {"algorithm": "ppo", "kl": 0.01, "critic.lr": 1e-3}},
        "claims": {
            "better": {"says": "GRPO is more accurate.", "of": "grpo", "above": "ppo"},
            "gain": {"says": "GRPO gains.", "of": "grpo", "above": "start"},
        },
    },
}
ARMS = ["grpo-s0", "ppo-s0", "grpo-s1", "ppo-s1"]


def written(folder: Path, runs: Path) -> Path:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump({**STUDY, "runs": str(runs)}, sort_keys=False))
    return file


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole")
    done = r1("study", written(folder, folder / "runs"), "--json", timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return {"runs": folder / "runs", "file": folder / "study.yaml", "document": json.loads(done.stdout)}


@pytest.mark.slow
def test_a_study_has_its_table_and_verdicts(whole: dict[str, Any]) -> None:
    document = whole["document"]
    assert [s["stage"] for s in document["stages"]] == [
        "base",
        "base-eval",
        *(name for arm in ARMS for name in (arm, f"{arm}-eval")),
        "study",
    ]
    assert list(document["models"]) == ["base", "grpo", "ppo"]
    study = document["study"]
    assert [claim["name"] for claim in study["claims"]] == ["better", "gain"]
    assert {claim["verdict"] for claim in study["claims"]} <= {"holds", "fails", "undecided"}
    assert study["variants"]["ppo"]["accuracy"]["n"] == 2
    assert "value/explained_variance_last" in study["variants"]["ppo"]
    # The step in which the budget was used up was the last.
    for name in ARMS:
        (stage,) = (s for s in document["stages"] if s["stage"] == name)
        lines = [json.loads(x)["metrics"] for x in Path(stage["folder"], "journal.jsonl").read_text().splitlines()]
        sampled = [metrics["rollout/sampled_tokens"] for metrics in lines]
        assert sampled[-2] < 1200 <= sampled[-1]
        assert "eval/accuracy" in lines[-1], "its last policy was evaluated"
    costs = study["costs"]
    assert costs["peak_memory_mib"]["ppo"]["mean"] > costs["peak_memory_mib"]["grpo"]["mean"] * 0.9
    assert costs["seconds_per_step"]["grpo"]["mean"] > 0
    shown = r1("status", document["run"], "--runs", whole["runs"])
    assert f"study: {study['claims'][0]['sentence']}" in shown.stdout

    from mlflow import MlflowClient

    facts = document["mlflow"]
    client = MlflowClient(facts["tracking_uri"])
    parent = client.get_run(facts["parent_run_id"])
    children = client.search_runs([parent.info.experiment_id], f"tags.mlflow.parentRunId = '{facts['parent_run_id']}'")
    assert {c.data.tags["stage"] for c in children} == {s["stage"] for s in document["stages"]}
    assert parent.data.metrics["eval/ppo/accuracy"] == document["models"]["ppo"]["accuracy"]


@pytest.mark.slow
def test_killed_and_resumed_it_reports_the_same(whole: dict[str, Any], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    command = [sys.executable, "-m", "flows.cli", "study", str(written(tmp_path, runs)), "--json"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL, start_new_session=True)

    def second_arm_trains() -> bool:
        return sum(len(p.read_text().splitlines()) >= 3 for p in runs.glob("stages/rl-*/journal.jsonl")) >= 2

    try:
        kill_tree_when(process, second_arm_trains)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    done = r1("resume", "latest", "--runs", runs, "--json", timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (report(document) for document in (json.loads(done.stdout), whole["document"]))
    for name in ("summary.json", "study.md", "learning.png", "final.png"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


@pytest.mark.slow
def test_arms_of_a_finished_study_are_reused(whole: dict[str, Any]) -> None:
    done = r1("study", whole["file"], "--only", "ppo", "--seeds", "1", "--json", timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    status = {s["stage"]: s["status"] for s in json.loads(done.stdout)["stages"]}
    assert status.pop("study") == "done"
    assert set(status) == {"base", "base-eval", "ppo-s1", "ppo-s1-eval"}
    assert set(status.values()) == {"reused"}


def report(document: dict[str, Any]) -> Path:
    (stage,) = (s for s in document["stages"] if s["stage"] == "study")
    return Path(stage["folder"]) / "report"


def test_a_recipe_without_a_study_is_refused() -> None:
    line = refused("study", ROOT / "tests/pipeline/tiny.yaml")
    assert "not a study" in line and "r1 run" in line
