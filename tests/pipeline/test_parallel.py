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

from tests.conftest import ROOT
from tests.pipeline.conftest import environment
from tests.pipeline.operation import digests
from tests.pipeline.servers import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
OVERRIDES = ("zero.steps=4", "evaluation.samples=96", "evaluation.chunk=2")
SET = ("--set", "shared.compute.threads=1", *(word for text in OVERRIDES for word in ("--set", f"stages.{text}")))


def evaluations(record: dict[str, Any], status: str) -> list[dict[str, Any]]:
    return [stage for stage in record["stages"].values() if stage["kind"] == "evaluate_model" and stage["status"] == status]


def overlaps(record: dict[str, Any]) -> int:
    """Pairs of evaluations that ran at the same time, as their manifests have it."""
    spans = []
    for stage in evaluations(record, "done"):
        file = Path(stage["folder"]) / "manifest.json"
        spans.append((file.stat().st_mtime - json.loads(file.read_text())["wall_seconds"], file.stat().st_mtime))
    return sum(a[0] < b[1] and b[0] < a[1] for a, b in itertools.combinations(spans, 2))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The record of a run whose stages came one after the other."""
    run = Run(tmp_path_factory.mktemp("one"), *SET)
    assert run.end(600) == 0, run.said()
    return run.record()


def test_side_by_side_they_overlap_and_give_the_same(tmp_path: Path, one: dict[str, Any]) -> None:
    run = Run(tmp_path, *SET, "--parallel", "3")
    assert run.end(600) == 0, run.said()
    several = run.record()
    assert several["status"] == "done"
    assert overlaps(one) == 0
    assert overlaps(several) >= 2
    assert digests(several) == digests(one)
    assert len(digests(one)) == len(one["stages"])
    assert several["models"] == one["models"]
    names = [line.partition(":")[0] for line in run.said().splitlines() if ": evaluate_model starts" in line]
    assert sorted(names) == [f"evaluation.{model}" for model in sorted(one["models"])]


def test_asked_to_end_all_stop_and_all_are_resumed(tmp_path: Path, one: dict[str, Any]) -> None:
    run = Run(tmp_path, *SET, "--parallel", "3")
    try:
        run.wait_for("two evaluations at once", lambda: len(evaluations(run.record(), "running")) >= 2, 600)
        running = [stage["folder"] for stage in evaluations(run.record(), "running")]
        run.wait_for("chunks", lambda: all(any(Path(f, "rollouts").glob("*.parquet")) for f in running), 300)
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.end(600) == 75, run.said()
    finally:
        run.process.kill()
    record = run.record()
    assert record["status"] == "interrupted"
    stopped = evaluations(record, "interrupted")
    assert len(stopped) >= 2
    for stage in stopped:
        outcome = json.loads((Path(stage["folder"]) / "attempts" / "1" / "outcome.json").read_text())
        assert outcome["status"] == "interrupted"  # each was asked, and came to a boundary
    assert "running" not in {stage["status"] for stage in record["stages"].values()}
    command = [sys.executable, "-m", "flows.cli", "resume", "latest", "--runs", str(run.runs), "--parallel", "3"]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, timeout=600)
    assert digests(run.record()) == digests(one)
