"""Any Hugging Face `config.json` -> the facts of its text model.

Reads every dense family in `configs/architectures.yaml` and fills absent keys as transformers does:
`save_pretrained` leaves out defaults. Mixtures and hybrids are counted once, when their preset is
added (`counted`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from tuning.errors import Problem, SpecError
from tuning.presets import counted, stored
from tuning.presets.architecture import Facts
from tuning.presets.dense import Dense
from tuning.presets.load import CONFIGS, record, table

# The keys of a config.json that are read; a preset's `config` may hold no others.
KEYS = frozenset(
    {
        "model_type", "architectures", "text_config", "vision_config", "quantization_config",
        "hidden_size", "intermediate_size", "ffn_hidden_size", "num_hidden_layers", "vocab_size",
        "num_attention_heads", "num_key_value_heads", "num_kv_heads", "head_dim",
        "max_position_embeddings", "hidden_act", "hidden_activation", "activation",
        "attention_bias", "mlp_bias", "bias", "tie_word_embeddings", "qk_layernorm",
        "attn_logit_softcapping", "sliding_window", "use_sliding_window", "max_window_layers",
        "sliding_window_pattern", "layer_types", "partial_rotary_factor", "rope_parameters",
        "multi_query", "new_decoder_architecture", "parallel_attn", "num_ln_in_parallel_attn",
        "spatial_merge_size",
    }
)  # fmt: skip

# Classes of a text and a vision model, with the default type of their text model.
_WRAPPERS = {"gemma3": "gemma3_text", "mistral3": "mistral"}

_TOWERS: dict[str, dict[str, Any]] = {  # defaults of a vision_config
    "siglip": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "patch_size": 16,
        "image_size": 224,
        "vision_use_head": True,
    },
    "pixtral": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "patch_size": 16,
    },
}


@cache
def families() -> dict[str, dict[str, Any]]:
    """`configs/architectures.yaml`: constants and defaults of transformers' classes."""
    path = CONFIGS / "architectures.yaml"
    return {
        name: record(
            value,
            where=f"{path.name}: {name}",
            required={"architecture": str, "layout": str, "packing_reason": str, "defaults": dict},
            optional={
                "packing_safe": bool,
                "norm": str,
                "norms": int,
                "qk_norm": str,
                "qkv_bias": bool,
                "output_bias": bool,
                "mlp_bias": bool,
                "head_bias": bool,
                "windows": str,
                "rotary": float,
            },
        )
        for name, value in table(path).items()
    }


def facts(config: Mapping[str, Any]) -> Facts | None:
    """The facts of the text model that a parsed `config.json` describes.

    None for a `model_type` that is not in the table, and no preset's shape: only a simulation can
    size such a model. Raises SpecError, with every problem, for an invalid config.
    """
    if not isinstance(config.get("model_type"), str):
        raise SpecError.at(
            "SPEC-305",
            "config.json",
            "has no model_type",
            "use the folder of a Hugging Face model, with its own config.json",
        )
    if (text_type := _WRAPPERS.get(config["model_type"])) is None:
        return _read(config, config)
    text = config.get("text_config") or {}
    if not isinstance(text, Mapping) or not isinstance(config.get("vision_config") or {}, Mapping):
        raise SpecError.at(
            "SPEC-305",
            "config.json",
            "text_config or vision_config is not a mapping",
            "download the file again",
        )
    return _read({"model_type": text_type, **text}, config)


def _read(text: Mapping[str, Any], whole: Mapping[str, Any]) -> Facts | None:
    family = families().get(text["model_type"])
    if family is None:
        return counted.find(whole)
    merged = {**family["defaults"], **{k: v for k, v in text.items() if k in KEYS}}
    if text is not whole:  # only the outer value counts, and the default is true
        merged["tie_word_embeddings"] = whole.get("tie_word_embeddings", True)
    _check(merged)
    shape = _falcon_shape(merged) if family["layout"] == "falcon" else _shape(merged, family)
    kv_heads = shape.pop("kv_heads")
    hidden, layers, vocab = (
        merged[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size")
    )
    heads = merged["num_attention_heads"]
    dense = Dense(
        layout=family["layout"],
        hidden=hidden,
        layers=layers,
        queries=heads * shape["head_dim"],
        keys=kv_heads * shape["head_dim"],
        vocab=vocab,
        tied=merged["tie_word_embeddings"],
        head_bias=bool(family["head_bias"]),
        norm=family["norm"] or "rms",
        **shape,
    )
    window, windowed = _windows(merged, family["windows"])
    rotary = merged.get("partial_rotary_factor") or _part(merged, "rope_parameters").get(
        "partial_rotary_factor"
    )
    wrapped = text is not whole
    return Facts(
        model_type=merged["model_type"],
        architecture=family["architecture"],
        wrapper=str((whole.get("architectures") or [whole["model_type"]])[0]) if wrapped else None,
        hidden=hidden,
        intermediate=dense.intermediate,
        layers=layers,
        attending=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dense.head_dim,
        vocab=vocab,
        context=merged["max_position_embeddings"],
        norms=dense.norms,
        window=window,
        windowed_layers=windowed,
        rotary=float(rotary or family["rotary"] or 1.0),
        softcap=bool(merged.get("attn_logit_softcapping")),
        sinks=False,
        linears=dense.linears,
        experts=(),
        parameters=dense.parameters,
        active=dense.parameters,
        tower=_tower(whole, hidden) if wrapped else 0,
        stored=stored.of(whole),
        packing_safe=bool(family["packing_safe"]),
        packing_reason=family["packing_reason"],
        tied=dense.tied,
    )


def _part(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}


def _shape(config: Mapping[str, Any], family: Mapping[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    qkv_bias = bool(config.get("attention_bias", family["qkv_bias"]))
    output_bias = family["output_bias"]
    return {
        "intermediate": config["intermediate_size"],
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "qkv_bias": qkv_bias,
        "output_bias": qkv_bias if output_bias is None else output_bias,
        "mlp_bias": bool(config.get("mlp_bias", family["mlp_bias"])),
        "norms": family["norms"] or 2,
        "qk_norm": "head" if config.get("qk_layernorm") else family["qk_norm"] or "none",
    }


def _falcon_shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """Falcon has two decoders: the old one (7B: one key head, one norm) and the new one (40B)."""
    heads, new = config["num_attention_heads"], bool(config["new_decoder_architecture"])
    kv_heads = 1 if config["multi_query"] else heads
    norms = config.get("num_ln_in_parallel_attn") or (2 if new else 1)
    bias = bool(config["bias"])
    return {
        "intermediate": config.get("ffn_hidden_size") or 4 * config["hidden_size"],
        "kv_heads": (config.get("num_kv_heads") or heads) if new else kv_heads,
        "head_dim": config["hidden_size"] // heads,
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": bias,
        "norms": 2 if norms == 2 or not config["parallel_attn"] else 1,
        "qk_norm": "none",
    }


def _windows(config: Mapping[str, Any], rule: str | None) -> tuple[int | None, int]:
    """The window in tokens and the number of windowed layers, by class rule or layer_types."""
    window, layers = config.get("sliding_window"), config["num_hidden_layers"]
    if rule is None or not window or (rule == "opt-in" and not config.get("use_sliding_window")):
        return None, 0
    if config.get("layer_types"):
        count = list(config["layer_types"]).count("sliding_attention")
    elif rule == "all":
        count = layers
    elif rule == "opt-in":
        count = max(0, layers - config["max_window_layers"])
    else:  # one layer in `pattern` has no window
        count = layers - layers // (config.get("sliding_window_pattern") or 2)
    return (window, count) if count else (None, 0)


def _tower(whole: Mapping[str, Any], hidden: int) -> int:
    """Parameters of the vision tower and its projector: SigLIP (Gemma 3) or Pixtral (Mistral 3)."""
    pixtral = whole["model_type"] == "mistral3"
    defaults = _TOWERS["pixtral" if pixtral else "siglip"]
    v = {**defaults, **(whole.get("vision_config") or {})}
    width, inner, layers = v["hidden_size"], v["intermediate_size"], v["num_hidden_layers"]
    patch = 3 * v["patch_size"] ** 2 * width
    if pixtral:
        layer = 4 * width**2 + 3 * width * inner + 2 * width
        merger = (whole.get("spatial_merge_size") or 2) ** 2 * width**2
        projector = width + merger + width * hidden + hidden**2
        return int(patch + width + layers * layer + projector)
    places = (v["image_size"] // v["patch_size"]) ** 2 * width
    layer = 4 * (width**2 + width) + 2 * width * inner + inner + width + 4 * width
    head = layer - width if v["vision_use_head"] else 0
    projector = width * hidden + width
    return int(patch + width + places + layers * layer + 2 * width + head + projector)


_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_OPTIONAL_SIZES = ("intermediate_size", "ffn_hidden_size", "head_dim", "num_key_value_heads")


def _check(config: Mapping[str, Any]) -> None:
    wrong = [
        key
        for key in (*_SIZES, "max_position_embeddings", *_OPTIONAL_SIZES)
        if not _positive(config.get(key)) and not (key in _OPTIONAL_SIZES and not config.get(key))
    ]
    if wrong:
        raise SpecError(
            Problem(
                "SPEC-305",
                f"config.json: {key}",
                f"is {config.get(key)!r}",
                "write a whole number above 0, as the model's makers published it",
            )
            for key in wrong
        )


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
