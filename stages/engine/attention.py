"""Attention over packed texts: a prompt's keys and values serve all answers behind it, and texts do not see each other.

transformers hands every layer's queries, keys and values (T tokens in a line, no padding) to `packed_attention`, which spreads
them over the places of a `Layout` and works family by family. An answer's token looks at the whole prompt (no mask, one product
for all answers to it) and at its own answer's earlier tokens (causal, no mask either). On a CPU the two are worked out by the
flash kernel and put together by their log-sum-exps (as ring attention does, arXiv 2310.01889), so that nothing of the size of
length × length is ever held. Elsewhere the public function gets both as one with a mask: the same numbers, and what tests
compare with.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stages.store.errors import UserError

NAME = "packed"
"""What a model's attention implementation is called when it reads packed texts (and anything else as `sdpa` does)."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Family:
    """Texts worked on together: S prompts of C tokens, each with equally many answers, in blocks of like length.

    Texts that share nothing have no answers: each is a prompt of at most C tokens.
    """

    prompts: int
    prompt_length: int
    blocks: tuple[tuple[int, int], ...] = ()
    """Of each block how many answers a prompt has there, G, and how many tokens the longest has, L."""

    @property
    def sizes(self) -> list[int]:
        """Places of its prompts, and of the answers of each block."""
        return [self.prompts * self.prompt_length, *(self.prompts * count * length for count, length in self.blocks)]


@dataclass
class Layout:
    """Where T packed tokens stand among P places; places behind the end of a shorter text are empty."""

    families: list[Family]
    """Each has its prompts' places, then those of its answers, block by block."""
    token: Tensor
    """(P,) the token at each place; 0 where it is empty."""
    place: Tensor
    """(T,) the place of each token."""
    empty: Tensor
    """(E,) places where no token is."""

    def to(self, device: torch.device) -> "Layout":
        """The same on another device."""
        return Layout(self.families, self.token.to(device), self.place.to(device), self.empty.to(device))


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
    """Attention to a prompt (all of it) and to oneself (causal) as one softmax.

    query: (S, K, M, L, d), of M = answers × heads of a group; prompt_key, prompt_value: (S, K, C, d); key, value: as query.
    Each part's flash kernel gives its output and log-sum-exp; backward, each gets the joint ones, and so its own gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, prompt_key: Tensor, prompt_value: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        there, here = query.flatten(2, 3), (query.flatten(1, 2), key.flatten(1, 2), value.flatten(1, 2))
        of_prompt, sum_prompt = _flash(there, prompt_key, prompt_value, scale=scale)
        of_self, sum_self = _flash(*here, is_causal=True, scale=scale)
        # (S, K, M × L) and (S, K × M, L) hold the same numbers in the same order.
        sum_prompt = sum_prompt.reshape(query.shape[:-1])
        sum_self = sum_self.reshape(query.shape[:-1])
        total = torch.logaddexp(sum_prompt, sum_self)
        joint = torch.lerp(
            of_prompt.reshape(query.shape),
            of_self.reshape(query.shape),
            (sum_self - total).exp().to(query.dtype)[..., None],
        )
        ctx.scale = scale
        ctx.save_for_backward(query, prompt_key, prompt_value, key, value, joint, total)
        return joint

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, prompt_key, prompt_value, key, value, joint, total = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        # (gradient, query, key, value, output, log-sum-exp), once to the prompt and once to oneself.
        there = gradient.flatten(2, 3), query.flatten(2, 3), prompt_key, prompt_value, joint.flatten(2, 3), total.flatten(2, 3)
        to_query, to_prompt_key, to_prompt_value = _flash_backward(*there, 0.0, False, scale=ctx.scale)
        here = [x.flatten(1, 2) for x in (gradient, query, key, value, joint, total)]
        also, to_key, to_value = _flash_backward(*here, 0.0, True, scale=ctx.scale)
        return (
            to_query.reshape(query.shape) + also.reshape(query.shape),
            to_prompt_key,
            to_prompt_value,
            to_key.reshape(key.shape),
            to_value.reshape(value.shape),
            None,
        )


def attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, *, joined: bool) -> Tensor:
    """(T, H, d) attention of packed tokens. query: (T, H, d); key, value: (T, K, d), of K = H / repeats heads.

    joined: by log-sum-exps (CPU), else with a mask.
    """
    # Split at once: the gradient of a slice is a whole array of zeros for each.
    sizes = [size for family in layout.families for size in family.sizes]
    parts = iter(zip(*(_Spread.apply(x, layout).split(sizes) for x in (query, key, value)), strict=True))
    work, found = _joined if joined else _masked, []
    for family in layout.families:
        q, k, v = (x.unflatten(0, (family.prompts, -1)).transpose(1, 2) for x in next(parts))
        found.append(_causal(q, k, v, scale).transpose(1, 2).flatten(0, 1))
        for count, _ in family.blocks:
            own_q, own_k, own_v = (x.unflatten(0, (family.prompts, count, -1)) for x in next(parts))
            found.append(work(own_q, own_k, own_v, k, v, scale).flatten(0, 2))
    result: Tensor = _Collect.apply(torch.cat(found), layout)
    return result


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """(S, H, C, d). Shorter texts have empty places at their end, which no earlier place sees."""
    repeats = query.shape[1] // key.shape[1]
    return scaled_dot_product_attention(query, _repeat(key, repeats), _repeat(value, repeats), is_causal=True, scale=scale)


def _repeat(heads: Tensor, repeats: int) -> Tensor:
    """(…, K, n, d) -> (…, K × repeats, n, d), each head `repeats` times in a row."""
    return heads if repeats == 1 else heads.repeat_interleave(repeats, dim=-3)


def _joined(query: Tensor, key: Tensor, value: Tensor, prompt_key: Tensor, prompt_value: Tensor, scale: float) -> Tensor:
    """(S, G, L, H, d) attention of answers. query: as the result; key, value: (S, G, L, K, d); prompt's: (S, K, C, d)."""
    heads, repeats = key.shape[3], query.shape[3] // key.shape[3]
    by_head = query.unflatten(3, (heads, repeats)).permute(0, 3, 1, 4, 2, 5)  # (S, K, G, repeats, L, d)
    own_key, own_value = (
        x.permute(0, 3, 1, 2, 4).unsqueeze(3).expand(by_head.shape).flatten(2, 3)  # (S, K, G × repeats, L, d)
        for x in (key, value)
    )
    joint: Tensor = _Joined.apply(by_head.flatten(2, 3), prompt_key, prompt_value, own_key, own_value, scale)
    return joint.view(by_head.shape).permute(0, 2, 4, 1, 3, 5).flatten(3, 4)


def _masked(query: Tensor, key: Tensor, value: Tensor, prompt_key: Tensor, prompt_value: Tensor, scale: float) -> Tensor:
    """As `_joined`, with the prompt's keys copied for every answer, and a mask."""
    prompts, answers, longest, repeats = *query.shape[:3], query.shape[3] // key.shape[3]
    read = prompt_key.shape[2]

    def seen(own: Tensor, prompt: Tensor) -> Tensor:
        copied = prompt[:, None].expand(prompts, answers, *prompt.shape[1:])
        both = torch.cat([copied, own.transpose(2, 3)], dim=3).flatten(0, 1)  # (S × G, K, C + L, d)
        return _repeat(both, repeats)

    visible = torch.ones(longest, read + longest, dtype=torch.bool, device=query.device).tril(read)
    found: Tensor = scaled_dot_product_attention(
        query.flatten(0, 1).transpose(1, 2),
        seen(key, prompt_key),
        seen(value, prompt_value),
        attn_mask=visible,
        scale=scale,
    )
    answer: Tensor = found.transpose(1, 2).unflatten(0, (prompts, answers))
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
    return attend(q, k, v, layout, scale, joined=query.device.type == "cpu")[None], None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
