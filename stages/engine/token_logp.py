"""Log-probabilities of given tokens from logits, with one array of tokens × vocabulary and no copy of it.

The plain way (divide by the temperature, log-softmax, gather, entropy) holds the array five times. Here it is read a few rows
at a time, and its gradient is written over it: ∂ log p(token) / ∂ logits = (1[token] − softmax) / temperature.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ENTRIES = {"cpu": 2**20, "cuda": 2**25}
"""Entries of the array that are worked on at once, by device: they stay in a processor's cache; a GPU has none to stay in, and
each piece costs it some ten calls."""


class _TokenLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logp, entropy, normaliser = (torch.empty(len(logits), device=logits.device) for _ in range(3))
        for rows in _blocks(logits):
            scaled = logits[rows].float() / temperature
            top = scaled.amax(-1, keepdim=True)
            scaled -= top
            chosen = scaled.gather(-1, targets[rows, None]).squeeze(-1)
            weights = scaled.exp()
            total = weights.sum(-1)
            entropy[rows] = total.log() - weights.mul_(scaled).sum(-1) / total
            normaliser[rows] = total.log() + top.squeeze(-1)
            logp[rows] = chosen - total.log()
        ctx.save_for_backward(logits, targets, normaliser)
        ctx.temperature, ctx.spent = temperature, False
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        assert not ctx.spent, "the logits were overwritten by the first backward pass"
        ctx.spent = True
        logits, targets, normaliser = ctx.saved_tensors
        weight = gradients[0].float() / ctx.temperature  # (n,)
        for rows in _blocks(logits):
            gradient = logits[rows].float().div(ctx.temperature).sub_(normaliser[rows, None]).exp_()
            gradient.mul_(-weight[rows, None])
            here = targets[rows, None]
            # Not scatter_add_: a GPU knows no fixed order for it, though no two entries meet here.
            gradient.scatter_(-1, here, gradient.gather(-1, here).add_(weight[rows, None]))
            logits[rows] = gradient.to(logits.dtype)
        return logits, None, None


def token_logp(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(n,) log-probability of each target and (n,) entropy in nats, float32, under softmax(logits / temperature).

    logits: (n, V), not used by anything else: the backward pass writes over them. The entropy carries no gradient.
    """
    found: tuple[Tensor, Tensor] = _TokenLogp.apply(logits, targets, temperature)
    return found


def _blocks(logits: Tensor) -> list[slice]:
    rows = max(1, ENTRIES[logits.device.type] // logits.shape[1])
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]
