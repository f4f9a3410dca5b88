"""Estimators of KL(π ‖ π_ref) from samples of π (Schulman, "Approximating KL divergence", 2020). Pure functions of tensors."""

from torch import Tensor


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k3 = exp(d) − d − 1 with d = log π_ref − log π: unbiased as a value, never negative (DeepSeekMath, equation 4).

    logp, ref_logp: equal shapes, in nats. Returns that shape. As a *loss* its gradient is a biased estimate of the KL's.
    """
    d = ref_logp - logp
    return d.exp() - d - 1
