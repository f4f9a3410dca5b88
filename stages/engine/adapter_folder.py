"""Adapters on disk: a folder `adapter/` in peft's format inside the folder of the model that they stand on.

The weights beside it are those before training. transformers alone would load them without the adapters, so every reader here
goes through `read_adapter`, and `r1 export` says how others load both.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from stages.contract.errors import UserError
from stages.engine.adapters import adapters, insert_adapters
from stages.store.files import read_json

FOLDER = "adapter"
"""Name of the folder."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
"""What peft puts before the name of every layer."""


def has_adapter(folder: Path) -> bool:
    """Whether a model folder has adapters beside its weights."""
    return (folder / FOLDER).is_dir()


def write_adapter(model: nn.Module, folder: Path) -> None:
    """Write the adapters of `model`, in float32, into its folder; nothing when it has none. Whole weights are needed."""
    layers = adapters(model)
    if not layers:
        return
    first = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(layers),
    }
    parts = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
    tensors = {
        f"{_PREFIX}{name}.{theirs}": getattr(layer, own).detach().to("cpu", torch.float32).contiguous()
        for name, layer in layers.items()
        for own, theirs in parts.items()
    }
    target = folder / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    (target / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_adapter(model: Any, folder: Path) -> None:
    """Put the adapters of a model folder, if it has any, onto the model that was loaded from it.

    Raises UserError when they are damaged, of another kind, or do not fit the model.
    """
    if not has_adapter(folder):
        return
    source = folder / FOLDER
    mend = "copy the model folder again, with its adapter"
    try:
        config = read_json(source / CONFIG)
        _check_kind(config)
        insert_adapters(model, list(config["target_modules"]), int(config["r"]), float(config["lora_alpha"]))
        own = {
            f"{_PREFIX}{name}.{part}.weight": getattr(layer, part)
            for name, layer in adapters(model).items()
            for part in ("lora_A", "lora_B")
        }
        _copy(load_file(source / WEIGHTS), own)
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise UserError(f"the adapter cannot be loaded ({error})", where=str(source), mend=mend) from error


_OTHERS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "layer_replication")
"""Settings of peft that change what an adapter computes."""


def _check_kind(config: dict[str, Any]) -> None:
    """Raise ValueError for an adapter that computes something else than `AdaptedLinear` does."""
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise ValueError("only LoRA without biases is supported")
    if others := [name for name in _OTHERS if config.get(name)]:
        raise ValueError(f"`{others[0]}` is not supported")


def _copy(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> None:
    """Copy tensors by name. Raises ValueError when a name or a shape does not fit."""
    if odd := sorted(source.keys() ^ target.keys()):
        raise ValueError(f"`{odd[0]}` is on one side only")
    with torch.no_grad():
        for name, tensor in target.items():
            if source[name].shape != tensor.shape:
                raise ValueError(f"`{name}` is {tuple(source[name].shape)}, not {tuple(tensor.shape)}")
            tensor.copy_(source[name])
