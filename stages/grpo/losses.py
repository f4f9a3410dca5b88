"""The policy loss, as pure functions of flat tensors: one entry per predicted token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.grpo.kl import k3


@dataclass
class LossTerms:
    """Per-token terms of the loss. All tensors (N,)."""

    policy: Tensor
    """−min(ρA, clip(ρ)A); carries the gradient."""
    kl: Tensor
    """k3 against the reference; zeros without one."""
    clipped_low: Tensor
    """Whether the lower clip took the token's gradient away (A < 0 and ρ < 1 − ε)."""
    clipped_high: Tensor
    """Whether the upper clip did (A > 0 and ρ > 1 + ε)."""


def grpo_terms(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    ref_logp: Tensor | None = None,
) -> LossTerms:
    """Terms of GRPO's objective (DeepSeekMath, equation 3; DeepSeek-R1, equation 1), per token, as a loss to be minimised.

    logp, old_logp, advantages, ref_logp: (N,); log-probabilities in nats, at the sampling temperature.
    ρ = exp(logp − old_logp) per token. The lower clip is inert for ε ≥ 1, as with R1's ε = 10.
    """
    ratio = (logp - old_logp).exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return LossTerms(
        policy=-torch.minimum(unclipped, clipped),
        kl=k3(logp, ref_logp) if ref_logp is not None else torch.zeros_like(logp),
        clipped_low=(advantages < 0) & (ratio < 1 - clip_low),
        clipped_high=(advantages > 0) & (ratio > 1 + clip_high),
    )


def grpo_loss(terms: LossTerms, weights: Tensor, kl_weight: float) -> Tensor:
    """Σ_t w_t (policy_t + β k3_t): a scalar.

    weights: (N,). GRPO's mean over answers of the mean over tokens is w_t = 1 / (answers of the **global** batch × |o_i|), so
    that the sum over micro-batches and ranks is the loss of the whole batch however it was cut.
    """
    return (weights * (terms.policy + kl_weight * terms.kl)).sum()
