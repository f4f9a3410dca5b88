"""A stage as a JobSet of Kubernetes: one pod a machine, each with an `r1 join`, that meet at the first one's name.

The manifest (image, volumes, GPUs, secrets) is the user's file, infra/kubernetes/stage.yaml unless another is named; here it is
filled in and handed to `kubectl`. This process must see the runs folder under the path that the pods have it under.
"""

import copy
import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import IO, Any

import yaml

from flows.launch.launcher import Job
from flows.launch.local import ROOT
from stages.contract.errors import UserError

MANIFEST = ROOT / "infra" / "kubernetes" / "stage.yaml"
_PORT = 29400
_LOOK_SECONDS = 5.0
"""Seconds between two questions to the cluster."""
_DELETE_SECONDS = 60.0
"""Seconds beyond the grace that pods may take to go."""


class JobSet:
    """A JobSet that was applied."""

    def __init__(self, name: str, kubectl: list[str], log: IO[bytes]) -> None:
        self.name, self._kubectl, self._log = name, kubectl, log
        self._looked = 0.0
        self._status: int | None = None

    def poll(self) -> int | None:
        """0 when it is completed, 1 when it failed or is gone, None while it runs, or the cluster does not answer."""
        if self._status is None and time.monotonic() - self._looked > _LOOK_SECONDS:
            self._looked = time.monotonic()
            told = self._ask("get", "jobset", self.name, "--ignore-not-found", "--output=json")
            if told.returncode == 0:
                self._status = ended(told.stdout)
            if self._status is not None:
                self._say(self._ask("logs", f"--selector=jobset.sigs.k8s.io/jobset-name={self.name}", "--prefix", "--tail=200"))
        return self._status

    def end(self, grace_s: float) -> None:
        """Delete it, unless it has ended: its pods are asked, and killed when their own grace is over."""
        if self._status is not None:
            return
        within = f"--timeout={grace_s + _DELETE_SECONDS:.0f}s"
        now = ["--grace-period=1"] if grace_s == 0 else []
        self._say(self._ask("delete", "jobset", self.name, "--ignore-not-found", "--cascade=foreground", within, *now))
        self._status = 1

    def _ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*self._kubectl, *arguments], capture_output=True, text=True, check=False)

    def _say(self, told: subprocess.CompletedProcess[str]) -> None:
        self._log.write((told.stdout + told.stderr).encode())
        self._log.flush()


def ended(document: str) -> int | None:
    """What `kubectl get --output=json` says of a JobSet's end: 0, 1, or None. An empty text is one that is gone."""
    if not document.strip():
        return 1
    conditions = json.loads(document).get("status", {}).get("conditions", [])
    true = {condition["type"] for condition in conditions if condition["status"] == "True"}
    return 0 if "Completed" in true else 1 if "Failed" in true else None


def start(job: Job, log: IO[bytes]) -> JobSet:
    """Apply the JobSet. One of an earlier attempt, which this pipeline lost sight of, is deleted first.

    Raises UserError without `kubectl`, for a manifest that is no JobSet, or one that the cluster refuses.
    """
    if shutil.which("kubectl") is None:
        mend = "install it, or use the launcher `local`"
        raise UserError("there is no `kubectl` on the PATH", where="compute.launcher", mend=mend)
    path = Path(job.compute.manifest).absolute() if job.compute.manifest else MANIFEST
    document = rendered(_read(path), job, str(path))
    name, namespace = document["metadata"]["name"], document["metadata"].get("namespace")
    kubectl = ["kubectl", *([f"--namespace={namespace}"] if namespace else [])]
    subprocess.run([*kubectl, "delete", "jobset", name, "--ignore-not-found"], stdout=log, stderr=log, check=False)
    text = yaml.safe_dump(document)
    (job.attempt / "jobset.yaml").write_text(text, encoding="utf-8")
    done = subprocess.run([*kubectl, "apply", "--filename=-"], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(
            f"the cluster refuses the JobSet ({done.stderr.strip()})", where=str(path), mend="see `kubectl get jobset`"
        )
    return JobSet(name, kubectl, log)


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"cannot be read ({error})", where=str(path), mend="name another with `compute.manifest`") from error


def rendered(template: Any, job: Job, where: str) -> dict[str, Any]:
    """The JobSet of a stage: its name, its number of pods, what they run.

    Raises UserError when `template` has no job of ranks.
    """
    document, compute = copy.deepcopy(template), job.compute
    try:
        if document["kind"] != "JobSet":
            raise UserError(f"a {document['kind']}, and no JobSet", where=where, mend="see infra/kubernetes/stage.yaml")
        (ranks,) = document["spec"]["replicatedJobs"]
        spec = ranks["template"]["spec"]
        container = spec["template"]["spec"]["containers"][0]
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(
            "no JobSet with one job and a container", where=where, mend="see infra/kubernetes/stage.yaml"
        ) from error
    name = re.sub("[^a-z0-9-]+", "-", f"r1-{job.folder.path.name}".lower())
    document["metadata"]["name"] = name
    spec["parallelism"] = spec["completions"] = compute.hosts
    meet = ["--rendezvous", compute.rendezvous or f"{name}-{ranks['name']}-0-0.{name}:{_PORT}"] if compute.hosts > 1 else []
    container["args"] = [str(job.folder.path), "--attempt", str(job.attempt), *meet]
    return dict(document)
