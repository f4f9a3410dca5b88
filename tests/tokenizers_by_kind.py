"""Tiny tokenizers with the conventions of the field, made with the tokenizers library."""

import string
from pathlib import Path
from typing import Any

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _fast(tokenizer: Any, **names: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "</s>", "pad_token": "<pad>", **names})


def byte_level(*, special: tuple[str, ...] = (), ordinary: tuple[str, ...] = (), append: bool = False, **names: Any) -> Any:
    """GPT-2's kind: bytes, no merges. `special`, `ordinary`: further added tokens; `append`: `</s>` behind every text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {token: number for number, token in enumerate(["<pad>", "</s>", "<s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<pad>", "</s>", "<s>", *special)])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ordinary])
    if append:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", words["<s>"]), ("</s>", words["</s>"])]
        )
        names = {"bos_token": "<s>", **names}
    return _fast(tokenizer, **names)


def sentence_piece(*, special: tuple[str, ...] = (), newline: bool = True) -> Any:
    """Llama 2's kind: a space before every text, bytes as a last resort. `newline`: whether it can write one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    letters = [*string.ascii_letters, *string.digits, *"<>/=+-.,!?\\{}:"]
    pieces = ["▁", *letters, *(f"▁{letter}" for letter in letters), "think", "▁think", "answer"]
    words = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", "<pad>", *BYTES, *pieces])}
    merges = [("▁", letter) for letter in letters]
    tokenizer = Tokenizer(models.BPE(words, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=newline))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>", "<pad>", *special)]
    )
    return _fast(tokenizer, unk_token="<unk>", bos_token="<s>")


def word_piece() -> Any:
    """BERT's kind: lower case, no space before punctuation when it is decoded with its clean-up."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    letters = [*string.ascii_lowercase, *string.digits, *"<>/=,.!?\\{}"]
    tokens = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *letters, *(f"##{letter}" for letter in letters)]
    words = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])]
    )
    return _fast(tokenizer, eos_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]", clean_up_tokenization_spaces=True)


def saved(tokenizer: Any, folder: Path, *, rows: int | None = None, **model: Any) -> Path:
    """A model folder: a tiny random Llama with this tokenizer. `rows`: of the embedding; by default one for each token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rows or len(tokenizer), num_key_value_heads=1, max_position_embeddings=512, **config, **(ids | model)
        )
    )
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
