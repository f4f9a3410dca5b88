"""A lean forward pass for decoding, over a model's own weights: Llama, Qwen2 and Qwen3 (and what is built the same).

Per token a transformers forward spends more on bookkeeping than on arithmetic for small models, and its cache is copied for
every token. Here: preallocated caches, keys and values of a prompt held once for all its answers, rotary tables worked out
once, few operations, and products written as W @ x with a column for each row of the batch (a CPU's product library repacks W
less: 1.2 to 1.5 times as fast as x @ Wᵀ for 16 to 64 rows). Weights are read where they lie, so they are always the policy's
of now; projections are not fused, for that would copy them for one per cent.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from stages.engine.adapters import AdaptedLinear, adapters
from stages.rollout.decoding.token_sampling import Choose, choose

FAMILIES = (LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
MOVING_ROTARY = ("dynamic", "longrope")
"""Rotary embeddings whose angles depend on the length of the text: no table can be made of them."""


def unsupported(model: Any) -> str:
    """Why a model cannot be decoded here; empty when it can."""
    config = model.config
    if type(model) not in FAMILIES:
        return f"{type(model).__name__} is none of {', '.join(f.__name__ for f in FAMILIES)}"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return "some of its layers attend to a window"
    if model.model.rotary_emb.rope_type in MOVING_ROTARY:
        return f"its rotary embedding is {model.model.rotary_emb.rope_type}"
    layers = [(name, module) for name, module in model.named_modules() if name.endswith(("_proj", "lm_head"))]
    odd = [name for name, module in layers if type(module) not in (nn.Linear, AdaptedLinear)]
    return f"`{odd[0]}` is no plain linear layer" if odd else ""


class Cache:
    """Keys and values of n texts side by side, for C tokens each."""

    def __init__(self, both: Tensor) -> None:
        """`both`: (layers, 2, n, K, C, d), keys before values."""
        self.both = both

    @property
    def tokens(self) -> int:
        """C."""
        return int(self.both.shape[4])


@dataclass
class Prompts:
    """S prompts in flight, what their R rows look at, and who belongs to whom."""

    cache: Cache
    """Of S texts; what is behind a shorter prompt's end is hidden."""
    lengths: Tensor
    """(S,) tokens of each prompt."""
    of_row: Tensor
    """(R,) the prompt of each row."""

    # What follows is worked out when it is first asked for: the compiled step never asks.

    @cached_property
    def group(self) -> int:
        """Most rows of a prompt."""
        return int(torch.bincount(self.of_row, minlength=len(self.lengths)).max())

    @cached_property
    def seat(self) -> Tensor:
        """(R,) seat of each row, of `group` seats a prompt."""
        counts = torch.bincount(self.of_row, minlength=len(self.lengths))
        order = self.of_row.argsort(stable=True)
        number = torch.empty_like(order)  # of each row within its prompt
        number[order] = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[self.of_row[order]]
        return self.of_row * self.group + number

    @cached_property
    def sitter(self) -> Tensor:
        """(S × group,) the row on each seat; any one where it is empty."""
        found = torch.zeros(len(self.lengths) * self.group, dtype=torch.long, device=self.of_row.device)
        found[self.seat] = torch.arange(len(self.of_row), device=found.device)
        return found

    @cached_property
    def in_order(self) -> bool:
        """Whether row n sits on seat n, and no seat is empty."""
        rows = len(self.of_row)
        return len(self.sitter) == rows and bool((self.seat == torch.arange(rows, device=self.seat.device)).all())

    @cached_property
    def hidden(self) -> Tensor:
        """(R, 1, 1, C) whether a place is behind the row's prompt."""
        columns = torch.arange(self.cache.tokens, device=self.of_row.device)
        return (columns >= self.lengths[:, None])[self.of_row][:, None, None]


class LeanDecoder:
    """Prefills prompts and decodes rows of a supported model of H heads, K of them with keys and values, d numbers each."""

    memory = staticmethod(torch.zeros)
    """What a cache is made of."""

    def __init__(self, model: Any, longest: int) -> None:
        """`longest`: most tokens that a text may come to have."""
        config = model.config
        self.model, self.layers = model, model.model.layers
        self.weight = model.model.embed_tokens.weight
        self._factors: dict[nn.Module, tuple[Tensor, Tensor]] = {v: v.factors() for v in adapters(model).values()}
        attention = self.layers[0].self_attn
        self.size = int(attention.head_dim)
        self.heads = int(config.num_key_value_heads)
        self.queries = int(config.num_attention_heads)
        self.repeats = self.queries // self.heads
        self.scale = float(attention.scaling)
        positions = torch.arange(longest, device=self.weight.device)[None]
        cos, sin = (table[0] for table in model.model.rotary_emb(self.weight[:1], positions))
        half = self.size // 2
        # Turning a pair (a, b) is (a, b) cos + (b, a) (−sin, sin): one roll, with the sign in the table.
        self._cos, self._sin = cos, torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)  # (longest, d)

    def chooser(self, temperature: float, top_p: float) -> Choose:
        """What draws the next tokens."""
        return partial(choose, temperature=temperature, top_p=top_p)

    def cache(self, texts: int, tokens: int) -> Cache:
        """Room for so many texts of so many tokens: zeros, for what is hidden counts 0 times, and 0 times no number is none."""
        shape = (len(self.layers), 2, texts, self.heads, tokens, self.size)
        return Cache(self.memory(shape, dtype=self.weight.dtype, device=self.weight.device))

    # --- prompts: (T, features) of all their tokens in a line, so that none of them is filled up but for attention ---

    def prefill(self, prompts: list[tuple[int, ...]], prefix: Cache | None = None) -> tuple[Cache, Tensor]:
        """Keys and values of whole prompts, and (n, V) logits after each.

        prefix: of one text of P tokens, with which all prompts begin and which is not computed again.
        """
        before = 0 if prefix is None else prefix.tokens
        device, count, width = self.weight.device, len(prompts), max(map(len, prompts)) - before
        lengths = torch.tensor([len(p) - before for p in prompts], device=device)
        place = (torch.arange(width, device=device) < lengths[:, None]).flatten().nonzero().flatten()  # (T,) among n × C
        cache = self.cache(count, before + width)
        if prefix is not None:
            cache.both[..., :before, :] = prefix.both
        x = self.model.model.embed_tokens(torch.tensor([token for p in prompts for token in p[before:]], device=device))
        cos, sin = (table[before + place % width, None] for table in (self._cos, self._sin))  # (T, 1, d)
        spread = x.new_zeros(count * width, self.queries + 2 * self.heads, self.size)
        visible = torch.ones(width, before + width, dtype=torch.bool, device=device).tril(before) if before else None
        for number, layer in enumerate(self.layers):
            attention, mlp = layer.self_attn, layer.mlp
            h = _normed(layer.input_layernorm, x)
            projected = (attention.q_proj(h), attention.k_proj(h), attention.v_proj(h))
            spread[place] = self._turned(attention, torch.cat(projected, dim=-1).unflatten(-1, (-1, self.size)), cos, sin)
            heads = spread.unflatten(0, (count, width)).transpose(1, 2)  # (n, H + 2 K, C, d)
            cache.both[number, ..., before:, :] = heads[:, self.queries :].unflatten(1, (2, -1)).transpose(0, 1)
            read, said = cache.both[number].repeat_interleave(self.repeats, dim=2)  # (n, H, P + C, d) each
            o = scaled_dot_product_attention(
                heads[:, : self.queries], read, said, attn_mask=visible, is_causal=visible is None, scale=self.scale
            )
            x = x + attention.o_proj(o.transpose(1, 2).flatten(0, 1)[place].flatten(1))
            h = _normed(layer.post_attention_layernorm, x)
            x = x + mlp.down_proj(silu(mlp.gate_proj(h), inplace=True).mul_(mlp.up_proj(h)))
        return cache, self._logits(x[lengths.cumsum(0) - 1].t())

    # --- rows: (features, R), so that a product is W @ x ---

    def step(self, tokens: Tensor, prompts: Prompts, own: Cache, lengths: Tensor, width: int) -> Tensor:
        """(R, V) logits after one more token for each row.

        tokens: (R,) the newest; own: keys and values of the rows' own tokens, to which its are added (it may have room for more
        rows); lengths: (R,) how many a row had there before; width: the largest of them + 1.
        """
        rows = torch.arange(len(tokens), device=tokens.device)
        positions = prompts.lengths[prompts.of_row] + lengths
        cos, sin = self._cos[positions, None], self._sin[positions, None]  # (R, 1, d)
        later = (rows.new_tensor(range(width)) > lengths[:, None])[:, None, None]  # (R, 1, 1, width)
        hidden = torch.zeros(len(rows), 1, 1, prompts.cache.tokens + width, dtype=self.weight.dtype, device=rows.device)
        hidden.masked_fill_(torch.cat([prompts.hidden, later], dim=-1), -torch.inf)
        x = self.model.model.embed_tokens(tokens).t().contiguous()
        for number, layer in enumerate(self.layers):
            attention, mlp = layer.self_attn, layer.mlp
            heads = self._projected(attention, _normed_columns(layer.input_layernorm, x))
            heads = self._turned(attention, heads, cos, sin)
            own.both[number][:, rows, :, lengths] = heads[:, self.queries :].unflatten(1, (2, -1))
            o = self._attend(heads[:, : self.queries], prompts, prompts.cache.both[number], own.both[number], width, hidden)
            x = self._added(x, attention.o_proj, o.t())
            h = _normed_columns(layer.post_attention_layernorm, x)
            gate, up = self._product(mlp.gate_proj, h), self._product(mlp.up_proj, h)
            x = self._added(x, mlp.down_proj, silu(gate, inplace=True).mul_(up))
        return self._logits(x)

    def _projected(self, attention: Any, h: Tensor) -> Tensor:
        """(R, H + 2 K, d) queries, keys and values of (hidden, R)."""
        found = h.new_empty((self.queries + 2 * self.heads) * self.size, h.shape[1])
        start = 0
        for module in (attention.q_proj, attention.k_proj, attention.v_proj):
            part = found[start : start + len(module.weight)]
            if module in self._factors:
                torch.addmm(self._delta(module, h), module.weight, h, out=part)
            else:
                torch.mm(module.weight, h, out=part)
            if module.bias is not None:
                part += module.bias[:, None]
            start += len(module.weight)
        heads: Tensor = found.t().contiguous().unflatten(1, (-1, self.size))
        return heads

    def _turned(self, attention: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary position embedding (RoFormer, arXiv 2104.09864, halves as pairs) of queries and keys, in place.

        heads: (…, H + 2 K, d); cos, sin: (…, 1, d).
        """
        turned = heads[..., : self.queries + self.heads, :]
        if hasattr(attention, "q_norm"):  # Qwen3
            turned[..., : self.queries, :] = _normed(attention.q_norm, turned[..., : self.queries, :])
            turned[..., self.queries :, :] = _normed(attention.k_norm, turned[..., self.queries :, :])
        rolled = turned.roll(self.size // 2, dims=-1)
        turned.mul_(cos).addcmul_(rolled, sin)
        return heads

    def _attend(self, q: Tensor, prompts: Prompts, read: Tensor, own: Tensor, width: int, hidden: Tensor) -> Tensor:
        """(R, H × d): one softmax over the prompt's places and the row's own.

        q: (R, H, d); read: (2, S, K, C, d) of the prompts; own: (2, ≥ R, K, room, d); hidden: (R, 1, 1, C + width), 0 or −∞.
        """
        q = q.unflatten(1, (self.heads, self.repeats))
        keys, values = (part[: len(q)].flatten(0, 1)[:, :width] for part in own)  # (R × K, width, d)
        prompt_keys, prompt_values = (part.flatten(0, 1) for part in read)  # (S × K, C, d)
        there = self._stand(self._sit(q, prompts) @ prompt_keys.transpose(1, 2), prompts)  # (R, K, repeats, C)
        here = (q.flatten(0, 1) @ keys.transpose(1, 2)).view(*q.shape[:3], width)
        weights = torch.add(hidden, torch.cat([there, here], dim=-1), alpha=self.scale).softmax(-1)
        there, here = weights[..., : there.shape[-1]], weights[..., there.shape[-1] :]
        found = self._stand(self._sit(there, prompts) @ prompt_values, prompts)
        result: Tensor = found + (here.flatten(0, 1) @ values).view(found.shape)
        return result.flatten(1)

    def _sit(self, rows: Tensor, prompts: Prompts) -> Tensor:
        """(R, K, repeats, n) -> (S × K, group × repeats, n): each row onto its seat."""
        seats = rows if prompts.in_order else rows[prompts.sitter]
        by_prompt = seats.unflatten(0, (-1, prompts.group)).transpose(1, 2)  # (S, K, group, repeats, n)
        found: Tensor = by_prompt.reshape(-1, prompts.group * self.repeats, rows.shape[-1])
        return found

    def _stand(self, seated: Tensor, prompts: Prompts) -> Tensor:
        """(S × K, group × repeats, n) -> (R, K, repeats, n): each row up from its seat."""
        rows: Tensor = seated.view(-1, self.heads, prompts.group, self.repeats, seated.shape[-1]).transpose(1, 2).flatten(0, 1)
        return rows if prompts.in_order else rows[prompts.seat]

    def _logits(self, x: Tensor) -> Tensor:
        """(R, V) of (hidden, R)."""
        return self._product(self.model.lm_head, _normed_columns(self.model.model.norm, x)).t().contiguous()

    def _product(self, module: nn.Linear, x: Tensor) -> Tensor:
        """(out, R) of (in, R)."""
        adapted = module in self._factors
        product = torch.addmm(self._delta(module, x), module.weight, x) if adapted else module.weight @ x
        return product if module.bias is None else product.add_(module.bias[:, None])

    def _added(self, x: Tensor, module: nn.Linear, h: Tensor) -> Tensor:
        """X + module(h), both (…, R)."""
        if module in self._factors:
            return x + self._product(module, h)
        return torch.addmm(x if module.bias is None else x + module.bias[:, None], module.weight, h)

    def _delta(self, module: nn.Linear, x: Tensor) -> Tensor:
        """(out, R) what the adapter of a layer adds to its product with (in, R)."""
        a, b = self._factors[module]
        return b @ (a @ x)


def _normed(norm: Any, x: Tensor) -> Tensor:
    """Root mean square normalisation of the last dimension, in float32 at least, as transformers has it."""
    wide = x if x.dtype == torch.float64 else x.float()
    found: Tensor = norm.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.variance_epsilon)).to(x.dtype)
    return found


def _normed_columns(norm: Any, x: Tensor) -> Tensor:
    """The same of the first dimension: (hidden, R)."""
    wide = x if x.dtype == torch.float64 else x.float()
    found: Tensor = (wide * torch.rsqrt(wide.square().mean(0) + norm.variance_epsilon)).to(x.dtype)
    return found.mul_(norm.weight[:, None])
