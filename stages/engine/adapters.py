"""Low-rank adapters by the library peft, and the plain weights of an adapted model.

peft gives the adapters the number format of the weights they stand beside; DeepSpeed keeps float32 copies of what it trains.
Who samples, measures or takes over the model gets plain weights, with the adapters' products added.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stages.engine.settings import Lora
from stages.store.errors import UserError

ADAPTER = "default"
"""peft's name of the only adapter."""


def adapted(model: Any, lora: Lora | None, seed: int) -> Any:
    """The model with adapters, all else frozen; as it is when `lora` is None.

    Their first values are drawn from the seed; they change nothing yet. Raises UserError when a target is no layer of it, or an
    array of experts, whose adapters could not be added to it again.
    """
    if lora is None:
        return model
    from peft import LoraConfig, inject_adapter_in_model

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0, bias="none")
    _check_targets(model, lora)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    if any(hasattr(layer, "lora_A") and not isinstance(layer.get_base_layer(), nn.Linear) for layer in model.modules()):
        mend = "name linear layers, such as `targets: [q_proj, k_proj, v_proj, o_proj]`"
        raise UserError("experts that are one array cannot have adapters", where="lora.targets", mend=mend)
    return model


def _check_targets(model: nn.Module, lora: Lora) -> None:
    """Raises UserError for a target that no linear layer of the model is called; peft is content when one of them is."""
    names = {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    if not isinstance(lora.targets, str) and (unknown := sorted(set(lora.targets) - names)):
        mend = f"its linear layers are {', '.join(sorted(names))}"
        raise UserError(f"the model has no layer `{unknown[0]}`", where="lora.targets", mend=mend)


def is_adapted(model: nn.Module) -> bool:
    """Whether the model has adapters."""
    return any(hasattr(layer, "lora_A") for layer in model.modules())


def plain_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each weight of the model without adapters, whose products are added. Whole weights are needed."""
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    for name, tensor in model.state_dict().items():
        before, base, what = name.rpartition(".base_layer.")
        if before in layers and base:
            delta = layers[before].get_delta_weight(ADAPTER) if what == "weight" else 0
            yield f"{before}.{what}", tensor + delta
        elif name.partition(".lora_")[0] not in layers:
            yield name, tensor
