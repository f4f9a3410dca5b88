"""Gates in whole runs: one that stops, goes on after a word, warns, passes; and what MLflow has of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from stages.store.folders import StageFolder
from stages.store.manifest import StageRecord, write_manifest
from stages.tracking.mlflow.pipeline_run import PipelineTracking, default_uri
from tests.commands import r1, refused
from tests.conftest import ROOT
from tests.servers.stoppable import Stoppable

TINY = ROOT / "tests" / "pipeline" / "tiny.yaml"
RECIPE = """
extends: {tiny}
name: gated
runs: {runs}
stages:
  first: {{kind: gate, model: zero, better_than: base, margin: 0.99}}
  cold_start_data: {{sampler: first, filters: {{min_language: 0}}}}
  evaluation: {{models: [base, zero]}}
"""


def judged(folder: StageFolder, verdict: str, weights: str) -> Any:
    """A finished gate's folder."""
    folder.output("model").mkdir(parents=True)
    (folder.output("model") / "model.safetensors").write_text(weights)
    record = StageRecord(kind="gate", version=1, fingerprint="f" * 64, config={"kind": "gate"}, inputs={})
    folder.config.write_text(record.model_dump_json())
    note = {"verdict": verdict, "model": "zero", "says": "numbers"}
    facts = {"metrics": {"difference": 0.5}, "tokens": 0, "wall_seconds": 1.0, "device_seconds": 1.0}
    return write_manifest(folder, record, "model", notes={"gate": note}, **facts)


def aliases(client: MlflowClient, registered: str) -> dict[str, str]:
    """Alias -> version; a database gives numbers, a server texts."""
    return {alias: str(version) for alias, version in client.get_registered_model(registered).aliases.items()}


def registry(uri: str, folder: Path, experiment: str) -> None:
    """Three models are judged, one of them twice."""

    def tell(name: str, number: int, verdict: str, weights: str) -> str:
        place = StageFolder(folder / f"{number}")
        manifest = judged(place, verdict, weights)
        pipeline = PipelineTracking(uri, experiment, f"run-{number}", None, document={}, tags={})
        stage = pipeline.stage(name, place, None)
        stage.finish("FINISHED", manifest)
        pipeline.finish("FINISHED", {})
        again = PipelineTracking(uri, experiment, f"run-{number}", pipeline.parent_run_id, document={}, tags={})
        again.stage(name, place, stage.run_id).finish("FINISHED", manifest)  # a resumed run tells it once more
        again.finish("FINISHED", {})
        return pipeline.parent_run_id

    client, registered = MlflowClient(uri), f"{experiment}-zero"
    parent = tell("check", 1, "passed", "a")
    assert client.get_run(parent).data.tags["gate.check"] == "passed: numbers"
    assert aliases(client, registered) == {"promoted": "1"}
    tell("check", 2, "undecided", "b")
    assert aliases(client, registered) == {"promoted": "1", "candidate": "2"}
    tell("check", 3, "passed", "b")
    assert aliases(client, registered) == {"promoted": "2"}
    tell("other", 4, "failed", "b")
    assert aliases(client, registered) == {"candidate": "2"}
    versions = client.search_model_versions(f"name = '{registered}'")
    assert sorted(int(v.version) for v in versions) == [1, 2]
    second = client.get_model_version(registered, "2")
    assert second.tags["gate.check"] == "passed: numbers"
    assert second.tags["gate.other"] == "failed: numbers"
    # The weights stayed where they are.
    assert Path(second.tags["folder"], "model.safetensors").read_text() == "b"
    files = [Path(found).name for found in _downloaded(client, second.source, folder)]
    assert files == ["MLmodel"]


def _downloaded(client: MlflowClient, source: str, folder: Path) -> list[str]:
    from mlflow.artifacts import download_artifacts

    place = download_artifacts(source, dst_path=str(folder / "down"), tracking_uri=client.tracking_uri)
    return [str(path) for path in Path(place).rglob("*") if path.is_file()]


def test_the_registry_of_a_database(tmp_path: Path, mlflow_database: Path) -> None:
    shutil.copy(mlflow_database, tmp_path)
    registry(default_uri(tmp_path), tmp_path, "gates")


@pytest.mark.slow
def test_the_registry_of_a_server(tmp_path: Path) -> None:
    server = Stoppable("mlflow", tmp_path)
    server.start()
    try:
        registry(server.address, tmp_path / "stages", "gates")
    finally:
        server.end()


def finished(runs: Path) -> dict[str, int]:
    """Every manifest and when it was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in (runs / "stages").glob("*/manifest.json")}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_gate_stops_a_run_until_the_user_says_otherwise(tmp_path: Path) -> None:
    runs, recipe = tmp_path / "runs", tmp_path / "gated.yaml"
    recipe.write_text(RECIPE.format(tiny=TINY, runs=runs))
    until = ["--until", "cold_start_data"]
    stopped = r1("run", recipe, *until, "--json", timeout=900)
    assert stopped.returncode == 4, stopped.stderr[-3000:]
    document = json.loads(stopped.stdout)
    assert (document["status"], document["error"]["exit_status"]) == ("stopped", 4)
    assert "the gate `first` stopped the run: `zero` better than `base`: " in document["error"]["message"]
    assert "Traceback" not in stopped.stderr
    status = {stage["stage"]: stage["status"] for stage in document["stages"]}
    assert status["first"] == "done"
    assert status["cold_start_data"] == "pending"
    client = MlflowClient(document["mlflow"]["tracking_uri"])
    parent = client.get_run(document["mlflow"]["parent_run_id"])
    assert parent.info.status == "FAILED"
    assert parent.data.tags["gate.first"].split(":")[0] in ("failed", "undecided")
    assert aliases(client, "gated-zero") == {"candidate": "1"}
    before = finished(runs)

    again = r1("resume", "latest", "--runs", runs, timeout=400)
    assert again.returncode == 4, again.stderr[-3000:]
    assert finished(runs) == before

    assert "changes what `first` computes" in refused("resume", "latest", "--runs", runs, "--set", "stages.first.margin=0.5")
    warned = r1("resume", "latest", "--runs", runs, "--set", "stages.first.otherwise=warn", "--json", timeout=400)
    assert warned.returncode == 0, warned.stderr[-3000:]
    assert "the run goes on" in warned.stderr
    document = json.loads(warned.stdout)
    assert any(remark.startswith(("first: undecided: ", "first: failed: ")) for remark in document["remarks"])
    after = finished(runs)
    assert before.items() <= after.items(), "computed again"
    assert len(after) == len(before) + 1

    # Another gate: it alone is computed; who takes the model from it has the same input as before.
    recipe.write_text(recipe.read_text().replace(", margin: 0.99", ""))
    other = ["--set", "stages.first.better_than=null", "--set", "stages.first.not_worse_than=base"]
    passed = r1("run", recipe, *until, *other, "--set", "stages.first.tolerance=0.99", "--json", timeout=400)
    assert passed.returncode == 0, passed.stderr[-3000:]
    status = {stage["stage"]: stage["status"] for stage in json.loads(passed.stdout)["stages"]}
    assert status["first"] == "done"
    assert {status[name] for name in ("base", "zero", "evaluation.base", "evaluation.zero", "cold_start_data")} == {"reused"}
    assert aliases(client, "gated-zero") == {"promoted": "1"}
