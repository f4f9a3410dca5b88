"""Advantages: how much better an answer is than its group. Pure functions of tensors."""

import torch
from torch import Tensor

EPSILON = 1e-4
"""Added to the standard deviation (TRL's and verl's value; the paper divides by the bare std)."""


def group_advantages(rewards: Tensor, valid: Tensor | None = None) -> Tensor:
    """GRPO's A_i = (r_i − mean r) / (std r + 1e-4) within each group (DeepSeekMath, section 4.1.2).

    rewards: (groups, G); valid: (groups, G) bool, False where the verifier had no verdict. Answers without verdict take no
    part in mean or std and get 0: they never train as wrong. std is the sample's (divided by G − 1), as in the peers. A group
    whose rewards are all equal gets zeros exactly. Returns (groups, G), float64 in, float64 out.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=torch.float64)).round(decimals=3).tolist()
    [[0.866, -0.866, -0.866, 0.866]]
    """
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    count = valid.sum(-1, keepdim=True)
    kept = rewards.masked_fill(~valid, 0.0)
    centred = (rewards - kept.sum(-1, keepdim=True) / count.clamp(min=1)).masked_fill(~valid, 0.0)
    std = (centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    # Equality is decided on the rewards themselves: rounding in the mean must not make a signal of it.
    return (centred / (std + EPSILON)).masked_fill(zero_variance(rewards, valid)[:, None], 0.0)


def zero_variance(rewards: Tensor, valid: Tensor | None = None) -> Tensor:
    """(groups,) whether all valid rewards of a group are equal, so that the group carries no signal."""
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    high = rewards.masked_fill(~valid, -torch.inf).amax(-1)
    low = rewards.masked_fill(~valid, torch.inf).amin(-1)
    return high <= low
