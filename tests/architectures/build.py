"""Builds every causal language model class of transformers in the small: few layers, tiny widths, random float32 weights.

Each config gets small numbers for the fields it has (`SIZES`), a layer list with one layer of each of its layer types, and
for some classes a few fields of their own (`OVERRIDES`).
"""

import copy
import dataclasses
import inspect
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 96
POSITIONS = 64
"""Most tokens that a model with learned positions can read."""
WINDOW = 16
"""Tokens of a sliding window or an attention chunk."""
LOGIT_SPREAD = 2.0
"""Standard deviation that the logits of a text are scaled to, in nats."""

MOST_PARAMETERS = 8_000_000

WIDTH, HEADS, KV_HEADS, HEAD = 32, 4, 2, 8

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": 48,
    "head_dim": HEAD,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    "hidden_dropout": 0.0,
    # other names of the same
    "d_model": WIDTH,
    "n_embd": WIDTH,
    "emb_dim": WIDTH,
    "embedding_size": WIDTH,
    "n_positions": POSITIONS,
    "n_ctx": POSITIONS,
    "max_seq_len": POSITIONS,
    "context_length": POSITIONS,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "n_head": HEADS,
    "n_heads": HEADS,
    "num_heads": HEADS,
    "attention_heads": HEADS,
    "ffn_dim": 48,
    "dff": 48,
    "d_inner": 48,
    "dim_ff": 48,
    "feed_forward_size": 48,
    "ffn_hidden_size": 48,
    "intermediate_size_mlp": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "decoder_attention_heads": HEADS,
    "encoder_attention_heads": HEADS,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_attention_heads": HEADS,
    "num_decoder_attention_heads": HEADS,
    "max_target_positions": POSITIONS,
    "max_source_positions": POSITIONS,
    "dim_head": HEAD,
    "attention_head_size": HEAD,
    "kv_channels": HEAD,
    "rotary_dim": 4,
    # windows and chunks
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    "attention_window_size": WINDOW,
    "window_size": WINDOW,
    "local_attention": WINDOW,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
    "block_size": 8,
    # latent attention and indexers
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "o_lora_rank": 8,
    "index_head_dim": 8,
    "index_topk": 8,
    "index_n_heads": 16,  # so many that no key scores 0 with all of them: ties would be broken by chance
    # mixtures of experts
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "dense_intermediate_size": 48,
    "zero_expert_num": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "router_hidden_size": 16,
    # state spaces and linear attention
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_d_head": 8,
    "mamba_d_ssm": 64,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "linear_key_head_dim": HEAD,
    "linear_value_head_dim": HEAD,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": HEAD,
    "linear_num_heads": 4,
    # the rest
    "query_pre_attn_scalar": HEAD,
    "decoder_start_token_id": 1,
    "sep_token_id": 2,
    "cls_token_id": 1,
    "mask_token_id": 3,
    "begin_suppress_tokens": None,
    "suppress_tokens": None,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "scale_emb": 1,
    "dim_model_base": WIDTH,
    "adapter_rank": 8,
    "gated_norm_rank": 8,
    "hc_lowrank": 8,
}

MEDIA_TOKENS = ("image", "video", "audio", "boi", "eoi", "boa", "eoa", "vision")

BOTH = {"layer_types": ["sliding_attention", "full_attention"]}

OVERRIDES: dict[str, dict[str, Any]] = {
    "DeepseekV4Config": {
        "layer_types": ["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"],
        "num_hidden_layers": 3,
    },
    "Dots1Config": BOTH,
    "LagunaConfig": BOTH,
    "Lfm2Config": {"layer_types": ["conv", "full_attention"]},
    "MellumConfig": BOTH,
    "MiniMaxM3VLTextConfig": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_block_size": 4,
        "index_topk_blocks": 2,
        "index_n_heads": KV_HEADS,
    },
    "MinistralConfig": BOTH,
    "SmolLM3Config": BOTH | {"use_sliding_window": True},
    "AriaTextConfig": {"moe_num_experts": 4},
    "BambaConfig": {"attn_layer_indices": [1]},
    "BltLocalEncoderConfig": {"hidden_size_global": WIDTH, "sliding_window": WINDOW, "cross_attn_k": 1, "num_hidden_layers": 1},
    "BltLocalDecoderConfig": {"hidden_size_global": WIDTH, "cross_attn_k": 1},
    "BltConfig": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3], "cross_attn_k": 1},
    "CohereCompassTextConfig": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "DbrxAttentionConfig": {"kv_n_heads": KV_HEADS, "clip_qkv": 8.0, "rope_theta": 10000.0},
    "DbrxFFNConfig": {"hidden_size": WIDTH, "moe_top_k": 2},
    "Dots3NoteTextConfig": {
        "num_key_value_heads": HEADS,
        "head_dim": 12,
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nTextConfig": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "GraniteMoeHybridConfig": {"layer_types": ["linear_attention", "full_attention"]},
    "GraniteConfig": {"logits_scaling": 8.0},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "Mamba2Config": {"num_heads": 8},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
    },
    "RecurrentGemmaConfig": {"block_types": ["recurrent", "attention"], "lru_width": WIDTH},
    "ReformerConfig": {
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 8,
    },
    "RoCBertConfig": {
        "pronunciation_vocab_size": 16,
        "shape_vocab_size": 16,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "XLMConfig": {"causal": True},
    "XLNetConfig": {"attn_type": "uni"},
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": {
        "num_key_value_heads": HEADS,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
    },
    "Zamba2Config": {"num_key_value_heads": HEADS},
    "ZayaConfig": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"]},
    "xLSTMConfig": {"hidden_size": 64, "qk_dim_factor": 1.0},
    "LongcatFlashConfig": {"head_dim": 4, "num_layers": 1},
}
"""Fields by config class name, after `SIZES`."""

SHARED_ONLY = {
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}

PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "Gemma4AssistantConfig": {"text_config": SHARED_ONLY},
    "Gemma4UnifiedAssistantConfig": {"text_config": SHARED_ONLY},
}
"""Fields of configs inside configs, by the outer class name and the inner config's field."""

NOT_TEXT = ("MusicgenForCausalLM", "MusicgenMelodyForCausalLM")
"""Classes that read several codes a step: their forward on token ids fails."""

DRAFTS = "drafts for another model whose keys and values it reads: none of its layers has its own"
BLOCKED = {
    "Gemma3nForConditionalGeneration": ("its vision tower needs the library timm, which is no dependency", "requires the timm"),
    "Gemma4AssistantForCausalLM": (DRAFTS, "layer types producing a cache"),
    "Gemma4UnifiedAssistantForCausalLM": (DRAFTS, "layer types producing a cache"),
}
"""Classes that are not built: why, and what the error says. The sweep fails where one of them builds, or fails otherwise."""


def classes() -> list[str]:
    """Names of the distinct causal language model classes of the installed transformers, sorted."""
    names: set[str] = set()
    for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        names.update([value] if isinstance(value, str) else value)
    return sorted(names)


def config_class(name: str) -> type:
    """The config class of a model class: its own, or where it has none the last that is mapped to it."""
    kinds = [kind for kind, value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if value == name]
    return getattr(getattr(transformers, name), "config_class", None) or CONFIG_MAPPING[kinds[-1]]


def small_config(kind: type, **fields: Any) -> Any:
    """A config of this class with small sizes."""
    names = {field.name for field in dataclasses.fields(kind)}
    aliases = getattr(kind, "attribute_map", {})
    values = {name: value for name, value in SIZES.items() if name in names and name not in aliases}
    for name in names:
        if name.endswith(("token_id", "token_index")) and name.startswith(MEDIA_TOKENS):
            values[name] = VOCABULARY - 1
    parts = PARTS.get(kind.__name__, {})
    for name, part in (getattr(kind, "sub_configs", {}) | getattr(kind, "sub_configs_defaults", {})).items():
        if not isinstance(part, type):  # a specification: which class, and whether it must be there
            if part.optional:
                continue
            part = CONFIG_MAPPING[part.model_type] if part.model_type else part.config_class
        if dataclasses.is_dataclass(part) and part is not AutoConfig:
            values[name] = small_config(part, **parts.get(name, {}))
    layers = _layer_types(kind, names)
    if layers:
        values[_layers_field(kind, names)] = layers
        if "num_hidden_layers" in names:
            values["num_hidden_layers"] = len(layers)
    if "kv_lora_rank" in names and "num_key_value_heads" in names:
        values["num_key_value_heads"] = HEADS  # latent attention expands to as many keys as queries
    values |= OVERRIDES.get(kind.__name__, {}) | fields
    return kind(**values)


def _layers_field(kind: type, names: Iterable[str]) -> str:
    """The field that lists the layers' types; empty where there is none."""
    return next((name for name in ("layer_types", "layers_block_type") if name in names), "")


def _layer_types(kind: type, names: Iterable[str]) -> list[str]:
    """One layer of each type that the class's default config has, at least two; empty where it has no such list."""
    field = _layers_field(kind, names)
    if not field:
        return []
    types = list(dict.fromkeys(getattr(kind(), field, None) or []))
    return types * 2 if len(types) == 1 else types


def build(name: str, seed: int = 0, **fields: Any) -> Any:
    """A model of this class in float32 and evaluation mode, its logits far from uniform."""
    config = small_config(config_class(name), **fields)
    torch.manual_seed(seed)
    kind = getattr(transformers, name)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(copy.deepcopy(config)).parameters())
    assert size < MOST_PARAMETERS, f"{size} parameters: some field of its config is not small"
    model = kind._from_config(config, dtype=torch.float32).eval()
    spread(model, seed)
    return model


@torch.no_grad()
def spread(model: nn.Module, seed: int = 0) -> None:
    """Draw matrices of unit gain and disturb vectors, then scale the head until the logits spread by `LOGIT_SPREAD`."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2:
            parameter.add_(0.1 * noise)
        else:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    head = getattr(model.get_output_embeddings(), "weight", None)
    if head is None or type(model).__name__ in NOT_TEXT:
        return
    ids = torch.randint(4, VOCABULARY - 4, (1, 24), generator=generator)
    for _ in range(4):  # tied embeddings change what they are multiplied with, too
        head.mul_(LOGIT_SPREAD / own_logits(model, ids).std().clamp(min=1e-3))


def own_logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """(R, T, V) logits of a model's own forward on (R, T) token ids."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    return model(input_ids=ids, **options).logits
