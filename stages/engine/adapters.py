"""Low-rank adapters in place (LoRA, arXiv 2106.09685): W x + (alpha / rank) B A x, beside weights that stay as they are.

A and B are float32 whatever the number format of W, because a small update does not survive in 16 bits: added to bfloat16
weights, of entries of B at 1e-5 six per cent arrive. Nor would it survive as a second sum, added to a product that is already
rounded; so B A x is the starting value of the product W x, whose sum is kept in float32 by every library and rounded once.
Trainer, reference and samplers all compute it this way. Weights have the adapters' products added only for those that can read
nothing else (`plain_weights`, `merged`).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from stages.contract.errors import UserError
from stages.engine.settings import Lora

PARTS = (".lora_A", ".lora_B")
"""How the names of an adapter's two matrices end."""


class AdaptedLinear(nn.Linear):
    """A frozen linear layer with an adapter. The parameters are its own, so ZeRO-3 gathers all of them for a forward pass."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        """Share the weights of `base`. A is drawn as a linear layer's weight is, B is 0: the layer computes as `base` does."""
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.alpha = rank, alpha
        # float64 only beside float64 weights, which the tests have.
        dtype = torch.promote_types(torch.float32, base.weight.dtype)
        drawn = nn.Linear(base.in_features, rank, bias=False).weight.detach()
        self.lora_A = nn.Parameter(drawn.to(base.weight.device, dtype))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device, dtype=dtype))

    @property
    def scale(self) -> float:
        """Factor of the adapter's product."""
        return self.alpha / self.rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (rank, in) and scale × B (out, rank), in the number format of the weights."""
        dtype = self.weight.dtype
        return self.lora_A.to(dtype), (self.lora_B * self.scale).to(dtype)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """(out, in) scale × B A, in the adapter's own number format."""
        return (self.lora_B @ self.lora_A) * self.scale

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  nn.Linear's name
        """(…, out) of (…, in)."""
        a, b = self.factors()
        rows = input.reshape(-1, input.shape[-1])
        product = torch.addmm(linear(linear(rows, a), b), rows, self.weight.t())
        if self.bias is not None:
            product = product + self.bias
        return product.reshape(*input.shape[:-1], self.out_features)


def adapted(model: Any, lora: Lora | None, seed: int) -> Any:
    """The model with adapters to be trained and all else frozen; as it is when `lora` is None.

    The first values are drawn from the seed and change nothing yet. A model that was loaded with adapters of the same settings
    continues them. Raises UserError for a target that is no linear layer, for experts that are one array, and for a model
    loaded with other adapters.
    """
    if is_adapted(model):
        _check_continues(model, lora)
    elif lora is None:
        return model
    else:
        names = _targets(model, lora)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name in names:
                _insert(model, name, lora.rank, lora.alpha)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(PARTS))
    return model


def is_adapted(model: nn.Module) -> bool:
    """Whether the model has adapters."""
    return any(isinstance(layer, AdaptedLinear) for layer in model.modules())


def adapters(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Name -> layer of each that has an adapter."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, AdaptedLinear)}


def insert_adapters(model: nn.Module, names: list[str], rank: int, alpha: float) -> None:
    """Give the layers of those names adapters. Raises KeyError for a name that is no linear layer."""
    layers = dict(model.named_modules())
    for name in names:
        if type(layers.get(name)) is not nn.Linear:
            raise KeyError(name)
        _insert(model, name, rank, alpha)


def same_shape(model: Any) -> Any:
    """A model of the same architecture and number format, with adapters where `model` has them. Its values mean nothing."""
    own, dtype = type(model)(model.config), next(model.parameters()).dtype
    for parameter in own.parameters():  # not the buffers: the angles of a rotary embedding are float32 in every model
        parameter.data = parameter.data.to(dtype)
    own.generation_config = model.generation_config
    for name, layer in adapters(model).items():
        _insert(own, name, layer.rank, layer.alpha)
    return own


def base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each weight but the adapters'."""
    return ((name, tensor) for name, tensor in model.state_dict().items() if not name.endswith(PARTS))


def plain_weights(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each weight, the adapters' products added. Whole weights are needed.

    dtype: number format of the floating-point weights; None: each its own, which in 16 bits loses most of a small update.
    """
    layers = adapters(model)
    for name, tensor in base_weights(model):
        layer = layers.get(name.removesuffix(".weight"))
        value = tensor if layer is None or not name.endswith(".weight") else tensor + layer.delta()
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        yield name, value.to(wanted)


def merged(model: Any, dtype: torch.dtype | None = None) -> Any:
    """The model without adapters, their products added to its weights; as it is when it has none. `dtype` as plain_weights."""
    layers = adapters(model)
    if not layers:
        return model
    for name, layer in layers.items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        total = layer.weight.detach() + layer.delta()
        plain.weight, plain.bias = nn.Parameter(total.to(dtype or layer.weight.dtype)), layer.bias
        model.set_submodule(name, plain)
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
    return model.requires_grad_(True)


def _insert(model: nn.Module, name: str, rank: int, alpha: float) -> None:
    base = model.get_submodule(name)
    assert isinstance(base, nn.Linear)
    model.set_submodule(name, AdaptedLinear(base, rank, alpha).train(base.training))


def _targets(model: Any, lora: Lora) -> list[str]:
    """Names of the layers that get an adapter: with `all-linear` every linear layer but the head.

    Raises UserError where there is none, for a name that no linear layer has, and for experts that are one array: they would
    go without an adapter, and nothing would say so.
    """
    head = model.get_output_embeddings()
    # A subclass may compute something else than W x.
    layers = [name for name, layer in model.named_modules() if type(layer) is nn.Linear and layer is not head]
    last = {name.rpartition(".")[2] for name in layers}
    if lora.targets != "all-linear":
        if unknown := sorted(set(lora.targets) - last):
            mend = f"its linear layers are {', '.join(sorted(last))}"
            raise UserError(f"the model has no layer `{unknown[0]}`", where="lora.targets", mend=mend)
        return [name for name in layers if name.rpartition(".")[2] in lora.targets]
    mend = "name linear layers, such as `targets: [q_proj, k_proj, v_proj, o_proj]`"
    if any(_is_expert_array(layer) for layer in model.modules()):
        raise UserError("experts that are one array cannot have adapters", where="lora.targets", mend=mend)
    if not layers:
        raise UserError("the model has no linear layer but its head", where="lora", mend="train all weights: `lora: null`")
    return layers


def _is_expert_array(layer: nn.Module) -> bool:
    """Whether a layer holds the weights of several experts, (experts, …, …), as parameters of its own."""
    convolution = isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return not convolution and any(parameter.dim() == 3 for parameter in layer.parameters(recurse=False))


def _check_continues(model: Any, lora: Lora | None) -> None:
    """Raise UserError unless the adapters that the model was loaded with are the ones that `lora` describes."""
    layers = adapters(model)
    first = next(iter(layers.values()))
    names = sorted({name.rpartition(".")[2] for name in layers})
    if lora is not None and (lora.rank, lora.alpha) == (first.rank, first.alpha):
        head = model.get_output_embeddings()
        without = [layer for layer in model.modules() if type(layer) is nn.Linear and layer is not head]
        if set(names) == set(lora.targets) or (lora.targets == "all-linear" and not without):
            return
    settings = f"{{rank: {first.rank}, alpha: {first.alpha:g}, targets: [{', '.join(names)}]}}"
    mend = f"continue it with `lora: {settings}`, or set `lora: {{merge: true}}` in the stage that made the model"
    raise UserError("the model has another adapter on its weights than is to be trained", where="lora", mend=mend)
