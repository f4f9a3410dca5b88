"""What runs stages on clusters: Slurm's scripts by shellcheck, Kubernetes' manifests by the schemas of their kinds.

No cluster is asked. The Job inside the JobSet, the claim and the network policy are checked by Kubernetes' own schemas, the
JobSet around it by the models that Kubeflow's trainer has of it; both refuse fields that they do not know.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.launch import kubernetes
from flows.launch.launcher import Job
from stages.contract.config import Compute
from stages.store.folders import StageFolder
from tests.conftest import ROOT
from tests.infra.conftest import check, tool

MANIFESTS = ROOT / "infra" / "kubernetes"
JOB_SET = """
import json, sys
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
given = json.load(sys.stdin)
kept = JobsetV1alpha2JobSet.model_validate(given).model_dump(mode="json", by_alias=True, exclude_none=True)

def lost(given, kept, path=""):
    if isinstance(given, dict):
        for key, value in given.items():
            if key not in kept:
                yield f"{path}.{key}"
            else:
                yield from lost(value, kept[key], f"{path}.{key}")
    elif isinstance(given, list):
        for number, value in enumerate(given):
            yield from lost(value, kept[number], f"{path}.{number}")

unknown = [name for name in lost(given, kept) if ".metadata" not in name]
sys.exit(f"no such field: {unknown}" if unknown else 0)
"""


def rendered(tmp_path: Path) -> dict[str, Any]:
    """The JobSet as the launcher applies it."""
    folder = StageFolder(tmp_path / "rl-0123")
    compute = Compute(hosts=4, processes=8, launcher="kubernetes")
    return kubernetes.rendered(yaml.safe_load(kubernetes.MANIFEST.read_text()), Job(folder, folder.new_attempt(), compute), "")


@pytest.mark.parametrize("script", ["run.sbatch", "stage.sbatch"])
def test_slurm_scripts(script: str) -> None:
    check(tool("shellcheck"), ROOT / "infra" / "slurm" / script)


def by_kubernetes(path: Path) -> str:
    done = check(tool("kubernetes-validate"), "--strict", path)
    said = done.stdout + done.stderr
    assert "Couldn't find schema" not in said
    return said


def test_what_many_machines_share() -> None:
    said = by_kubernetes(MANIFESTS / "storage.yaml")
    assert "persistentvolumeclaim/r1-runs" in said
    assert "networkpolicy/r1-ranks" in said


@pytest.mark.parametrize("filled_in", [False, True])
def test_the_job_inside_the_job_set(tmp_path: Path, filled_in: bool) -> None:
    document = rendered(tmp_path) if filled_in else yaml.safe_load(kubernetes.MANIFEST.read_text())
    (ranks,) = document["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": ranks["name"]}, **ranks["template"]}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    assert "job/ranks" in by_kubernetes(tmp_path / "job.yaml")


@pytest.mark.parametrize("filled_in", [False, True])
def test_the_job_set_itself(tmp_path: Path, filled_in: bool) -> None:
    document = rendered(tmp_path) if filled_in else yaml.safe_load(kubernetes.MANIFEST.read_text())
    # The pod is checked with the Job: here quantities are not written as everybody writes them.
    document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"] = {"spec": {"containers": [{"name": "r1"}]}}
    script, text = tmp_path / "check.py", json.dumps(document)
    script.write_text(JOB_SET.replace("json.load(sys.stdin)", f"json.loads({text!r})"))
    check(python_of_the_tools(), script)
    script.write_text(JOB_SET.replace("json.load(sys.stdin)", f"json.loads({text.replace('maxRestarts', 'mostRestarts')!r})"))
    with pytest.raises(AssertionError, match="no such field"):
        check(python_of_the_tools(), script)


def python_of_the_tools() -> str:
    """The interpreter beside `kubernetes-validate`, which has Kubeflow's models too."""
    place = Path(tool("kubernetes-validate")).parent / "python"
    return str(place) if place.exists() else sys.executable


def test_pods_have_no_more_rights_than_they_need() -> None:
    document = yaml.safe_load(kubernetes.MANIFEST.read_text())
    job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert not any("value" in item and "TOKEN" in item["name"] for item in container["env"])
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert document["spec"]["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
