"""Logits by a model's own `forward` from given hidden states: its head, and every scale, cap and bias that it applies.

A causal language model of transformers is a decoder and what its `forward` does with the decoder's output: a product, and in
many architectures a scale (Granite, Cohere), a soft cap (Gemma) or a bias. Rebuilding that from `get_output_embeddings` loses
all but the product. Here the model's class runs on a shallow copy of the model whose decoder is replaced by a module that
returns the given hidden states, so all that follows the decoder is the model's own code. The copy shares parameters, buffers
and hooks (DeepSpeed's, peft's) with the model, which is not changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

OVERWRITABLE = frozenset(
    {"MmBackward0", "AddmmBackward0", "BmmBackward0", "DivBackward0", "MulBackward0", "AddBackward0", "SubBackward0"}
    | {"ToCopyBackward0", "CloneBackward0"}
)
"""Operations whose derivative does not read their own result, so that the gradient of logits may be written over them."""
_VIEWS = frozenset({"ViewBackward0", "UnsafeViewBackward0", "SqueezeBackward1", "UnsqueezeBackward0", "SelectBackward0"})


@dataclass
class _DecoderOutput(BaseModelOutputWithPast):
    """A decoder's output with hidden states alone; any other field that a `forward` reads is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _GivenStates(nn.Module):
    """Stands where the decoder is and returns the same hidden states whatever it is called with."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.states = hidden

    def forward(self, *_: Any, **__: Any) -> _DecoderOutput:
        """(1, n, hidden) states, as the decoder's output."""
        return _DecoderOutput(last_hidden_state=self.states)


def decoder_names(model: Any) -> tuple[str, ...]:
    """Attribute names that lead from a causal language model to its decoder, such as ("model",); empty when there is none."""
    decoder = model.get_decoder()
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    return tuple(name.split(".")) if name else ()


def own_logits(model: Any, names: Sequence[str], hidden: Tensor) -> Tensor:
    """(n, V) logits that the model's own `forward` computes from the (n, hidden) output of its decoder.

    names: where the decoder is (`decoder_names`).
    """
    copies = _with_decoder(model, names, _GivenStates(hidden[None]))
    tokens = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    logits: Tensor = type(model).forward(copies, input_ids=tokens, use_cache=False).logits
    return logits.squeeze(0)


def _with_decoder(module: nn.Module, names: Sequence[str], decoder: nn.Module) -> nn.Module:
    """A shallow copy of `module` in which the submodule at `names` is `decoder`."""
    if not names:
        return decoder
    copied = object.__new__(type(module))
    inner = _with_decoder(getattr(module, names[0]), names[1:], decoder)
    copied.__dict__.update(module.__dict__, _modules={**module._modules, names[0]: inner})
    return copied


def overwritable(logits: Tensor) -> Tensor:
    """The logits, or a copy where the operation that made them needs them for its own derivative."""
    step = logits.grad_fn
    while step is not None and step.name() in _VIEWS:
        step = step.next_functions[0][0]
    return logits if step is None or step.name() in OVERWRITABLE else logits.clone()
