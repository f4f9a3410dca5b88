"""The policy loss, as pure functions of flat tensors: one entry per predicted token, answers one after the other.

Every algorithm is Σ_t w_t (c_t × policy_t + β kl_t): `policy_terms` gives policy_t from ratio, advantage and surrogate,
`token_weights` w_t, `truncated_importance` c_t, and `kl.kl_terms` kl_t. Each w_t is divided by a count of the **global**
minibatch, so that the sum over micro-batches and ranks is the loss of the whole minibatch however it was cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.rl.algorithms import AggregationName, RatioName, SurrogateName
from stages.rl.kl import LARGEST


@dataclass
class PolicyTerms:
    """Per-token terms of the loss, to be minimised. All tensors (N,)."""

    policy: Tensor
    """The surrogate's negative; carries the gradient."""
    clipped_low: Tensor
    """Whether the lower clip took the token's gradient away (A < 0 and ρ < 1 − ε); with `weight`, bounded its weight."""
    clipped_high: Tensor
    """Whether the upper clip did (A > 0 and ρ > 1 + ε), or the dual clip (A < 0 and ρ > c)."""


def policy_ratio(logp: Tensor, old_logp: Tensor, owner: Tensor, ratio: RatioName) -> Tensor:
    """ρ = π/π_old of each token, (N,).

    logp, old_logp: (N,) log-probabilities in nats, at the sampling temperature; owner: (N,) number of the answer of each token,
    any numbers; every answer must be whole. `token`: the token's own. `sequence`: exp of the mean log-ratio of its answer
    (GSPO, arXiv 2507.18071, equation 7). `product`: of their sum, the ratio of the whole answer. Beyond e^±20 it stands still.
    """
    log_ratio = logp - old_logp
    if ratio == "token":
        return log_ratio.clamp(-LARGEST, LARGEST).exp()
    _, place = owner.unique_consecutive(return_inverse=True)
    answers = int(place[-1]) + 1 if len(place) else 0
    of_answer = torch.zeros(answers, dtype=logp.dtype, device=logp.device).index_add(0, place, log_ratio)
    if ratio == "sequence":
        of_answer = of_answer / place.bincount(minlength=answers)
    return of_answer.clamp(-LARGEST, LARGEST).exp()[place]


def policy_terms(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    owner: Tensor,
    *,
    ratio: RatioName = "token",
    surrogate: SurrogateName = "clip",
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    clip_dual: float | None = None,
) -> PolicyTerms:
    """Terms of the clipped surrogate (DeepSeekMath, equation 3) or of the clipped weight (MiniMax-M1, equation 4), per token.

    logp, old_logp, owner: as in `policy_ratio`; advantages: (N,). The ratio is clipped to [1 − clip_low, 1 + clip_high]; a
    None is no clip on that side, and a clip_low ≥ 1 never binds, as with R1's ε = 10. clip_dual = c > 1: where A < 0 the
    surrogate is at least cA, so that an answer whose ratio explodes cannot dominate (dual-clip PPO, arXiv 1912.09729, eq. 5).
    TRL's CISPO takes the upper bound itself as `epsilon_high`; here as everywhere it is 1 + clip_high. TRL's `delta` is c where
    c ≥ 1 + clip_high; below, it bounds ρ for A > 0 too.
    """
    rho = policy_ratio(logp, old_logp, owner, ratio)
    low = torch.zeros_like(rho) if clip_low is None else torch.full_like(rho, 1 - clip_low)
    high = torch.full_like(rho, torch.inf if clip_high is None else 1 + clip_high)
    clipped = rho.clamp(low, high)
    if surrogate == "weight":
        moved = advantages != 0
        return PolicyTerms(-clipped.detach() * advantages * logp, moved & (rho < low), moved & (rho > high))
    objective = torch.minimum(rho * advantages, clipped * advantages)
    dual = torch.zeros_like(rho, dtype=torch.bool)
    if clip_dual is not None:
        dual = (advantages < 0) & (rho > clip_dual)
        objective = torch.where(advantages < 0, torch.maximum(objective, clip_dual * advantages), objective)
    return PolicyTerms(-objective, (advantages < 0) & (rho < low), (advantages > 0) & (rho > high) | dual)


def truncated_importance(old_logp: Tensor, sampler_logp: Tensor, cap: float) -> Tensor:
    """min(π_old / π_sampler, cap) per token, (N,), without gradient: corrects for an engine that samples a little differently.

    (Yao et al., "Your efficient RL framework secretly brings you off-policy RL training", 2025; IMPALA's truncation.)
    """
    return (old_logp - sampler_logp).detach().exp().clamp(max=cap)


def token_weights(lengths: Sequence[int], aggregation: AggregationName, longest: int) -> list[float]:
    """The weight of each token of an answer, per answer, in a minibatch of answers of these `lengths`.

    `sample_mean` (GRPO): mean over answers of the mean over their tokens. `token_mean` (DAPO, equation 12): mean over all
    tokens. `constant` (Dr. GRPO): sum over tokens / (answers × `longest`), the most tokens that an answer may have, so that
    an answer's length does not weigh its tokens. Answers that were left out (no verdict, cut and masked) count nowhere; TRL
    counts them as answers. With several updates a rollout TRL's token mean divides by the rollout's tokens / its updates, here
    by the tokens of the update's own minibatch.
    """
    answers, tokens = len(lengths), sum(lengths)
    if aggregation == "sample_mean":
        return [1 / (answers * length) for length in lengths]
    return [1 / tokens if aggregation == "token_mean" else 1 / (answers * longest)] * answers
