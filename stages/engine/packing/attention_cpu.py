"""Attention of packed texts on a CPU in float32, compiled (`stages/kernels/attend.cpp`).

One softmax over prompt and own answer. For answers of tens of tokens it takes half of the time of PyTorch's flash kernel
forward, and half to three quarters backward: no call per part, no mask, scores that never leave the nearest cache. Longer
ones, other types of numbers and machines without a compiler take PyTorch's (attention.py). The numbers differ by rounding
alone.
"""

import ctypes
import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from stages.kernels.build import NoCompiler, Pointer, built, fields

LONGEST = 2048
"""Tokens of prompt and answer together: six rows of scores of so many stay near the processor."""
BLOCK = 16
"""A head's size is a multiple of it."""


class _Attention(ctypes.Structure):
    _fields_ = (
        *fields(("prompts", "answers", "length", "read", "queries", "heads", "size", "threads"), ("scale",)),
        *fields(pointers=("prompt_length", "query", "key", "value", "prompt_key", "prompt_value", "out", "total")),
        *fields(pointers=("gradient", "to_query", "to_key", "to_value", "to_prompt_key", "to_prompt_value", "scratch")),
    )


def usable(query: Tensor, prompt_key: Tensor) -> bool:
    """Whether answers with these queries, (S, G, L, H, d), to prompts with these keys, (S, C, K, d), are worked out here."""
    fits = query.shape[-1] % BLOCK == 0 and query.shape[2] + prompt_key.shape[1] <= LONGEST
    return query.device.type == "cpu" and query.dtype == torch.float32 and fits and _library() is not None


def joined(
    query: Tensor, key: Tensor, value: Tensor, prompt_key: Tensor, prompt_value: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """(S, G, L, H, d) attention of answers, each token's to its prompt and to its own answer up to itself.

    query: as the result; key, value: (S, G, L, K, d); prompt's: (S, C, K, d); lengths: (S,) how many of the C are tokens.
    """
    found: Tensor = _Compiled.apply(query, key, value, prompt_key, prompt_value, lengths, scale)
    return found


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = built()
    except NoCompiler as error:
        warnings.warn(f"attention is not compiled, so training is slower: {error}; install one (Debian: g++)", stacklevel=2)
        return None
    library.attention_scratch.restype = ctypes.c_int64
    return library


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        *tensors, lengths, scale = given
        read = [tensor.contiguous() for tensor in tensors]
        out, total = torch.empty_like(read[0]), torch.empty(read[0].shape[:-1])
        _run("attention_forward", read, lengths, scale, out=out, total=total)
        ctx.scale = scale
        ctx.save_for_backward(*read, lengths, out, total)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *read, lengths, out, total = ctx.saved_tensors
        query, key, prompt_key = read[0], read[1], read[3]
        heads, gradient = query.shape[-2], gradients[0].contiguous()
        # Of a key or value there is one gradient for each query head that it serves; what is behind a prompt's end gets none.
        to_query, to_key, to_value = (torch.empty_like(query) for _ in range(3))
        to_prompt_key, to_prompt_value = (query.new_zeros(*prompt_key.shape[:2], *query.shape[-2:]) for _ in range(2))
        wanted = {"to_query": to_query, "to_key": to_key, "to_value": to_value}
        wanted |= {"to_prompt_key": to_prompt_key, "to_prompt_value": to_prompt_value}
        _run("attention_backward", read, lengths, ctx.scale, out=out, total=total, gradient=gradient, **wanted)
        served = heads // key.shape[-2]
        apart = (to_key, to_value, to_prompt_key, to_prompt_value)
        sums = apart if served == 1 else tuple(x.unflatten(-2, (-1, served)).sum(-2) for x in apart)
        return to_query, *sums, None, None


def _run(name: str, read: list[Tensor], lengths: Tensor, scale: float, **others: Tensor) -> None:
    """Call the kernel; `read` are query, key, value and the prompt's key and value."""
    library = _library()
    assert library is not None
    prompts, answers, length, queries, size = read[0].shape
    threads = torch.get_num_threads()
    told = _Attention(prompts, answers, length, read[3].shape[1], queries, read[3].shape[2], size, threads, scale)
    named = dict(zip(("query", "key", "value", "prompt_key", "prompt_value"), read, strict=True))
    scratch = torch.empty(threads * library.attention_scratch(ctypes.byref(told)))
    for field, tensor in {**named, **others, "prompt_length": lengths, "scratch": scratch}.items():
        setattr(told, field, Pointer(tensor.data_ptr()))
    getattr(library, name)(ctypes.byref(told))
