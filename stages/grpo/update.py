"""Update: one optimizer step on one minibatch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.engine import ranks
from stages.engine.deepspeed_engine import Engine
from stages.engine.rows import Rows
from stages.grpo.kl import k3
from stages.grpo.losses import grpo_loss, grpo_terms
from stages.grpo.prepare import Batch
from stages.grpo.settings import GRPO


@dataclass
class UpdateStats:
    """What an update was like, over all ranks."""

    loss: float = 0.0
    grad_norm: float = 0.0
    tokens: float = 0.0
    """Tokens trained on."""
    referenced: bool = False
    """Whether there was a reference to have a KL against."""
    kl: float = 0.0
    """Like the following, a sum over those tokens."""
    entropy: float = 0.0
    clipped_low: float = 0.0
    clipped_high: float = 0.0
    mismatch_kl: float = 0.0
    mismatch_max: float = 0.0
    """Largest absolute difference between sampler's and trainer's log-probability."""

    def metrics(self) -> dict[str, float]:
        """The metrics of this update; means over tokens are left out when no token was trained on."""
        found = {"train/loss": self.loss, "train/grad_norm": self.grad_norm}
        if self.tokens:
            found |= {
                "train/entropy": self.entropy / self.tokens,
                "train/clip_fraction_low": self.clipped_low / self.tokens,
                "train/clip_fraction_high": self.clipped_high / self.tokens,
                "train/mismatch_kl": self.mismatch_kl / self.tokens,
                "train/mismatch_max": self.mismatch_max,
            }
            if self.referenced:
                found["train/kl"] = self.kl / self.tokens
        return found


def update(engine: Engine, batch: Batch, settings: GRPO, *, lr: float, temperature: float) -> UpdateStats:
    """One step of GRPO on a minibatch. Every rank calls it; the gradient is that of the whole minibatch on one rank."""
    stats = UpdateStats(referenced=batch.ref_logp is not None)

    def loss_of(index: int) -> Tensor:
        rows = batch.micro[index]
        logp, entropy = engine.score(rows.to(engine.device), temperature)
        if index >= batch.real:
            return logp.sum() * 0.0  # a filler: this rank has less work than another
        loss = _loss(batch, rows, logp, entropy, settings, stats)
        stats.loss += float(loss.detach())
        return loss

    if batch.micro:
        engine.accumulate([lambda i=i: loss_of(i) for i in range(len(batch.micro))])  # type: ignore[misc]
        stats.grad_norm = engine.step(lr)
    return _summed(stats)


def _loss(batch: Batch, rows: Rows, logp: Tensor, entropy: Tensor, settings: GRPO, stats: UpdateStats) -> Tensor:
    device = logp.device
    advantages = torch.tensor(batch.advantages, dtype=logp.dtype)[rows.owner].to(device)
    weights = torch.tensor(batch.weights, dtype=logp.dtype)[rows.owner].to(device)
    # On-policy the ratio is 1 and only its gradient counts; another engine's log-probabilities would bias it.
    old = logp.detach() if batch.old_logp is None else batch.flat(batch.old_logp, rows).to(device)
    reference = None if batch.ref_logp is None else batch.flat(batch.ref_logp, rows).to(device)
    terms = grpo_terms(logp, old, advantages, clip_low=settings.clip_low, clip_high=settings.clip_high, ref_logp=reference)
    sampler = batch.flat(batch.sampler_logp, rows).to(device)
    stats.tokens += len(logp)
    stats.kl += float(terms.kl.detach().sum())
    stats.entropy += float(entropy.sum())
    stats.clipped_low += float(terms.clipped_low.sum())
    stats.clipped_high += float(terms.clipped_high.sum())
    stats.mismatch_kl += float(k3(sampler, old).sum())
    stats.mismatch_max = max(stats.mismatch_max, float((sampler - old).abs().max()))
    return grpo_loss(terms, weights, settings.kl)


def _summed(stats: UpdateStats) -> UpdateStats:
    everyone = ranks.gather(vars(stats))
    summed = UpdateStats(**{name: sum(s[name] for s in everyone) for name in vars(stats)})
    summed.grad_norm, summed.referenced = stats.grad_norm, stats.referenced
    summed.mismatch_max = max(s["mismatch_max"] for s in everyone)
    return summed
