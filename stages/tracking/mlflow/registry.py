"""What a gate's verdict becomes in MLflow: tags on the pipeline's run, and an alias in the model registry.

A registered model is called `<experiment>-<model>`; each model that a gate has judged is a version of it, once. The alias
`promoted` is on the newest one that passed, `candidate` on the newest that did not. The weights stay where they are: the
version's source is the logged model of `mlflow_records`, whose only file says so; its tags name folder and digest. (A folder of
ours as a source is refused by servers.)
"""

import re
from typing import Any

from mlflow.exceptions import MlflowException

from stages.store.folders import StageFolder
from stages.store.manifest import GATE, Manifest

PROMOTED, CANDIDATE = "promoted", "candidate"


def log_verdict(
    client: Any, experiment: str, parent: str, run_id: str, name: str, folder: StageFolder, done: Manifest, model: Any
) -> None:
    """Log the verdict of the gate called `name`; `model` is MLflow's logged model of what it judged. Safe to call twice.

    `parent`, `run_id`: runs of the pipeline and of the gate.
    """
    note = done.notes[GATE]
    registered, passed = registered_name(experiment, note["model"]), note["verdict"] == "passed"
    said = f"{note['verdict']}: {note['says']}"
    for run in (parent, run_id):
        client.set_tag(run, f"gate.{name}", said)
    version = _version(client, registered, run_id, folder, done, model)
    client.set_model_version_tag(registered, version, f"gate.{name}", said)
    # One model has one standing, its last.
    given, other = (PROMOTED, CANDIDATE) if passed else (CANDIDATE, PROMOTED)
    if str(client.get_registered_model(registered).aliases.get(other)) == version:
        client.delete_registered_model_alias(registered, other)
    client.set_registered_model_alias(registered, given, version)


def registered_name(experiment: str, model: str) -> str:
    """Name of a registered model; MLflow takes no `/` and `:`.

    >>> registered_name("team/quickstart", "zero")
    'team-quickstart-zero'
    """
    return re.sub(r"[/:]", "-", f"{experiment}-{model}")


def _version(client: Any, registered: str, run_id: str, folder: StageFolder, done: Manifest, model: Any) -> str:
    try:
        client.create_registered_model(registered)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    quoted = registered.replace("'", "''")
    found = client.search_model_versions(f"name = '{quoted}'", max_results=10_000)
    known = next((each for each in found if each.tags.get("digest") == done.digest), None)
    if known is None:
        tags = {"digest": done.digest, "folder": str(folder.output("model"))}
        known = client.create_model_version(registered, model.artifact_location, run_id, tags=tags, model_id=model.model_id)
    return str(known.version)
