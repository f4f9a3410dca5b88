"""How long a text may be: the positions that a model has, and the window within which packed texts are computed rightly."""

from typing import Any

from torch import nn

from stages.contract.errors import UserError
from stages.engine.position_limit import position_limit


def text_limit(model: nn.Module) -> int | None:
    """Most tokens of a text by the model's config (`max_position_embeddings`); None where it names no limit."""
    limit = getattr(_text_config(model.config), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def computed_limit(model: nn.Module) -> int | None:
    """Most tokens of a text that the trainer computes: by the config, and by a table of positions. Wants whole weights."""
    return min((limit for limit in (text_limit(model), position_limit(model)) if limit is not None), default=None)


def window(config: Any) -> int | None:
    """Tokens of the longest text in which every token sees all before it, at angles that do not depend on its length.

    A sliding window, a chunk of chunked attention, or where long texts get other rotary angles (longrope); None without any.
    """
    text = _text_config(config)
    sliding = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    limits = [sliding, getattr(text, "attention_chunk_size", None), *_rescaled_from(getattr(text, "rope_parameters", None))]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def _text_config(config: Any) -> Any:
    return config.get_text_config(decoder=True)


def _rescaled_from(rope: Any) -> list[int]:
    """Lengths from which on rotary angles depend on the length of the text; `rope` may be nested by type of layer."""
    if not isinstance(rope, dict):
        return []
    if rope.get("rope_type") == "longrope":
        return [rope["original_max_position_embeddings"]] if "original_max_position_embeddings" in rope else []
    return [limit for inner in rope.values() for limit in _rescaled_from(inner)]


def check_lengths(model: nn.Module, prompt: int, max_tokens: int, *, trained: bool = False) -> None:
    """Raise UserError when texts of a stage may not fit the model's positions.

    prompt: tokens of the longest prompt; max_tokens: of the longest answer, the last of which is not computed; trained: whether
    the texts are trained on. Sampling is limited by a table of positions alone (`position_limit`), training also by the
    config: the trainer computes nothing beyond `max_position_embeddings`.
    """
    limit = computed_limit(model) if trained else position_limit(model)
    if limit is None or prompt + max_tokens - 1 <= limit:
        return
    room = limit + 1 - prompt
    hint = f"set it to {room} or less" if room > 0 else "shorten the prompts, or take a model with more positions"
    what = f"the longest prompt ({prompt} tokens) and {max_tokens} more do not fit {type(model).__name__}'s {limit} positions"
    raise UserError(what, where="sampling.max_tokens", mend=hint)
