"""Random causal language models of many architectures with two layers, whose logits are far from uniform."""

from typing import Any

import torch
import transformers

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "head_dim": 8,
}
_HYBRID = {
    "layer_types": ["mamba", "attention"],
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "shared_intermediate_size": 16,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "granite": ("GraniteForCausalLM", {"logits_scaling": 8.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0}),
    "cohere": ("CohereForCausalLM", {"logit_scale": 0.25}),
    "gemma2": ("Gemma2ForCausalLM", {"final_logit_softcapping": 3.0, "head_dim": 8}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "opt": ("OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "phi": ("PhiForCausalLM", {}),
    "lfm2": ("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    "qwen3_next": ("Qwen3NextForCausalLM", _LINEAR_ATTENTION),
    "granite_hybrid": ("GraniteMoeHybridForCausalLM", _HYBRID),
    "falcon": ("FalconForCausalLM", {}),
    "mamba": ("MambaForCausalLM", {"state_size": 4}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 16}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {**_LATENT, "v_head_dim": 16}),
    "deepseek_v3_narrow": ("DeepseekV3ForCausalLM", {**_LATENT, "v_head_dim": 8}),
    "bert": ("BertLMHeadModel", {}),
}


def small_model(family: str, seed: int = 0, **fields: Any) -> Any:
    """A model of the family in float32 and evaluation mode; `fields`: of its config."""
    name, own = FAMILIES[family]
    kind = getattr(transformers, name)
    config = kind.config_class(**{**SIZES, **own, **fields})
    config._experts_implementation = "eager"  # the grouped product takes no float64
    torch.manual_seed(seed)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model
