"""Stages side by side: they overlap, come to the same digests as one after the other, and are stopped and resumed together."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.commands import environment
from tests.conftest import ROOT
from tests.deployments.operation import digests
from tests.servers.stoppable import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
OVERRIDES = ("zero.steps=4", "evaluation.samples=192", "evaluation.chunk=1")
SET = ("--set", "shared.compute.threads=1", *(word for text in OVERRIDES for word in ("--set", f"stages.{text}")))


def evaluations(record: dict[str, Any], status: str) -> list[dict[str, Any]]:
    return [stage for stage in record["stages"].values() if stage["kind"] == "evaluate_model" and stage["status"] == status]


def newest(runs: Path) -> dict[str, Any]:
    """The record of the run that began last."""
    file = max(runs.glob("pipelines/*/pipeline.json"), key=lambda file: file.parent.name)
    record: dict[str, Any] = json.loads(file.read_text())
    return record


def overlaps(record: dict[str, Any]) -> int:
    """Pairs of evaluations that ran at the same time, as their manifests have it."""
    spans = []
    for stage in evaluations(record, "done"):
        file = Path(stage["folder"]) / "manifest.json"
        spans.append((file.stat().st_mtime - json.loads(file.read_text())["wall_seconds"], file.stat().st_mtime))
    return sum(a[0] < b[1] and b[0] < a[1] for a, b in itertools.combinations(spans, 2))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose stages came one after the other."""
    run = Run(tmp_path_factory.mktemp("one"), *SET)
    assert run.end(600) == 0, run.said()
    assert overlaps(run.record()) == 0
    return run


def test_the_whole_recipe_side_by_side_gives_the_same(tmp_path: Path, one: Run) -> None:
    run, alone = Run(tmp_path, *SET, "--parallel", "3"), newest(one.runs)
    assert run.end(600) == 0, run.said()
    several = run.record()
    assert several["status"] == "done"
    assert digests(several) == digests(alone)
    assert len(digests(alone)) == len(alone["stages"])
    assert several["models"] == alone["models"]


def test_evaluations_overlap_and_give_the_same(one: Run) -> None:
    before = newest(one.runs)
    run = Run(one.runs.parent, *SET, "--parallel", "3", "--fresh", "evaluation")
    assert run.end(600) == 0, run.said()
    again = newest(one.runs)
    assert len(evaluations(again, "done")) == 4
    assert overlaps(again) >= 2
    assert {stage["folder"] for stage in evaluations(again, "done")}.isdisjoint(s["folder"] for s in before["stages"].values())
    assert digests(again) == digests(before)


def test_asked_to_end_all_stop_and_all_are_resumed(one: Run) -> None:
    before = newest(one.runs)
    run = Run(one.runs.parent, *SET, "--parallel", "3", "--fresh", "evaluation")
    try:
        run.wait_for("its record", lambda: newest(one.runs)["started"] != before["started"])
        run.wait_for("two evaluations at once", lambda: len(evaluations(newest(one.runs), "running")) >= 2, 300)
        running = [stage["folder"] for stage in evaluations(newest(one.runs), "running")]
        run.wait_for("a chunk", lambda: any(any(Path(f, "rollouts").glob("*.parquet")) for f in running), 300)
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.end() == 75, run.said()
    finally:
        run.process.kill()
    record = newest(one.runs)
    assert record["status"] == "interrupted"
    stopped = evaluations(record, "interrupted")
    assert len(stopped) >= 2
    for stage in stopped:
        outcome = json.loads((Path(stage["folder"]) / "attempts" / "1" / "outcome.json").read_text())
        assert outcome["status"] == "interrupted"  # each was asked, and came to a boundary
    assert "running" not in {stage["status"] for stage in record["stages"].values()}
    command = [sys.executable, "-m", "flows.cli", "resume", "latest", "--runs", str(run.runs), "--parallel", "3"]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, timeout=600)
    assert newest(one.runs)["status"] == "done"
    assert digests(newest(one.runs)) == digests(before)
