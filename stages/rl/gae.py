"""PPO's mathematics: rewards per token, generalised advantage estimation, the value loss. Pure functions of tensors.

An answer is an episode whose actions are its tokens; V_t is the value of what stands before token t, and after the last token
it is 0, also where an answer was cut at the limit (as the field has it; there is no bootstrapping).
Tensors of shape (B, T) hold B answers, zeros behind each one's end.
"""

import torch
from torch import Tensor


def token_rewards(rewards: Tensor, penalties: Tensor, lengths: Tensor) -> Tensor:
    """(B, T) reward of each token: −penalty, and the answer's reward on its last token (InstructGPT, arXiv 2203.02155, eq. 2).

    rewards: (B,) of the answers; penalties: (B, T) β × KL estimate of each token; lengths: (B,) tokens of each answer.
    The penalties of all later tokens add up in the return of a token: the longer the answer, the more it costs.
    """
    found = -penalties
    found[torch.arange(len(lengths)), lengths - 1] += rewards
    return found


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float | Tensor) -> Tensor:
    """A_t = δ_t + γλ A_{t+1} with δ_t = r_t + γ V_{t+1} − V_t (arXiv 1506.02438, equation 16). Shapes (B, T).

    lam: one number, or (B,) one per answer. With γ = λ = 1 this is the Monte-Carlo return less the value.
    """
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    delta = rewards + gamma * following - values
    found, later = torch.zeros_like(delta), torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        later = delta[:, t] + gamma * lam * later
        found[:, t] = later
    return found


def length_adaptive_lambda(lengths: Tensor, alpha: float) -> Tensor:
    """(B,) λ = 1 − 1/(α l), at least 0: long answers look further ahead (VAPO, arXiv 2504.05118, equation 8; α = 0.05)."""
    return (1 - 1 / (alpha * lengths.double())).clamp(min=0)


def whiten(values: Tensor) -> Tensor:
    """(N,) with mean 0 and standard deviation 1 (the sample's, divided by N − 1). One value, or equal ones, give zeros."""
    if values.max() == values.min():  # rounding in the mean must not make a signal of it
        return torch.zeros_like(values)
    centred = values - values.mean()
    return centred / (centred.square().sum() / max(1, len(values) - 1)).sqrt()


def value_terms(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """(N,) clipped value loss of each token, and (N,) whether the clip took its gradient away.

    ½ max((V − R)², (clip(V, V_old ± ε) − R)²), with V_old as it was when the answers were sampled (the code of PPO, arXiv
    1707.06347); ½ (V − R)² without a clip.
    """
    plain = (values - returns).square()
    if clip is None:
        return plain / 2, torch.zeros_like(values, dtype=torch.bool)
    bounded = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    return torch.maximum(plain, bounded) / 2, (bounded > plain) & ((values - old_values).abs() > clip)


THIRDS = ("first", "middle", "last")
"""The thirds of an answer, in order."""


def thirds(length: int) -> Tensor:
    """(length,) which third of the answer each token is in: 0, 1 or 2. An answer of one token has a first third alone."""
    return torch.arange(length) * len(THIRDS) // length


def explained_variance(values: Tensor, returns: Tensor) -> float | None:
    """1 − Var(R − V) / Var(R): 1 a perfect value model, 0 one as good as a constant. (N,) each; None if returns are equal."""
    if not len(returns) or returns.max() == returns.min():
        return None
    return float(1 - (returns - values).var(correction=0) / returns.var(correction=0))
