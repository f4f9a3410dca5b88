"""Drawing tokens: random numbers that belong to a sample, and a draw that is cheap for large vocabularies."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

Choose = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(R, V) logits, which it may overwrite, and (R,) random numbers -> (R,) tokens and their log-probabilities."""
LIKELY = 1024
"""Tokens among which a nucleus is looked for first; only where they do not hold it is the whole vocabulary sorted."""
BLOCK = 256
"""Entries of a block in the two-level search; the vocabulary is cut into blocks of this many (a smaller one is a block)."""


def derived_seed(seed: int, *identity: object) -> int:
    """63 bits that depend on the seed and the identity alone, not on who else is sampled."""
    digest = hashlib.sha256(repr((seed, *identity)).encode()).digest()
    return int.from_bytes(digest[:8], "big") & (2**63 - 1)


def uniforms(length: int, seed: int, *identity: object) -> Tensor:
    """(length,) random numbers in [0, 1) from the seed that `derived_seed` gives."""
    generator = torch.Generator().manual_seed(derived_seed(seed, *identity))
    return torch.rand(length, generator=generator, dtype=torch.float64).float().clamp(max=1 - 2**-24)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Invert the cumulative distribution: the token whose interval of cumulated probability holds `uniform`.

    probabilities: (B, V), or any multiple of them; uniform: (B,). Returns (B,) token ids. Two levels (first the block, then the
    token in it) cost one pass over the vocabulary and a search in 256 entries; a token of probability 0 is never drawn.
    """
    rows, vocabulary = probabilities.shape
    size = min(BLOCK, vocabulary)
    padded = torch.nn.functional.pad(probabilities, (0, -vocabulary % size)).view(rows, -1, size)
    ends = padded.sum(-1).cumsum(-1)  # (B, blocks)
    target = (uniform.to(ends.dtype) * ends[:, -1])[:, None]  # (B, 1)
    block = torch.searchsorted(ends, target, right=True).clamp(max=ends.shape[1] - 1)  # (B, 1)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), torch.zeros_like(target))
    inside = padded.gather(1, block[:, :, None].expand(-1, -1, size)).squeeze(1)  # (B, size)
    within = torch.searchsorted(inside.cumsum(-1), target - before, right=True)  # (B, 1)
    # Rounding may leave the target past the block's last entry: then its last token of positive probability is meant.
    columns = torch.arange(size, device=inside.device)
    last = torch.where(inside > 0, columns, torch.zeros_like(columns)).amax(-1, keepdim=True)
    return (block * size + torch.minimum(within, last)).squeeze(1)


def choose(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Next tokens, and their log-probabilities under the temperature, before top-p; (R,) each. At temperature 0 the likeliest.

    logits: (R, V) float32, overwritten; uniform: (R,). One exponential serves the draw and the log-probability.
    """
    top = logits.amax(-1, keepdim=True)
    if temperature == 0:
        chosen = logits.argmax(-1, keepdim=True)
        shifted = logits.sub_(top)
        logp = shifted.gather(-1, chosen) - shifted.exp_().sum(-1, keepdim=True).log()
        return chosen.squeeze(-1), logp.squeeze(-1)
    shifted = logits.sub_(top).div_(temperature)
    weights = shifted.exp()
    total = weights.sum(-1, keepdim=True)
    chosen = draw(nucleus(weights, top_p) if top_p < 1 else weights, uniform)[:, None]
    logp = shifted.gather(-1, chosen) - total.log()
    return chosen.squeeze(-1), logp.squeeze(-1)


def nucleus(weights: Tensor, top_p: float) -> Tensor:
    """Keep the fewest largest weights of a row that sum to at least `top_p` of it; zero the rest. (B, V) -> (B, V)."""
    wanted = weights.sum(-1, keepdim=True) * top_p
    ordered, index = weights.topk(min(LIKELY, weights.shape[-1]), dim=-1)
    if bool((ordered.sum(-1, keepdim=True) < wanted).any()):
        ordered, index = weights.sort(dim=-1, descending=True)
    drop = ordered.cumsum(-1) - ordered >= wanted  # the token that crosses top_p stays
    return torch.zeros_like(weights).scatter(1, index, ordered.masked_fill(drop, 0.0))
