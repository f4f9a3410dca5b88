"""How many tokens a model can read at most: models that look positions up in a table read no more than it has rows.

Rotary and recurrent models compute their positions: they read longer texts than they were trained on, and have no limit here.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import torch

TABLE = re.compile(r"(^|\.)(wpe|positions?_embed|position_embeddings?|embed_positions|pos_encoding)(\.weight)?$")
"""Names of position tables: parameters or buffers of shape (positions, width). Tables called `weights` grow on demand."""
OTHER_INPUTS = re.compile(r"vision|visual|image|audio|speech")
"""Parts of a model that read something else than text."""


def position_limit(model: Any) -> int | None:
    """Most tokens that a causal language model of transformers can read; None where its code has no limit."""
    return min(_limits(model), default=None)


def _limits(model: Any) -> Iterator[int]:
    config = model.config.get_text_config(decoder=True)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if TABLE.search(name) and not OTHER_INPUTS.search(name) and tensor.dim() == 2 and torch.is_floating_point(tensor):
            module = model.get_submodule(name.rpartition(".")[0])
            yield tensor.shape[0] - _first_row(module if name.endswith("weight") else None)
    if shape := getattr(config, "axial_pos_shape", None):  # Reformer: a table for each factor of the position
        yield math.prod(shape)
    if getattr(getattr(config, "attn_config", None), "alibi", False):  # MPT: a bias for each pair of positions
        yield config.max_seq_len


def _first_row(module: Any) -> int:
    """The row of the first position: some tables leave room before it for a pad token's."""
    if (offset := getattr(module, "offset", None)) is not None:
        return int(offset)
    padding = getattr(module, "padding_idx", None)
    return 0 if padding is None else int(padding) + 1
