"""The lean decoding step and the draw, compiled (`stages/kernels/decode.cpp`), on a CPU and in float32.

Three times as fast as the same step in PyTorch for 16 rows, 1.5 times for 256 (SmolLM2-135M, two threads). Its numbers differ
from PyTorch's by rounding alone.
"""

import ctypes
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stages.engine.adapters import AdaptedLinear
from stages.kernels.build import Number, Pointer, built, fields
from stages.rollout.decoding.decoder import Cache, LeanDecoder, Prompts
from stages.rollout.decoding.token_sampling import Choose

LANES = 8
"""Numbers of a vector in the source; a head's size is a multiple of it."""


class _Linear(ctypes.Structure):
    _fields_ = (("weight", Pointer), ("bias", Pointer))


class _Layer(ctypes.Structure):
    _fields_ = (
        ("before_attention", Pointer),
        *((name, _Linear) for name in ("q", "k", "v")),
        ("q_norm", Pointer),
        ("k_norm", Pointer),
        ("o", _Linear),
        ("before_mlp", Pointer),
        *((name, _Linear) for name in ("gate", "up", "down")),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *fields(("layers", "hidden", "inner", "queries", "heads", "size", "vocabulary"), ("epsilon", "scale")),
        ("layer", ctypes.POINTER(_Layer)),
        ("embedding", Pointer),
        ("last_norm", Pointer),
        ("head", _Linear),
        ("cosines", Pointer),
        ("sines", Pointer),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        *fields(("rows", "threads")),
        *((name, Pointer) for name in ("token", "prompt_of_row", "prompt_length", "own_length")),
        ("prompt_cache", Pointer),
        *fields(("prompts", "prompt_room")),
        ("own_cache", Pointer),
        *fields(("own_rows", "own_room")),
        ("scratch", Pointer),
        ("logits", Pointer),
    )


def unsupported(model: Any) -> str:
    """Why a model that `decoder.py` knows cannot be decoded here; empty when it can."""
    weight, size = model.model.embed_tokens.weight, model.model.layers[0].self_attn.head_dim
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return f"its weights are {weight.dtype} on {weight.device.type}, not float32 on cpu"
    if size % LANES:
        return f"its heads have {size} numbers, no multiple of {LANES}"
    odd = [name for name, tensor in model.named_parameters() if tensor.dtype != weight.dtype or not tensor.is_contiguous()]
    return f"`{odd[0]}` is not float32 in one piece" if odd else ""


class CompiledDecoder(LeanDecoder):
    """Prefills in PyTorch, decodes with the compiled step."""

    memory = staticmethod(torch.empty)  # the step never looks at what is hidden

    def __init__(self, model: Any, longest: int) -> None:
        """As LeanDecoder; raises NoCompiler."""
        super().__init__(model, longest)
        self._step = built()
        self._step.scratch_floats.restype = Number
        given = (Pointer, Number, Number, ctypes.c_float, Pointer, Pointer, Pointer, Number)
        self._step.draw_tokens.argtypes = given
        config = model.config
        self._tables = self._cos.contiguous(), self._sin.contiguous()
        self._sums: list[Tensor] = []
        self._layers = (_Layer * len(self.layers))(*map(self._layer, self.layers))
        self._model = _Model(
            layers=len(self.layers),
            hidden=config.hidden_size,
            inner=config.intermediate_size,
            queries=self.queries,
            heads=self.heads,
            size=self.size,
            vocabulary=len(model.lm_head.weight),
            epsilon=model.model.norm.variance_epsilon,
            scale=self.scale,
            layer=self._layers,
            embedding=self.weight.data_ptr(),
            last_norm=model.model.norm.weight.data_ptr(),
            head=self._linear(model.lm_head),
            cosines=self._tables[0].data_ptr(),
            sines=self._tables[1].data_ptr(),
        )
        self._scratch = torch.empty(0)

    def step(self, tokens: Tensor, prompts: Prompts, own: Cache, lengths: Tensor, width: int) -> Tensor:  # noqa: ARG002
        """(R, V) logits; see LeanDecoder."""
        assert prompts.cache.both.is_contiguous() and own.both.is_contiguous()
        logits = torch.empty(len(tokens), self._model.vocabulary)
        batch = _Batch(
            rows=len(tokens),
            threads=torch.get_num_threads(),
            token=tokens.data_ptr(),
            prompt_of_row=prompts.of_row.data_ptr(),
            prompt_length=prompts.lengths.data_ptr(),
            own_length=lengths.data_ptr(),
            prompt_cache=prompts.cache.both.data_ptr(),
            prompts=len(prompts.lengths),
            prompt_room=prompts.cache.tokens,
            own_cache=own.both.data_ptr(),
            own_rows=own.both.shape[2],
            own_room=own.tokens,
            logits=logits.data_ptr(),
        )
        wanted = self._step.scratch_floats(ctypes.byref(self._model), ctypes.byref(batch))
        if len(self._scratch) < wanted:
            self._scratch = torch.empty(wanted)
        batch.scratch = self._scratch.data_ptr()
        self._step.decode_step(ctypes.byref(self._model), ctypes.byref(batch))
        return logits

    def chooser(self, temperature: float, top_p: float) -> Choose:
        """Compiled too, but for greedy decoding and a nucleus."""
        return (
            partial(self.draw, temperature=temperature) if temperature and top_p == 1 else super().chooser(temperature, top_p)
        )

    def draw(self, logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """As `sampling.choose` without a nucleus."""
        (rows, vocabulary), logits, uniform = logits.shape, logits.contiguous(), uniform.contiguous()
        token, logp = torch.empty(rows, dtype=torch.long), torch.empty(rows)
        given = logits.data_ptr(), rows, vocabulary, temperature, uniform.data_ptr()
        self._step.draw_tokens(*given, token.data_ptr(), logp.data_ptr(), torch.get_num_threads())
        return token, logp

    def _linear(self, module: nn.Linear) -> _Linear:
        """Where the kernel finds a layer.

        Of one with an adapter it reads the sum of both, made for this decoder: in float32, unlike in 16 bits, that rounds to
        10⁻⁷ of the weights, a thousandth of an update whose entries of B are 10⁻⁵.
        """
        weight = module.weight
        if isinstance(module, AdaptedLinear):
            weight = (weight + module.delta()).contiguous()
            self._sums.append(weight)
        return _Linear(weight.data_ptr(), None if module.bias is None else module.bias.data_ptr())

    def _layer(self, layer: Any) -> _Layer:
        """Where the kernel finds the weights of a decoder layer."""
        attention, mlp = layer.self_attn, layer.mlp
        return _Layer(
            before_attention=layer.input_layernorm.weight.data_ptr(),
            q=self._linear(attention.q_proj),
            k=self._linear(attention.k_proj),
            v=self._linear(attention.v_proj),
            q_norm=attention.q_norm.weight.data_ptr() if hasattr(attention, "q_norm") else None,
            k_norm=attention.k_norm.weight.data_ptr() if hasattr(attention, "k_norm") else None,
            o=self._linear(attention.o_proj),
            before_mlp=layer.post_attention_layernorm.weight.data_ptr(),
            gate=self._linear(mlp.gate_proj),
            up=self._linear(mlp.up_proj),
            down=self._linear(mlp.down_proj),
        )
