"""A run whose stages are all finished: recorded without a server and without heavy imports; anything else is a run as usual."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.pipeline.all_reused import all_finished
from flows.pipeline.unsent import unsent
from flows.runs.record import RunRecord
from flows.runs.selection import select
from flows.runs.stage_record import Finished, stage_record
from flows.servers.prefect_env import servers_named
from stages.kinds.registry import stage_kind
from stages.recipe.resolve import ResolvedRecipe, load_recipe
from stages.store.files import write_json
from stages.store.folders import Runs, StageFolder
from stages.store.locks import hold
from stages.store.manifest import write_manifest
from tests.commands import environment

HEAVY = ("prefect", "mlflow", "torch", "transformers", "datasets", "deepspeed", "lm_eval", "accelerate", "vllm")


def recipe_file(folder: Path, more: dict[str, Any] | None = None) -> Path:
    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "1+1=", "completion": "2"}\n')
    stages = {name: {"kind": "dataset", "path": str(rows), "seed": seed} for name, seed in (("first", 0), ("second", 1))}
    file = folder / "two.yaml"
    file.write_text(json.dumps({"name": "two", "runs": str(folder / "runs"), "stages": stages | (more or {})}))
    return file


def finish(recipe: ResolvedRecipe, notes: dict[str, Any] | None = None) -> dict[str, StageFolder]:
    """Every stage of the recipe, finished without running it."""
    finished: dict[str, Finished] = {}
    for name, config in recipe.stages.items():
        record = stage_record(config, finished, recipe.code_folders)
        folder = Runs(recipe.runs).stage(record.kind, record.fingerprint)
        output = stage_kind(config.kind).output
        write_json(folder.config, record.model_dump())
        write_json(folder.output(output) / "out.json", {})
        facts = {"metrics": {}, "notes": notes or {}, "tokens": 0, "wall_seconds": 2.5, "device_seconds": 2.5}
        finished[name] = Finished(folder, write_manifest(folder, record, output, **facts))
    return {name: item.folder for name, item in finished.items()}


def test_run_of_finished_stages_imports_nothing_heavy_and_starts_no_server(tmp_path: Path) -> None:
    file = recipe_file(tmp_path)
    folders = finish(load_recipe(file))
    code = (
        "import json, sys; from flows.cli import main; status = main(['run', sys.argv[1], '--json']);"
        "print(json.dumps([status, sorted({name.partition('.')[0] for name in sys.modules})]), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), timeout=120)
    status, imported = json.loads(done.stderr.splitlines()[-1])
    document = json.loads(done.stdout)
    assert (status, document["status"]) == (0, "done")
    assert [(s["status"], s["folder"], s["seconds"]) for s in document["stages"]] == [
        ("reused", str(folders[name].path), 2.5) for name in ("first", "second")
    ]
    assert not set(HEAVY) & set(imported)
    assert not (tmp_path / "runs" / "prefect").exists()
    assert not (tmp_path / "runs" / "mlflow.db").exists()
    assert Path(document["report"]).is_file()
    (waiting,) = unsent(Runs(tmp_path / "runs"))
    assert RunRecord.open(waiting).name == document["run"]


def test_all_finished_gives_the_manifests_of_the_selected_stages(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path))
    folders = finish(recipe)
    for stages, selection in (["first", "second"], select(recipe)), (["first"], select(recipe, None, "first")):
        found = all_finished(recipe, selection)
        assert found is not None
        assert {name: item.folder for name, item in found.items()} == {name: folders[name] for name in stages}
        assert {item.manifest.output for item in found.values()} == {"dataset"}


@pytest.mark.parametrize("fault", ["missing manifest", "damaged output", "damaged config", "changed file", "fresh", "in use"])
def test_all_finished_is_none_when_a_stage_cannot_be_reused_as_it_is(tmp_path: Path, fault: str) -> None:
    recipe = load_recipe(recipe_file(tmp_path))
    folder = finish(recipe)["second"]
    fresh: list[str] = []
    assert all_finished(recipe, select(recipe)) is not None
    match fault:
        case "missing manifest":
            folder.manifest.unlink()
        case "damaged output":
            (folder.output("dataset") / "out.json").write_text("{ }")
        case "damaged config":
            folder.config.write_text("{}")
        case "changed file":
            (tmp_path / "rows.jsonl").write_text('{"prompt": "1+2=", "completion": "3"}\n')
        case "fresh":
            fresh = ["second"]
        case "in use":
            with hold(folder, lambda _: None):
                assert all_finished(recipe, select(recipe)) is None
            return
    assert all_finished(recipe, select(recipe, fresh=fresh)) is None


@pytest.mark.parametrize(
    ("verdict", "otherwise", "goes_on"), [("passed", "stop", True), ("failed", "warn", True), ("failed", "stop", False)]
)
def test_all_finished_leaves_a_gate_that_stops_to_the_run(tmp_path: Path, verdict: str, otherwise: str, goes_on: bool) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    toy = {"held_out": {"source": "toy", "count": 4, "split": "held_out"}, "rewards": {"verifier": "exact"}}
    more = {
        "one": {"kind": "model", "path": str(model)},
        "two": {"kind": "model", "path": str(model), "seed": 1},
        "compared": {"kind": "evaluate", "models": ["one", "two"], **toy},
        "better": {"kind": "gate", "model": "two", "better_than": "one", "evaluation": "compared", "otherwise": otherwise},
    }
    recipe = load_recipe(recipe_file(tmp_path, more))
    finish(recipe, {"gate": {"verdict": verdict, "says": "…"}})
    assert (all_finished(recipe, select(recipe)) is not None) == goes_on


@pytest.mark.parametrize("name", ["PREFECT_API_URL", "MLFLOW_TRACKING_URI"])
def test_servers_named_by_the_environment_or_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other in ("PREFECT_API_URL", "PREFECT_HOME", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(other, raising=False)
    assert not servers_named(None, tmp_path)
    assert not servers_named(f"sqlite:///{tmp_path}/mlflow.db", tmp_path)
    assert servers_named("http://127.0.0.1:5000", tmp_path)
    monkeypatch.setenv(name, "http://127.0.0.1:4200/api")
    assert servers_named(None, tmp_path)
