"""A tiny random checkpoint of every class in transformers' causal-LM mapping.

    python -m architectures FOLDER [MODEL_TYPE ...]    write checkpoints, with tests/ on the path

The default config of each class is shrunk by the names of its sizes; `SHAPES` holds what a class
needs besides. What cannot be built from its own default config is in `UNBUILT`, with the reason.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import build_tokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCABULARY = 512
# The last rule that matches a key's whole name holds; a default that is smaller stays.
SIZES = [
    (re.compile(pattern), size)
    for pattern, size in (
        (r"hidden_size|d_model|n_embd|n_embed|dim_model|emb(ed)?_dim|backbone_hidden_size", 64),
        (r"embedding_size|word_embed_proj_dim|lru_width|time_step_rank|mamba_dt_rank", 64),
        (r".*intermediate_size.*|.*ffn_dim|n_inner|d_ff|ffn_hidden_size|dff|d_inner", 128),
        (r"ffn_embed_dim|dim_ff|mlp_hidden_size|linear_units|mamba_d_ssm", 128),
        (r"moe_.*intermediate_size|shared_expert_intermediate_size|expert_ffn_hidden_size", 32),
        (r"num_hidden_layers|n_layers?|num_layers|num_blocks|depth", 2),
        (r"(num_)?(de|en)coder_layers", 2),
        (r"num_(attention_|global_attention_|swa_attention_)?heads|n_heads?", 4),
        (r"(num_)?(de|en)coder_attention_heads|swa_num_attention_heads|index_n_heads", 4),
        (r"num_(key_value|kv)_heads|num_query_groups|num_global_key_value_heads", 2),
        (r"swa_num_key_value_heads|linear_num_(key_|value_)?heads", 2),
        (r"(attention_|global_|swa_|qk_nope_|qk_rope_|qk_|swa_v_|v_)?head_dim|d_head", 16),
        (r"linear_(key_|value_)?head_dim|mamba_(d_head|head_dim|headdim)", 16),
        (r"mamba_d_state|(ssm_)?state_size|(mamba_)?chunk_size|index_topk", 16),
        (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
        (r".*_lora_rank|index_head_dim", 32),
        (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts", 4),
        (r"num_experts_per_(tok|token)|moe_topk|top_k_experts|moe_k|moe_top_k", 2),
        (r"experts_per_token|hidden_size_per_layer_input", 2),
        (r"hidden_size_per_layer_input", 16),
        (r"n_group|num_expert_groups?|topk_group|first_k_dense(_replace)?|num_dense_layers", 1),
        (r"max_position_embeddings|n_positions|n_ctx", 512),
        (r"sliding_window|attention_window_size", 64),
    )
]
# Lists by layer, which follow from the number of layers; and what names no size.
DERIVED = frozenset(
    {"no_rope_layers", "hybrid_layer_ids", "attn_layer_indices", "full_attn_idxs", "moe_layers"}
    | {"hybrid_override_pattern", "block_types", "attention_layers", "layers", "pattern"}
    | {"architectures", "transformers_version", "dtype", "id2label", "label2id"}
    | {"per_layer_config", "rope_scaling", "model_type"}
)
_GEMMA3N = {
    "intermediate_size": [128] * 2,
    "activation_sparsity_pattern": [0.95, 0.0],
    "num_hidden_layers": 2,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
    "laurel_rank": 8,
}
_INDEXED = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16}
_QWEN4 = _INDEXED | {"indexer_budget": 32, "indexer_compress_ratio": 4}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
_ZAMBA = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
    "num_key_value_heads": 4,
}
SHAPES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
    | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 16},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 128},
    "gemma3n_text": _GEMMA3N,
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": _MAMBA | {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8, "H_cycles": 2, "L_cycles": 3},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1}
    | {"expert_layer_period": 2, "expert_layer_offset": 1},
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "longcat_flash": {"qk_head_dim": 32, "head_dim": 16, "zero_expert_num": 2, "num_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds": False, "is_decoder": True, "attn_layers": ["local", "lsh"]}
    | {"local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_buckets": 4},
    "rwkv": {"attention_hidden_size": 64},
    "xlstm": {"embedding_dim": 64, "num_blocks": 2, "num_heads": 4, "chunk_size": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA | {"attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": _ZAMBA
    | {"num_mem_blocks": 1, "hybrid_layer_ids": [1, 3]}
    | {"n_mamba_heads": 8, "mamba_headdim": 16},
}
UNBUILT = {
    "blt": "its config has no number of layers",
    "cohere_compass_text": "its default rope_parameters name no layer type",
    "dbrx": "its config has no rope_theta",
    "dots3_note": "its adapters' width is not that of a shrunk model",
    "emu3": "saved alone, its text model names a class that transformers does not load",
    "mllama": "saved alone, its text model names a class that transformers does not load",
    "gemma3n": "its vision tower needs timm and PIL",
    "gemma4_assistant": "a draft model, whose config describes a pair",
    "gemma4_unified_assistant": "a draft model, whose config describes a pair",
    "musicgen": "a decoder of audio codes, inside a larger config",
    "musicgen_melody": "a decoder of audio codes, inside a larger config",
}


def model_types() -> list[str]:
    """Every `model_type` of the mapping, in its order."""
    return [kind.model_type for kind in MODEL_FOR_CAUSAL_LM_MAPPING]


def config(model_type: str) -> Any:
    """The shrunk config of a class that can be built."""
    kind = next(k for k in MODEL_FOR_CAUSAL_LM_MAPPING if k.model_type == model_type)
    record = _shrunk(kind().to_dict())
    for key, value in SHAPES.get(model_type, {}).items():
        nested = isinstance(value, dict) and isinstance(record.get(key), dict)
        record[key] = record[key] | value if nested else value
    return kind.from_dict(record)


def _shrunk(record: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for key, value in record.items():
        if key in DERIVED:
            continue
        if isinstance(value, dict) and key.endswith("_config"):
            small[key] = _shrunk(value)
        else:
            small[key] = _size(key, value)
    for key in ("layer_types", "layers_block_type"):
        if isinstance(record.get(key), list) and len(record[key]) > 1:
            kinds = list(dict.fromkeys(record[key]))
            small[key] = kinds if len(kinds) > 1 else kinds * 2
            small["num_hidden_layers"] = len(small[key])
    if isinstance(record.get("mlp_layer_types"), list):
        kinds = list(dict.fromkeys(record["mlp_layer_types"]))
        small["mlp_layer_types"] = (kinds * small["num_hidden_layers"])[
            -small["num_hidden_layers"] :
        ]
    if "kv_lora_rank" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def _size(key: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    if re.fullmatch(r"vocab_size(_per_layer_input)?", key):
        return VOCABULARY
    if key.endswith("token_id"):
        return min(max(int(value), 0), 3)
    sizes = [size for pattern, size in SIZES if pattern.fullmatch(key)]
    return min(value, sizes[-1]) if sizes else value


def build(model_type: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A random model of the class."""
    shape = config(model_type)
    auto = transformers.AutoModelForCausalLM
    kind = auto._model_mapping[type(shape)]
    attention = "sdpa" if getattr(kind, "_supports_sdpa", False) else "eager"
    torch.manual_seed(0)
    model = auto.from_config(shape, dtype=dtype, attn_implementation=attention)
    for parameter in model.parameters():  # a scale of zero would hide what comes before it
        if not parameter.any():
            torch.nn.init.normal_(parameter.data, std=0.02)
    return model


def write(model_type: str, folder: Path) -> Path:
    """A checkpoint of the class with a tokenizer and a chat template."""
    model, tokenizer = build(model_type), build_tokenizer("chatml", VOCABULARY)
    for part in (model.config, model.config.get_text_config(), model.generation_config):
        part.eos_token_id, part.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    for name in sys.argv[2:] or [n for n in model_types() if n not in UNBUILT]:
        write(name, Path(sys.argv[1]) / name)
