"""How many weights low-rank adapters have (LoRA, arXiv 2106.09685), as the library peft places them.

Beside a layer of `inputs` × `outputs` weights stand `rank` × (`inputs` + `outputs`).
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from stages.contract.errors import UserError
from stages.costs.shape import Shape


@dataclass(frozen=True)
class Linear:
    """The linear layers of one name; every layer of the model has one."""

    name: str
    inputs: int
    outputs: int


def linear_layers(shape: Shape) -> Iterator[Linear]:
    """All that `all-linear` means: every linear layer but the head. Of a mixture of experts those of attention."""
    h = shape.hidden
    if shape.latent is None:
        width, keys = shape.heads * shape.head_size, shape.key_heads * shape.head_size
        yield Linear("q_proj", h, width)
        yield Linear("k_proj", h, keys)
        yield Linear("v_proj", h, keys)
    else:
        a, width = shape.latent, shape.heads * shape.latent.value
        queries = shape.heads * (a.plain + a.rotary)
        if a.query_rank is None:
            yield Linear("q_proj", h, queries)
        else:
            yield Linear("q_a_proj", h, a.query_rank)
            yield Linear("q_b_proj", a.query_rank, queries)
        yield Linear("kv_a_proj_with_mqa", h, a.rank + a.rotary)
        yield Linear("kv_b_proj", a.rank, shape.heads * (a.plain + a.value))
    yield Linear("o_proj", width, h)
    if shape.experts is None:
        yield Linear("gate_proj", h, shape.inner)
        yield Linear("up_proj", h, shape.inner)
        yield Linear("down_proj", shape.inner, h)


def adapter_weights(shape: Shape, rank: int, targets: str | Collection[str]) -> int:
    """Weights of the adapters, all layers together; `targets`: names of the layers that get one, or `all-linear`.

    Raises UserError for a target that the model has not, and for `all-linear` on a mixture of experts, as training does
    (stages/engine/adapters.py).
    """
    layers = {layer.name: layer for layer in linear_layers(shape)}
    if targets == "all-linear":
        if shape.experts is not None:
            mend = f"name linear layers, such as `targets: [{', '.join(layers)}]`"
            raise UserError("experts that are one array cannot have adapters", where="lora.targets", mend=mend)
        chosen = list(layers.values())
    else:
        if unknown := sorted(set(targets) - layers.keys()):
            mend = f"its linear layers are {', '.join(sorted(layers))}"
            raise UserError(f"the model has no layer `{unknown[0]}`", where="lora.targets", mend=mend)
        chosen = [layers[name] for name in targets]
    return shape.layers * sum(rank * (layer.inputs + layer.outputs) for layer in chosen)
