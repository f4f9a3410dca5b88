"""The papers' formulas, written out in loops over answers and tokens in plain Python, to hold the tensor code against.

Nothing of `stages` is used here. A number is a float or a scalar tensor, so that gradients can be taken through the loops
(autograd) and round them (differences). A quantity per token comes as one list per answer.
"""

import math
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

F64 = torch.float64


def f64(*values) -> Tensor:
    return torch.tensor(values, dtype=F64)


@dataclass
class Batch:
    """Some answers, their tokens one after the other."""

    lengths: list[int]
    logp: Tensor
    old: Tensor
    ref: Tensor
    sampler: Tensor
    advantages: Tensor
    """One per answer."""

    @property
    def owner(self) -> Tensor:
        return torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))

    @property
    def spread(self) -> Tensor:
        """The advantage of each token."""
        return self.advantages[self.owner]

    def cut(self, flat) -> list[list]:
        """A list per answer of what `flat` has per token."""
        return cut(flat, self.lengths)

    def only(self, answers: list[int]) -> "Batch":
        """These answers, in this order."""
        tokens = torch.cat([(self.owner == i).nonzero()[:, 0] for i in answers])
        flat = [x[tokens] for x in (self.logp, self.old, self.ref, self.sampler)]
        return Batch([self.lengths[i] for i in answers], *flat, self.advantages[answers])


def batch(lengths: list[int], seed: int = 0, spread: float = 0.5) -> Batch:
    """Random answers; ratios of about exp(± spread), some answers' all above or below 1."""
    random, count = torch.Generator().manual_seed(seed), sum(lengths)

    def normal(n):
        return torch.randn(n, generator=random, dtype=F64)

    logp = -normal(count).abs() - 0.1
    whole = torch.repeat_interleave(normal(len(lengths)), torch.tensor(lengths))
    old, ref, sampler = logp - spread * (whole + normal(count)), logp + 0.5 * normal(count), logp - spread * normal(count)
    return Batch(lengths, logp, old, ref, sampler, normal(len(lengths)))


def cut(flat, lengths) -> list[list]:
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [[flat[t] for t in range(end - length, end)] for end, length in zip(ends, lengths, strict=True)]


def exp(x):
    return x.exp() if isinstance(x, Tensor) else math.exp(x)


def frozen(x):
    """The paper's sg(·)."""
    return x.detach() if isinstance(x, Tensor) else x


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def sample_std(numbers):
    numbers = list(numbers)
    return math.sqrt(sum((x - mean(numbers)) ** 2 for x in numbers) / (len(numbers) - 1))


def advantages(name: str, rewards: list[list[float]], valid: list[list[bool]] | None = None) -> list[list[float]]:
    """Of each answer of each group; 0 for those that take no part. Groups with a signal only."""
    valid = valid or [[True] * len(group) for group in rewards]
    kept = [[r for r, v in zip(*pair, strict=True) if v] for pair in zip(rewards, valid, strict=True)]
    over_batch = [r - mean(group) for group in kept for r in group]

    def one(r, group):
        if name == "group":
            return (r - mean(group)) / (sample_std(group) + 1e-4)
        if name == "group_centred":
            return r - mean(group)
        if name == "leave_one_out":
            others = list(group)
            others.remove(r)
            return r - mean(others)
        assert name == "batch_whitened"
        return (r - mean(group) - mean(over_batch)) / (sample_std(over_batch) + 1e-4)

    return [
        [one(r, group) if v else 0.0 for r, v in zip(*pair, strict=True)]
        for *pair, group in zip(rewards, valid, kept, strict=True)
    ]


def ratios(kind: str, logp: list, old: list) -> list:
    """ρ of each token of one answer."""
    if kind == "token":
        return [exp(p - o) for p, o in zip(logp, old, strict=True)]
    whole = sum(p - o for p, o in zip(logp, old, strict=True))
    return [exp(whole / len(logp) if kind == "sequence" else whole)] * len(logp)


def clip(x, low: float | None, high: float | None):
    """Of a ratio, to [1 − low, 1 + high]. A bound that binds is a number without gradient."""
    if low is not None:
        x = max(x, 1.0 - low)
    if high is not None:
        x = min(x, 1.0 + high)
    return x


def clip_surrogate(ratio, advantage, low, high, dual=None):
    """min(ρA, clip(ρ)A), and with a dual clip max(that, cA) where A < 0."""
    smaller = min(ratio * advantage, clip(ratio, low, high) * advantage)
    return max(smaller, dual * advantage) if dual is not None and advantage < 0 else smaller


def weight_surrogate(ratio, advantage, logp, low, high):
    """sg(clip(ρ)) A log π."""
    return frozen(clip(ratio, low, high)) * advantage * logp


def estimate(name: str, logp, ref):
    """Of the KL from one token."""
    d = ref - logp
    return {"k1": -d, "k2": d * d / 2, "k3": exp(d) - d - 1}[name]


def aggregate(how: str, terms: list[list], longest: int):
    """One number from the terms of each answer's tokens."""
    if how == "sample_mean":
        return mean(mean(answer) for answer in terms)
    if how == "token_mean":
        return mean(chain.from_iterable(terms))
    assert how == "constant"
    return sum(sum(answer) for answer in terms) / (len(terms) * longest)


def gae(rewards: list, values: list, gamma: float, lam: float) -> list:
    """A_t = Σ_l (γλ)^l δ_{t+l} of one answer: the definition, not the recursion that follows from it."""
    after = [*values[1:], 0.0]
    delta = [r + gamma * n - v for r, n, v in zip(rewards, after, values, strict=True)]
    return [sum((gamma * lam) ** k * delta[t + k] for k in range(len(delta) - t)) for t in range(len(delta))]


def value_loss(value, old, target, reach: float | None):
    """PPO's clipped value loss of one token."""
    plain = (value - target) ** 2 / 2
    if reach is None:
        return plain
    held = min(max(value, old - reach), old + reach)
    return max(plain, (held - target) ** 2 / 2)


def differences(function, at: list[float], step: float = 1e-6) -> list[float]:
    """The gradient of a function of a list of floats by central differences."""

    def moved(i, by):
        return function([x + by * (j == i) for j, x in enumerate(at)])

    return [(moved(i, step) - moved(i, -step)) / (2 * step) for i in range(len(at))]


def close(found, expected, rtol: float = 1e-10, atol: float = 1e-13) -> None:
    """Assert equality up to rounding, of numbers, lists or tensors."""
    torch.testing.assert_close(*(torch.as_tensor(x, dtype=F64).detach() for x in (found, expected)), rtol=rtol, atol=atol)
