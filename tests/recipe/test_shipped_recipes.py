"""Every shipped recipe and study goes through load, schema, plan and doctor; every kind of stage has a workload or is free."""

import json
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import yaml

from flows.cli.app import main
from flows.cli.plan_text import shown
from flows.doctor.finding import Finding
from flows.doctor.recipe import examine_recipe
from flows.plan.cost import STARTS_ONLY, WORKLOADS, Place, stage_cost
from flows.plan.counts import Counts
from flows.plan.shapes import known_shapes, model_source
from stages.contract.config import StageConfig
from stages.costs.devices import cpu_device, rates_of, shipped
from stages.costs.fit import fitted
from stages.kinds.registry import MODULES, stage_kind
from stages.recipe.resolve import load_recipe, recipe_schema
from tests.conftest import ROOT

TOY = "{source: toy, count: 20, split: held_out}"
FOLDERS = ("configs", "configs/recipes", "configs/studies")


def is_recipe(path: Path) -> bool:
    document = yaml.safe_load(path.read_text())
    return isinstance(document, dict) and bool({"stages", "study"} & document.keys())


RECIPES = sorted(p.relative_to(ROOT).as_posix() for folder in FOLDERS for p in (ROOT / folder).glob("*.yaml") if is_recipe(p))
RECIPES += ["configs/plan/calibration.yaml"]


def overrides(path: str, tmp_path: Path) -> list[str]:
    """Problems and models that a recipe leaves to the user, or that lie with the user: the toy and a tiny folder."""
    found = [f"runs={tmp_path / 'runs'}"]
    if "recipes/" in path or "gsm8k" in path or "mawps" in path:
        found += ["shared.problems={source: toy, count: 20}", f"shared.held_out={TOY}"]
        found += [f"shared.decontaminate={{against: [{TOY}]}}"]
    if "mawps" in path:
        found += [f"stages.{name}.held_out={TOY}" for name in ("evaluation", "second_test")]
    if "studies/" in path:
        found.append("study.seeds=[0]")
    if "recipes/" in path:
        names = ["base", "small_base"] if "full" in path else ["base"]
        folder = tmp_path / "model"
        if not folder.exists():
            make_model(folder)
        found += [f"stages.{name}.path={folder}" for name in names]
    return found


def make_model(folder: Path) -> None:
    """The files of a model folder that are looked at before a run; the weights are a place holder."""
    folder.mkdir()
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    document = {"model_type": "llama", "vocab_size": 8, "max_position_embeddings": 10**6, **shape}
    (folder / "config.json").write_text(json.dumps(document))
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 7}}, "added_tokens": []}))


def test_all_shipped_recipes_are_among_those_tested() -> None:
    all_of_them = {p for p in (ROOT / "configs").rglob("*.yaml") if is_recipe(p)}
    parts = {p for p in all_of_them if p.parent.name == "shared"}  # extended by others, and no recipe by themselves
    assert {ROOT / name for name in RECIPES} == all_of_them - parts
    assert len(RECIPES) >= 15


@pytest.mark.parametrize("path", RECIPES)
def test_shipped_recipe_is_planned_and_looked_at(
    path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.doctor.tasks.builtin_tasks", lambda _: frozenset({"gsm8k"}))
    settings = overrides(path, tmp_path)
    recipe = load_recipe(ROOT / path, settings)
    sets = [part for text in settings for part in ("--set", text)]
    assert main(["plan", str(ROOT / path), *sets, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [stage["stage"] for stage in document["stages"]] == list(recipe.stages)
    assert all(stage["hours"] > 0 for stage in document["stages"])
    assert not any("is not known: only its start" in text for text in document["assumptions"])
    assert "assumed:" in shown(document)
    findings = list(examine_recipe(str(ROOT / path), settings, network=False))
    assert [f for f in findings if f.state == "fail" and f.about == "recipe"] == []
    assert findings[0].check == "recipe"


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return recipe_schema()


@pytest.fixture(scope="module")
def validator(schema: dict[str, Any]) -> Any:
    """The schema's validator, which checks the schema itself once."""
    kind = jsonschema.validators.validator_for(schema)
    kind.check_schema(schema)
    return kind(schema)


@pytest.mark.parametrize("path", RECIPES)
def test_shipped_recipe_fits_the_schema(path: str, tmp_path: Path, schema: dict[str, Any], validator: Any) -> None:
    recipe = load_recipe(ROOT / path, overrides(path, tmp_path))
    assert recipe.document.keys() <= schema["properties"].keys()
    validator.validate(recipe.document)


def test_every_kind_has_a_workload_or_only_starts() -> None:
    assert WORKLOADS.keys() | STARTS_ONLY == MODULES.keys()
    assert WORKLOADS.keys() & STARTS_ONLY == set()


def test_model_source_is_the_first_model_among_the_stages_own_fields() -> None:
    configs = load_recipe(ROOT / "configs/quickstart-gates.yaml").stages
    names = {"zero_gate": "zero", "zero": "base", "cold_start": "base", "cold_start_data": "zero_gate", "evaluation": ""}
    assert {name: model_source(configs[name]) for name in names} == names


def test_a_new_kind_without_a_workload_is_counted_as_its_start_and_said() -> None:
    recipe = load_recipe(ROOT / "configs/quickstart.yaml")
    shapes, unknown = known_shapes(recipe, {}, {})
    assert unknown == {}
    counts = Counts(recipe, {})
    new = StageConfig(kind="new")
    spent = stage_cost("new", new, shapes["base"], counts, Place(cpu_device({"starts": 3.0}, 1e9, "")))
    assert (spent.total, spent.tokens) == (3.0, 0)
    assert "what a stage of kind `new` takes is not known: only its start is counted" in counts.assumptions


def test_the_shipped_calibration_holds_the_fit_of_its_runs() -> None:
    rates, _ = rates_of(Path("/nowhere"))
    assert rates == pytest.approx(fitted(shipped()), rel=1e-6)


def test_findings_are_documents(tmp_path: Path) -> None:
    finding = Finding("a", "warn", "b", "c", "d", "recipe")
    assert Finding(**json.loads(json.dumps(vars(finding)))) == finding
    assert str(finding.error()) == "d: b; c"
    assert get_args(StageConfig.model_fields["kind"].annotation) == ()
    assert all(stage_kind(name).name == name for name in MODULES)
