"""Update: one optimizer step on one minibatch, of the policy and of PPO's value model."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.engine import distributed
from stages.engine.deepspeed_engine import Engine
from stages.engine.packing.pack import Packed
from stages.rl.algorithms import ALGORITHMS
from stages.rl.gae import value_terms
from stages.rl.kl import LARGEST, k3, kl_terms
from stages.rl.losses import policy_terms, truncated_importance
from stages.rl.prepare import Batch
from stages.rl.settings import GRPO


@dataclass
class UpdateStats:
    """What an update was like, over all ranks. A sum is over the tokens of the kind before it."""

    loss: float = 0.0
    grad_norm: float = 0.0
    value_grad_norm: float = 0.0
    tokens: float = 0.0
    """Tokens that the policy was trained on."""
    entropy: float = 0.0
    clipped_low: float = 0.0
    clipped_high: float = 0.0
    mismatch_kl: float = 0.0
    mismatch_max: float = 0.0
    """Largest absolute difference between sampler's and trainer's log-probability; not a sum."""
    ratio_max: float = 0.0
    """Largest ratio π/π_old; not a sum."""
    importance: float = 0.0
    """Of the truncated importance weights; 0 without them."""
    referenced: float = 0.0
    """Tokens with a reference to have a KL against."""
    kl: float = 0.0
    valued: float = 0.0
    """Tokens that the value model was trained on."""
    value_loss: float = 0.0
    value_clipped: float = 0.0

    def metrics(self) -> dict[str, float]:
        """The metrics of this update; means over tokens are left out when there were none."""
        found = {}
        if self.tokens:
            found = {
                "train/loss": self.loss,
                "train/grad_norm": self.grad_norm,
                "train/entropy": self.entropy / self.tokens,
                "train/clip_fraction_low": self.clipped_low / self.tokens,
                "train/clip_fraction_high": self.clipped_high / self.tokens,
                "train/ratio_max": self.ratio_max,
                "train/mismatch_kl": self.mismatch_kl / self.tokens,
                "train/mismatch_max": self.mismatch_max,
            }
            if self.importance:
                found["train/importance"] = self.importance / self.tokens
        if self.referenced:
            found["train/kl"] = self.kl / self.referenced
        if self.valued:
            found |= {
                "value/loss": self.value_loss / self.valued,
                "value/clip_fraction": self.value_clipped / self.valued,
                "value/grad_norm": self.value_grad_norm,
            }
        return found


def update(
    policy: Engine,
    batch: Batch,
    settings: GRPO,
    *,
    lr: float,
    temperature: float,
    critic: Engine | None = None,
    pretrain: bool = False,
) -> UpdateStats:
    """One step on a minibatch. Every rank calls it; the gradient is that of the whole minibatch on one rank.

    critic: PPO's own value model, trained beside the policy, and alone when `pretrain`.
    """
    stats = UpdateStats()

    def policy_loss(index: int) -> Tensor:
        packed = batch.micro[index]
        scored = policy.score(packed, temperature)
        if index >= batch.real:
            return _nothing(scored)
        loss = _policy_loss(batch, packed, scored[0], scored[1], settings, stats)
        if len(scored) > 2:  # a shared value model
            loss = loss + settings.critic.weight * _value_loss(batch, packed, scored[2], settings, stats)
        stats.loss += float(loss.detach())
        return loss

    def value_loss(index: int) -> Tensor:
        assert critic is not None
        packed = batch.micro[index]
        scored = critic.score(packed)
        return _nothing(scored) if index >= batch.real else _value_loss(batch, packed, scored[0], settings, stats)

    number = range(len(batch.micro))
    if batch.micro and not pretrain:
        policy.accumulate([lambda i=i: policy_loss(i) for i in number])  # type: ignore[misc]
        stats.grad_norm = policy.step(lr)
    if batch.micro and critic is not None:
        critic.accumulate([lambda i=i: value_loss(i) for i in number])  # type: ignore[misc]
        stats.value_grad_norm = critic.step(lr * settings.critic.lr / settings.lr)
    return _summed(stats)


def _nothing(scored: tuple[Tensor, ...]) -> Tensor:
    """The loss of a filler: this rank has less work than another, and must make the same passes."""
    return torch.stack([part.sum() for part in scored]).sum() * 0.0


def _policy_loss(batch: Batch, packed: Packed, logp: Tensor, entropy: Tensor, settings: GRPO, stats: UpdateStats) -> Tensor:
    device = logp.device

    def told(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.to(device)

    weights = torch.tensor(batch.weights, dtype=logp.dtype)[packed.owner].to(device)
    advantages, sampler = told(batch.flat(lambda a: a.advantages, packed)), told(batch.flat(lambda a: a.sampler_logp, packed))
    assert advantages is not None
    assert sampler is not None
    # On-policy the ratio is 1 and only its gradient counts; another engine's log-probabilities would bias it.
    old = told(batch.flat(lambda a: a.old_logp, packed))
    old = logp.detach() if old is None or settings.on_policy else old
    terms = policy_terms(
        logp,
        old,
        advantages,
        packed.owner.to(device),
        ratio=settings.ratio,
        surrogate=ALGORITHMS[settings.algorithm].surrogate,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        clip_dual=settings.clip_dual,
    )
    policy = terms.policy
    if settings.importance_cap is not None:
        importance = truncated_importance(old, sampler, settings.importance_cap)
        policy = policy * importance
        stats.importance += float(importance.sum())
    loss = (weights * policy).sum()
    reference = told(batch.flat(lambda a: a.ref_logp, packed))
    if reference is not None:
        stats.referenced += len(logp)
        stats.kl += float(k3(logp.detach(), reference).sum())
        if settings.kl_place == "loss":
            kl = kl_terms(logp, reference, settings.kl_estimator, old_logp=old, correction=settings.kl_correction)
            loss = loss + settings.kl * (weights * kl).sum()
    stats.tokens += len(logp)
    stats.entropy += float(entropy.sum())
    stats.clipped_low += float(terms.clipped_low.sum())
    stats.clipped_high += float(terms.clipped_high.sum())
    stats.mismatch_kl += float(k3(sampler, old).sum())
    stats.mismatch_max = max(stats.mismatch_max, float((sampler - old).abs().max()))
    stats.ratio_max = max(stats.ratio_max, float((logp.detach() - old).clamp(max=LARGEST).exp().max()))
    return loss


def _value_loss(batch: Batch, packed: Packed, values: Tensor, settings: GRPO, stats: UpdateStats) -> Tensor:
    old, returns = batch.flat(lambda a: a.values, packed), batch.flat(lambda a: a.returns, packed)
    assert old is not None
    assert returns is not None
    terms, clipped = value_terms(values, old.to(values.device), returns.to(values.device), settings.critic.clip)
    stats.valued += len(values)
    stats.value_loss += float(terms.detach().sum())
    stats.value_clipped += float(clipped.sum())
    return terms.sum() * batch.value_weight


def _summed(stats: UpdateStats) -> UpdateStats:
    everyone = distributed.gather(vars(stats))
    summed = UpdateStats(**{name: sum(s[name] for s in everyone) for name in vars(stats)})
    summed.grad_norm, summed.value_grad_norm = stats.grad_norm, stats.value_grad_norm
    summed.mismatch_max = max(s["mismatch_max"] for s in everyone)
    summed.ratio_max = max(s["ratio_max"] for s in everyone)
    return summed
