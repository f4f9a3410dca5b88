"""Estimators of KL(π ‖ π_ref) from samples of π (Schulman, "Approximating KL divergence", 2020). Pure functions of tensors.

As *values*, k1 and k3 are unbiased and k2 is not. As *losses* it is otherwise: the gradient of k1 has mean zero, so it pulls
nowhere; k2's is an unbiased estimate of the KL's; k3's (GRPO's) is a biased one. Off-policy, or to make k3's gradient right,
the estimate is multiplied by the ratio π/π_old, which carries gradient as well (DeepSeek-V3.2, arXiv 2512.02556, section 3.1).
"""

from torch import Tensor

from stages.rl.algorithms import Estimator

LARGEST = 20.0
"""Bound of a log-ratio (verl's): further out exp overflows, and ∞ × 0 would spoil the gradient of a whole step."""


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k1 = log π − log π_ref. logp, ref_logp: equal shapes, in nats; returns that shape. May be negative."""
    return logp - ref_logp


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k2 = (log π − log π_ref)² / 2. Shapes as in `k1`."""
    return _bounded(logp - ref_logp).square() / 2


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k3 = exp(d) − d − 1 with d = log π_ref − log π: never negative (DeepSeekMath, equation 4). Shapes as in `k1`."""
    d = _bounded(ref_logp - logp)
    return d.exp() - d - 1


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def kl_terms(
    logp: Tensor, ref_logp: Tensor, estimator: Estimator, *, old_logp: Tensor | None = None, correction: bool = False
) -> Tensor:
    """Per-token KL terms of a loss, (N,): the estimate, times π/π_old of the token where `correction` is wanted.

    With GSPO, TRL multiplies by the sequence's ratio; the token's own is what makes the gradient right.

    old_logp: (N,) log-probabilities of the policy that sampled, without gradient; needed for the correction.
    """
    estimate = ESTIMATORS[estimator](logp, ref_logp)
    if not correction:
        return estimate
    assert old_logp is not None, "the correction needs the sampling policy's log-probabilities"
    return estimate * _bounded(logp - old_logp).exp()


def _bounded(log_ratio: Tensor) -> Tensor:
    """Beyond e^±20 nothing grows any more: one token that a policy has all but forbidden must not make ∞ of a step."""
    return log_ratio.clamp(-LARGEST, LARGEST)
