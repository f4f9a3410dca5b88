"""The recipe as a user meets it, in the small: killed in the middle, resumed, run again, compared.

Its first stages in the fast tests, the whole recipe in the slow ones.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from stages.tracking.journal import read
from tests.commands import environment, r1, r1_in_process
from tests.conftest import ROOT

SHORT, TINY = (ROOT / "tests" / "pipeline" / f"{name}.yaml" for name in ("short", "tiny"))
MODELS = {SHORT: ["base", "zero"], TINY: ["base", "zero", "cold_start", "reasoning"]}
STEPS = 20
"""Of R1-Zero, with a checkpoint every second one: more than elsewhere, so that there is a middle."""


def kill_tree_when(process: subprocess.Popen[bytes], ready: Any) -> None:
    """SIGKILL the process and everything that came from it, at once, as soon as `ready()`."""
    until = time.monotonic() + 240
    while not ready():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.02)
    tree = psutil.Process(process.pid).children(recursive=True)
    for member in [psutil.Process(process.pid), *tree]:
        member.kill()
    process.wait()
    psutil.wait_procs(tree, timeout=10)


@pytest.fixture(scope="module", params=[SHORT, pytest.param(TINY, marks=pytest.mark.slow)], ids=lambda path: path.stem)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run whose process tree was killed in the middle of R1-Zero, and what `r1 resume` made of it."""
    runs = tmp_path_factory.mktemp("whole") / "runs"
    config = request.param
    overrides = [f"runs={runs}", f"stages.zero.steps={STEPS}"]
    command = [sys.executable, "-m", "flows.cli", "run", str(config), *(x for o in overrides for x in ("--set", o))]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL, start_new_session=True)

    def in_the_middle() -> bool:
        journals = list(runs.glob("stages/rl-*/journal.jsonl"))
        return bool(journals) and len(read(journals[0])) >= 5

    try:
        kill_tree_when(process, in_the_middle)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    (base,) = runs.glob("stages/toy_base-*/manifest.json")
    before = (base.stat().st_mtime_ns, base.read_bytes())
    (zero,) = runs.glob("stages/rl-*")
    kept = {p.name: p.stat().st_mtime_ns for p in (zero / "rollouts").glob("step-*.parquet")}
    killed = json.loads(r1_in_process("status", "latest", "--runs", runs, "--json").stdout)
    done = r1("resume", "latest", "--runs", runs, "--json", timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (base.stat().st_mtime_ns, base.read_bytes()) == before, "a finished stage was touched"
    document = json.loads(done.stdout)
    return {"config": config, "runs": runs, "killed": killed, "document": document, "overrides": overrides, "kept": kept}


def test_a_killed_run_is_resumed_to_its_end(run: dict[str, Any]) -> None:
    assert run["killed"]["status"] != "done"
    document = run["document"]
    assert document["status"] == "done"
    assert list(document["models"]) == MODELS[run["config"]]
    for row in document["models"].values():
        assert (row["problems"], row["samples"]) == (12, 2)
        assert 0 <= row["accuracy"] <= 1
        keys = {"accuracy", "accuracy_stderr", "cons_at_k", "mean_length", "format", "language", "truncated"}
        assert keys <= row.keys()
    assert {s["status"] for s in document["stages"]} == {"done"}
    report = Path(document["report"])
    assert report == run["runs"] / "pipelines" / document["run"] / "report.html"
    assert all(f"evaluation.{model}" in report.read_text() for model in MODELS[run["config"]])


def test_the_resumed_stage_went_on_from_its_checkpoint(run: dict[str, Any]) -> None:
    (zero,) = (s for s in run["document"]["stages"] if s["stage"] == "zero")
    folder = Path(zero["folder"])
    assert [line.step for line in read(folder / "journal.jsonl")] == list(range(1, STEPS + 1))
    assert sorted(p.name for p in (folder / "attempts").iterdir()) == ["1", "2"]
    # A checkpoint is written every second step, and the fifth step was seen: the first four are not taken again.
    written = {p.name: p.stat().st_mtime_ns for p in (folder / "rollouts").glob("step-*.parquet")}
    taken_again = [name for name, time_ in run["kept"].items() if written[name] != time_]
    assert len(written) == STEPS
    assert len(taken_again) <= 2
    assert all(f"step-{step:06d}.parquet" not in taken_again for step in (1, 2, 3, 4))


def test_curves_in_mlflow_have_no_gap_and_no_repetition(run: dict[str, Any]) -> None:
    from mlflow import MlflowClient

    facts = run["document"]["mlflow"]
    client = MlflowClient(facts["tracking_uri"])
    parent = client.get_run(facts["parent_run_id"])
    assert parent.info.status == "FINISHED"
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.mlflow.parentRunId = '{facts['parent_run_id']}'", max_results=100
    )
    assert sorted(c.data.tags["stage"] for c in children) == sorted(s["stage"] for s in run["document"]["stages"])
    assert {c.info.status for c in children} == {"FINISHED"}
    (zero,) = (c for c in children if c.data.tags["stage"] == "zero")
    (folder,) = (Path(s["folder"]) for s in run["document"]["stages"] if s["stage"] == "zero")
    for metric in ("reward/total", "train/loss", "rollout/length"):
        # A step in which no group had a signal has no loss.
        steps = [line.step for line in read(folder / "journal.jsonl") if metric in line.metrics]
        assert steps == list(range(1, STEPS + 1)) or metric == "train/loss"
        assert [point.step for point in client.get_metric_history(zero.info.run_id, metric)] == steps
    for model, measured in run["document"]["models"].items():
        assert parent.data.metrics[f"eval/{model}/accuracy"] == measured["accuracy"]


def test_again_everything_is_reused_and_another_evaluation_runs_alone(run: dict[str, Any]) -> None:
    command = ["run", run["config"], "--json", *(x for o in run["overrides"] for x in ("--set", o))]
    again = r1(*command, "--set", "stages.evaluation.samples=1")
    assert again.returncode == 0, again.stderr[-3000:]
    document = json.loads(again.stdout)
    status = {s["stage"]: s["status"] for s in document["stages"]}
    models = MODELS[run["config"]]
    evaluations = {"evaluation", *(f"evaluation.{model}" for model in models)}
    assert status == {name: "done" if name in evaluations else "reused" for name in status}
    assert status.keys() >= {*models, *evaluations}

    names = [run["document"]["run"], document["run"]]
    compared = json.loads(r1_in_process("compare", *names, "--runs", run["runs"], "--json").stdout)
    assert compared["runs"] == names
    assert [key for key in compared["params"] if key.startswith("evaluation")] == list(compared["params"])
    assert compared["metrics"]["zero"]["samples"] == {names[0]: 2, names[1]: 1}


@pytest.mark.slow
def test_a_retry_of_the_run_itself_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    options = [
        "--until",
        "zero",
        "--retries",
        "2",
        "--retry-delay",
        "1",
        "--json",
        "--set",
        f"runs={runs}",
        "--set",
        "stages.zero.steps=30",
    ]
    command = [sys.executable, "-m", "flows.cli", "run", str(TINY), *options]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True, start_new_session=True)

    def journal() -> list[int]:
        found = list(runs.glob("stages/rl-*/journal.jsonl"))
        return [line.step for line in read(found[0])] if found else []

    try:
        until = time.monotonic() + 240
        while len(journal()) < 7:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        (stage,) = (p for p in psutil.Process(process.pid).children(recursive=True) if "stages" in p.cmdline())
        stage.kill()  # as the system does when memory runs out
        document = json.loads(process.communicate(timeout=300)[0])
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0
    assert document["status"] == "done"
    (zero,) = runs.glob("stages/rl-*")
    assert sorted(p.name for p in (zero / "attempts").iterdir()) == ["1", "2"]
    assert journal() == list(range(1, 31))
    first = min(int(p.name.split("-")[1]) for p in (zero / "checkpoints").iterdir())
    assert first > 0
    assert json.loads((zero / "attempts" / "1" / "ended.json").read_text())["status"] == 3
