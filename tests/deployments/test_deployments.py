"""What infra/ declares for Prefect, held against Prefect's own models and templates; what `r1 deploy` makes of it."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import prefect.server.api
import pytest
import yaml
from prefect.cli.deploy._models import PrefectYamlModel
from prefect.events.schemas.automations import AutomationCore
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import validate

from flows.cli.app import parser
from flows.deployments.entrypoints import run_config, run_stage
from flows.deployments.prefect_objects import AUTOMATIONS_FILE, POOLS
from flows.deployments.register import IMAGE_FOLDER, PREFECT_FILE, deployment_document
from stages.contract.errors import UserError
from stages.recipe.resolve import load_recipe
from tests.conftest import ROOT

FLOWS = {"flows/deployments/entrypoints.py:run_config": run_config, "flows/deployments/entrypoints.py:run_stage": run_stage}
CONFIG = "configs/quickstart.yaml"


@pytest.fixture(scope="module")
def declared() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(PREFECT_FILE.read_text())
    return document


def template(kind: str) -> dict[str, Any]:
    """Prefect's own base job template of a type of work pool."""
    file = Path(prefect.server.api.__file__).parent / "collections_data" / "views" / "aggregate-worker-metadata.json"
    workers = {name: worker for workers in json.loads(file.read_text()).values() for name, worker in workers.items()}
    found: dict[str, Any] = workers[kind]["default_base_job_configuration"]
    return found


def strict(variables: dict[str, Any]) -> dict[str, Any]:
    return {**variables, "additionalProperties": False}


def test_prefect_reads_the_file(declared: dict[str, Any]) -> None:
    model = PrefectYamlModel.model_validate(declared)
    names = [deployment.name for deployment in model.deployments]
    assert names == ["quickstart", "quickstart-full", "smollm2-gsm8k", "qwen2.5-1.5b", "qwen2.5-7b-8gpu", "stage"]
    kinds = {kind for d in declared["deployments"] for s in d["schedules"] for kind in ("cron", "interval") if kind in s}
    assert kinds == {"cron", "interval"}
    assert all((ROOT / d.parameters["config"]).is_file() for d in model.deployments)


def test_parameters_fit_their_flow(declared: dict[str, Any]) -> None:
    for deployment in declared["deployments"]:
        schema = parameter_schema(FLOWS[deployment["entrypoint"]].fn).model_dump_for_openapi()
        assert validate(deployment["parameters"], schema) == []


@pytest.mark.parametrize("flow", FLOWS.values(), ids=["config", "stage"])
def test_the_form_says_what_each_field_is(flow: Any) -> None:
    schema = parameter_schema(flow.fn).model_dump_for_openapi()
    assert all(len(field["description"]) > 20 for field in schema["properties"].values())
    assert all({"type", "anyOf"} & field.keys() for field in schema["properties"].values())
    good: dict[str, Any] = {"config": CONFIG, **({"stage": "zero"} if flow is run_stage else {})}
    assert validate(good, schema) == []
    for wrong in ({"retries": -1}, {"retries": "many"}, {"overrides": "a=b"}, {"config": None}, {"retry_delay": 1e9}):
        assert validate({**good, **wrong}, schema), wrong


@pytest.mark.parametrize("kind", ["process", "docker", "kubernetes"])
def test_job_variables_are_those_of_the_template(declared: dict[str, Any], kind: str) -> None:
    own = POOLS / f"{kind}.json"
    variables = (json.loads(own.read_text()) if own.exists() else template(kind))["variables"]
    jsonschema.Draft7Validator.check_schema(variables)
    jsonschema.validate(declared["definitions"][kind], strict(variables))
    assert declared["definitions"][kind]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"


def test_the_kubernetes_template_is_prefect_s_with_additions() -> None:
    ours, theirs = json.loads((POOLS / "kubernetes.json").read_text()), template("kubernetes")
    added = {"gpus", "runs_claim"}
    assert ours["variables"]["properties"].keys() - theirs["variables"]["properties"].keys() == added
    pod = ours["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > 30
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0].pop("volumeMounts")}
    assert mounts == {"runs": f"{IMAGE_FOLDER}/runs", "shm": "/dev/shm"}
    assert {volume["name"] for volume in pod.pop("volumes")} == mounts.keys()
    assert pod["containers"][0]["resources"]["limits"].pop("nvidia.com/gpu") == "{{ gpus }}"
    del pod["terminationGracePeriodSeconds"]
    for name in added:
        del ours["variables"]["properties"][name]
    assert ours == theirs


def test_prefect_reads_the_automations() -> None:
    declared = yaml.safe_load(AUTOMATIONS_FILE.read_text())["automations"]
    dead, failing = map(AutomationCore.model_validate, declared)
    assert dead.trigger.within.total_seconds() == 300  # type: ignore[union-attr]
    assert [action.type for action in (*dead.actions, *failing.actions)] == ["change-flow-run-state", "pause-deployment"]


def document(*arguments: str, config: str = CONFIG) -> dict[str, Any]:
    options = parser().parse_args(["deploy", config, *arguments])
    return deployment_document(load_recipe(ROOT / config), options)


def test_a_recipe_of_its_own_and_its_schedule() -> None:
    deployment = document("--interval", "6h", "--retries", "2", config="configs/quickstart-full.yaml")["deployments"][0]
    assert deployment["schedules"] == [{"slug": "quickstart-full", "interval": 21600, "timezone": "UTC", "active": True}]
    assert (deployment["parameters"]["retries"], deployment["parameters"]["parallel"]) == (2, 1)
    assert deployment["description"] == "All stages of the paper on the toy problem."
    assert deployment["parameters"]["overrides"] == [f"runs={Path('runs').absolute()}"]


def test_a_single_stage() -> None:
    deployment = document("--stage", "zero", "--cron", "5 4 * * *", "--timezone", "Europe/Berlin")["deployments"][0]
    assert deployment["entrypoint"] == f"{ROOT}/flows/deployments/entrypoints.py:run_stage"
    assert (deployment["name"], deployment["parameters"]["stage"]) == ("quickstart-zero", "zero")
    assert deployment["schedules"][0]["cron"] == "5 4 * * *"
    assert validate(deployment["parameters"], parameter_schema(run_stage.fn).model_dump_for_openapi()) == []


def test_in_an_image_everything_starts_from_the_image_s_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    whole = document("--pool", "cluster", "--pool-type", "kubernetes", "--set", "shared.seed=1")
    deployment = whole["deployments"][0]
    assert deployment["work_pool"]["name"] == "cluster"
    assert deployment["work_pool"]["job_variables"]["runs_claim"] == "r1-runs"
    assert deployment["entrypoint"] == "flows/deployments/entrypoints.py:run_config"
    assert (deployment["parameters"]["config"], deployment["parameters"]["overrides"]) == (CONFIG, ["shared.seed=1"])
    assert whole["pull"] == [{"prefect.deployments.steps.set_working_directory": {"directory": IMAGE_FOLDER}}]
    elsewhere = tmp_path / "mine.yaml"
    elsewhere.write_text(f"extends: {ROOT / CONFIG}")
    with pytest.raises(UserError, match="the image has only what is in the clone"):
        document("--pool-type", "docker", config=str(elsewhere))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--interval", "often"), "--interval: `often` is not valid; for example 6h"),
        (("--interval", "0h"), "--interval: `0h` is not valid"),
        (("--interval", "6h", "--cron", "5 4 * * *"), "either --cron or --interval"),
    ],
)
def test_a_schedule_that_is_none(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError) as caught:
        document(*arguments)
    assert said in str(caught.value)
