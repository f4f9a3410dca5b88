"""A model folder whose answers are written beforehand: each token decides the next one, whatever came before it.

A Llama whose layers add nothing and whose head is a table from token to token: it goes through every engine as any other model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

CERTAIN = 60.0
"""Logit of a next token; all others have 0."""


def scripted_model(folder: Path, tokenizer: Any, script: Mapping[str, Sequence[str]], *, seed: int = 0) -> Path:
    """Write the folder. `script`: token -> the tokens that may follow it, equally likely.

    With one token of the prompt as its beginning, `{"?": ["<think>"], "<think>": ["1"], …}` writes the same answer for ever.
    """
    torch.manual_seed(seed)
    size = len(tokenizer)
    width = size + size % 2
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[0].get_submodule(name).weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, width))
        head = torch.zeros(size, width)
        for token, following in script.items():
            for other in following:
                number, next_one = tokenizer.convert_tokens_to_ids([token, other])
                head[next_one, number] = CERTAIN / width**0.5  # the final norm makes the 1 of the embedding √width
        model.lm_head.weight.copy_(head)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def toy_tokenizer(folder: Path, *, special: Sequence[str] = ()) -> Any:
    """The toy's tokenizer, with some of its tokens declared special."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    from stages.problems.toy import save_toy_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = save_toy_tokenizer(folder)
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(text, special=True) for text in special]})
        tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def answering(*answers: str) -> dict[str, list[str]]:
    """A script for questions that end with `?`: it thinks `a`, and answers with one of the symbols."""
    start = {"?": ["<think>"], "<think>": ["a"], "a": ["</think>"], "</think>": ["<answer>"], "<answer>": list(answers)}
    return start | {answer: ["</answer>"] for answer in answers} | {"</answer>": ["<eos>"]}
