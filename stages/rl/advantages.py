"""Advantages of whole answers: how much better an answer is than its group. Pure functions of tensors.

rewards: (groups, G), float64 in, float64 out. valid: (groups, G) bool, False where an answer takes no part (its verifier had no
verdict): it is in no mean or std, and gets 0. A group whose rewards are all equal gets zeros exactly (TRL: some 1e-3).
"""

import torch
from torch import Tensor

EPSILON = 1e-4
"""Added to the standard deviation (TRL's value; the paper divides by the bare std)."""


def group(rewards: Tensor, valid: Tensor | None = None) -> Tensor:
    """GRPO's A_i = (r_i − mean r) / (std r + 1e-4) within each group (DeepSeekMath, section 4.1.2).

    std is the sample's (divided by G − 1), as in the peers.

    >>> group(torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=torch.float64)).round(decimals=3).tolist()
    [[0.866, -0.866, -0.866, 0.866]]
    """
    centred, count = _centred(rewards, valid)
    std = (centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return centred / (std + EPSILON)


def group_centred(rewards: Tensor, valid: Tensor | None = None) -> Tensor:
    """Dr. GRPO's A_i = r_i − mean r: without the std, so that hard and easy questions weigh alike (arXiv 2503.20783).

    >>> group_centred(torch.tensor([[1.0, 0.0, 0.0, 1.0]])).tolist()
    [[0.5, -0.5, -0.5, 0.5]]
    """
    return _centred(rewards, valid)[0]


def leave_one_out(rewards: Tensor, valid: Tensor | None = None) -> Tensor:
    """RLOO's A_i = r_i − mean of the others (arXiv 2402.14740, section 3.3), which is (r_i − mean r) × G / (G − 1).

    An answer without others gets 0.

    >>> leave_one_out(torch.tensor([[1.0, 0.0, 0.0]])).tolist()
    [[1.0, -0.5, -0.5]]
    """
    centred, count = _centred(rewards, valid)
    return centred * count / (count - 1).clamp(min=1)


def batch_whitened(rewards: Tensor, valid: Tensor | None = None) -> Tensor:
    """REINFORCE++-baseline's A_i = (r_i − mean of its group) / (std of these over the batch + 1e-4) (arXiv 2501.03262).

    The batch's mean, which whitening takes off, is 0 already: every group's is. std is the sample's. Each answer counts once;
    verl and OpenRLHF whiten tokens, so that long answers count more. TRL's `scale_rewards="batch"` divides by the std of the
    raw rewards, so that differences between questions shrink the advantages: ours × (our std + 1e-4) = TRL's × (its + 1e-4).

    >>> batch_whitened(torch.tensor([[1.0, 0.0], [3.0, 0.0]])).round(decimals=2).tolist()
    [[0.39, -0.39], [1.16, -1.16]]
    """
    centred, count = _centred(rewards, valid)
    std = (centred.square().sum() / (count.sum() - 1).clamp(min=1)).sqrt()
    return centred / (std + EPSILON)


ADVANTAGES = {
    "group": group,
    "group_centred": group_centred,
    "leave_one_out": leave_one_out,
    "batch_whitened": batch_whitened,
}
"""What the words of `algorithms.py` stand for; `gae` is in gae.py."""


def zero_variance(rewards: Tensor, valid: Tensor | None = None) -> Tensor:
    """(groups,) whether all valid rewards of a group are equal, so that the group carries no signal."""
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    high = rewards.masked_fill(~valid, -torch.inf).amax(-1)
    low = rewards.masked_fill(~valid, torch.inf).amin(-1)
    return high <= low


def _centred(rewards: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """(groups, G) rewards less their group's mean, and (groups, 1) how many count."""
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    count = valid.sum(-1, keepdim=True)
    kept = rewards.masked_fill(~valid, 0.0)
    centred = kept - kept.sum(-1, keepdim=True) / count.clamp(min=1)
    # Equality is decided on the rewards themselves: rounding in the mean must not make a signal of it.
    return centred.masked_fill(~valid | zero_variance(rewards, valid)[:, None], 0.0), count
