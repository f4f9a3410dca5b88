"""Attention over packed texts: a prompt's keys and values serve all answers behind it, and texts do not see each other.

What all prompts begin with (instructions, worked examples) stands once: to it the rest of each prompt is what an answer is to
its prompt, and an answer's prompt is both together.

transformers hands every layer's queries, keys and values (T tokens in a line, no padding) to `packed_attention`, which spreads
them over the places of a `Layout` and works family by family. An answer's token looks at the whole prompt (no mask, one product
for all answers to it) and at its own answer's earlier tokens (causal, no mask either). On a CPU in float32 one compiled kernel
does both (attention_cpu.py). Where it cannot, PyTorch's flash kernel does one after the other, and their log-sum-exps put them
together (as ring attention does, arXiv 2310.01889), so that nothing of the size of length × length is ever held. It takes and
gives heads before tokens, but in memory it has tokens before heads, as the line of tokens has: nothing is copied for it, and
fewer key heads than query heads are its business too. Elsewhere than on a CPU the public function gets both as one with a mask:
the same numbers, and what tests compare with.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stages.contract.errors import UserError
from stages.engine.packing import attention_cpu

NAME = "packed"
"""What a model's attention implementation is called when it reads packed texts (and anything else as `sdpa` does)."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Family:
    """Texts worked on together: S prompts of at most C tokens, each with about as many answers, in blocks of like length.

    A prompt with fewer answers than another has empty ones. Texts that share nothing have none: each is a prompt.
    """

    prompts: int
    prompt_length: int
    blocks: tuple[tuple[int, int], ...] = ()
    """Of each block how many answers a prompt has there, G, and how many tokens the longest has, L."""
    hidden: Tensor | None = field(default=None, compare=False)
    """(S, C) whether a place is behind the end of its prompt; None where no answer could look there."""

    @property
    def sizes(self) -> list[int]:
        """Places of its prompts, and of the answers of each block."""
        return [self.prompts * self.prompt_length, *(self.prompts * count * length for count, length in self.blocks)]


@dataclass
class Layout:
    """Where T packed tokens stand among P places; places behind the end of a shorter text are empty."""

    families: list[Family]
    """Each has its prompts' places, then those of its answers, block by block; their prompts are without the prefix."""
    token: Tensor
    """(P,) the token at each place; 0 where it is empty."""
    place: Tensor
    """(T,) the place of each token."""
    empty: Tensor
    """(E,) places where no token is."""
    prefix: int = 0
    """Tokens that every prompt begins with; they have the first places."""

    def to(self, device: torch.device) -> "Layout":
        """The same on another device."""
        families = [f if f.hidden is None else replace(f, hidden=f.hidden.to(device)) for f in self.families]
        return Layout(families, self.token.to(device), self.place.to(device), self.empty.to(device), self.prefix)


class _Spread(torch.autograd.Function):
    """(T, …) -> (P, …). An empty place holds a copy that nothing real looks at, and gives no gradient back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return values.index_select(0, layout.token)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].index_select(0, ctx.layout.place), None


class _Collect(torch.autograd.Function):
    """(P, …) -> (T, …)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return values.index_select(0, layout.place)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].index_select(0, ctx.layout.token).index_fill_(0, ctx.layout.empty, 0.0), None


class _Joined(torch.autograd.Function):
    """Attention to a prompt (all of it) and to oneself (causal) as one softmax; shapes as `_joined` has them.

    Each part's flash kernel gives its output and log-sum-exp; backward, each gets the joint ones, and so its own gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt_key: Tensor,
        prompt_value: Tensor,
        hidden: Tensor | None,
        scale: float,
    ) -> Tensor:
        bias = None if hidden is None else torch.zeros_like(hidden, dtype=query.dtype).masked_fill_(hidden, -torch.inf)
        bias = None if bias is None else bias[:, None, None]  # (S, 1, 1, C)
        there, here = (_by_prompt(query), _heads(prompt_key), _heads(prompt_value)), map(_by_answer, (query, key, value))
        of_prompt, sum_prompt = _flash(*there, attn_mask=bias, scale=scale)
        of_self, sum_self = _flash(*here, is_causal=True, scale=scale)
        sum_prompt, sum_self = (_heads(x).reshape(query.shape[:-1]) for x in (sum_prompt, sum_self))  # (S, G, L, H)
        total = torch.logaddexp(sum_prompt, sum_self)
        share = (sum_self - total).exp_().to(query.dtype)[..., None]
        joint = torch.lerp(_heads(of_prompt).reshape(query.shape), _heads(of_self).reshape(query.shape), share)
        ctx.scale, ctx.bias = scale, bias
        ctx.save_for_backward(query, key, value, prompt_key, prompt_value, joint, total)
        return joint

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, prompt_key, prompt_value, joint, total = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        # (gradient, query, key, value, output, log-sum-exp), once to the prompt and once to oneself.
        there = _by_prompt(gradient), _by_prompt(query), _heads(prompt_key), _heads(prompt_value)
        results = _by_prompt(joint), _by_prompt(total)
        to_query, *to_prompt = _flash_backward(*there, *results, 0.0, False, attn_mask=ctx.bias, scale=ctx.scale)
        here = map(_by_answer, (gradient, query, key, value, joint, total))
        also, *to_own = _flash_backward(*here, 0.0, True, scale=ctx.scale)
        to_query = _heads(to_query).reshape(query.shape) + _heads(also).reshape(query.shape)
        return to_query, *(_heads(x).reshape(key.shape) for x in to_own), *map(_heads, to_prompt), None, None


def _heads(x: Tensor) -> Tensor:
    """(n, tokens, heads, …) <-> (n, heads, tokens, …)."""
    return x.transpose(1, 2)


def _by_prompt(x: Tensor) -> Tensor:
    """(S, G, L, heads, …) -> (S, heads, G × L, …)."""
    return _heads(x.flatten(1, 2))


def _by_answer(x: Tensor) -> Tensor:
    """(S, G, L, heads, …) -> (S × G, heads, L, …)."""
    return _heads(x.flatten(0, 1))


def attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, *, joined: bool) -> Tensor:
    """(T, H, d) attention of packed tokens. query: (T, H, d); key, value: (T, K, d), of which H is a multiple.

    joined: by log-sum-exps (CPU), else with a mask.
    """
    # Split at once: the gradient of a slice is a whole array of zeros for each.
    sizes = [layout.prefix, *(size for family in layout.families for size in family.sizes)]
    parts = iter(zip(*(_Spread.apply(x, layout).split(sizes) for x in (query, key, value)), strict=True))
    work, found = _joined if joined else _masked, []
    prefix_q, prefix_k, prefix_v = (x[None] for x in next(parts))
    if layout.prefix:
        found.append(_causal(prefix_q, prefix_k, prefix_v, scale).flatten(0, 1))
    for family in layout.families:
        q, k, v = (x.unflatten(0, (family.prompts, -1)) for x in next(parts))
        hidden = family.hidden
        if layout.prefix:
            found.append(work(q[None], k[None], v[None], prefix_k, prefix_v, None, scale).flatten(0, 2))
            if family.blocks:
                k, v = (torch.cat([x.expand(len(y), -1, -1, -1), y], 1) for x, y in ((prefix_k, k), (prefix_v, v)))
            hidden = None if hidden is None else torch.nn.functional.pad(hidden, (layout.prefix, 0))
        else:
            found.append(_causal(q, k, v, scale).flatten(0, 1))
        for count, _ in family.blocks:
            own_q, own_k, own_v = (x.unflatten(0, (family.prompts, count, -1)) for x in next(parts))
            found.append(work(own_q, own_k, own_v, k, v, hidden, scale).flatten(0, 2))
    result: Tensor = _Collect.apply(torch.cat(found), layout)
    return result


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """(S, C, H, d), each text for itself. Shorter ones have empty places at their end, which no earlier place sees."""
    none = key[:, :0]
    if attention_cpu.usable(query[:, None], none) and value.shape[-1] == query.shape[-1]:
        lengths = torch.zeros(len(query), dtype=torch.long)
        return attention_cpu.joined(query[:, None], key[:, None], value[:, None], none, none, lengths, scale).squeeze(1)
    repeats, grouped = query.shape[2] // key.shape[2], query.device.type == "cpu"
    q, k, v = map(_heads, (query, key, value) if grouped else (query, _repeat(key, repeats), _repeat(value, repeats)))
    return _heads(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped and repeats > 1))


def _repeat(x: Tensor, repeats: int) -> Tensor:
    """(…, K, d) -> (…, K × repeats, d), each head `repeats` times in a row."""
    return x if repeats == 1 else x.repeat_interleave(repeats, dim=-2)


def _joined(
    query: Tensor, key: Tensor, value: Tensor, prompt_key: Tensor, prompt_value: Tensor, hidden: Tensor | None, scale: float
) -> Tensor:
    """(S, G, L, H, d) attention of answers.

    query: as the result; key, value: (S, G, L, K, d); prompt's: (S, C, K, d); hidden: (S, C) places that are no token's.
    """
    if attention_cpu.usable(query, prompt_key):
        full = prompt_key.new_full((len(query),), prompt_key.shape[1], dtype=torch.long)
        lengths = full if hidden is None else (~hidden).sum(1)
        return attention_cpu.joined(query, key, value, prompt_key, prompt_value, lengths, scale)
    joint: Tensor = _Joined.apply(query, key, value, prompt_key, prompt_value, hidden, scale)
    return joint


def _masked(
    query: Tensor, key: Tensor, value: Tensor, prompt_key: Tensor, prompt_value: Tensor, hidden: Tensor | None, scale: float
) -> Tensor:
    """As `_joined`, with the prompt's keys copied for every answer, and a mask."""
    answers, longest, repeats = query.shape[1], query.shape[2], query.shape[3] // key.shape[3]
    read = prompt_key.shape[1]

    def seen(own: Tensor, prompt: Tensor) -> Tensor:
        both = torch.cat([prompt.repeat_interleave(answers, 0), own.flatten(0, 1)], dim=1)  # (S × G, C + L, K, d)
        return _heads(_repeat(both, repeats))

    visible = torch.ones(longest, read + longest, dtype=torch.bool, device=query.device).tril(read)
    if hidden is not None:
        behind = torch.nn.functional.pad(hidden.repeat_interleave(answers, 0), (0, longest))
        visible = visible & ~behind[:, None, None]  # (S × G, 1, L, C + L)
    own, keys, values = _heads(query.flatten(0, 1)), seen(key, prompt_key), seen(value, prompt_value)
    found = scaled_dot_product_attention(own, keys, values, attn_mask=visible, scale=scale)
    answer: Tensor = _heads(found).unflatten(0, (-1, answers))
    return answer


def packed_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Transformers' attention interface: (1, H, T, d) and (1, K, T, d) -> (1, T, H, d), by the layout in `packed_layout`.

    Without one it is transformers' own sdpa.
    """
    layout = options.pop("packed_layout", None)
    if layout is None and attention_mask is not None and attention_mask.numel() == 1 and query.shape[2] > 1:
        raise UserError(
            "the model's layers do not hand on what part packed texts",
            where="model",
            mend="take a model whose attention gets its options from transformers' attention interface",
        )
    if layout is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return found
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    # The kernels that join log-sum-exps want values of the keys' size, which latent attention (DeepSeek-V3) does not have.
    joined = query.device.type == "cpu" and value.shape[-1] == query.shape[-1]
    return attend(q, k, v, layout, scale, joined=joined)[None], None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
