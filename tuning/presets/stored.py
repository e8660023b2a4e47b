"""How a checkpoint stores its weights by its config.json, and what can be done with that.

16 bits are read as they are. `UNPACKED` kinds are unpacked to 16 bits while they are loaded, and
packed again by qlora. bitsandbytes' 4 bits are what qlora trains on. All others are refused, with
the base to use instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the spec brings pydantic, which asking for a preset should not
    from tuning.spec import Method

PLAIN = "16-bit"
UNPACKED = frozenset({"fp8", "mxfp4"})
FOUR_BIT = "bitsandbytes 4-bit"

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_MARK = re.compile(  # what a repository of quantised weights adds to the model's name
    r"([-_.](unsloth|bnb|gptq|awq|fp8|nf4|nvfp4|mxfp4|hqq|aqlm|quip|eetq|exl[23]|quanto|torchao"
    r"|quantized|dynamic|block|[wi]nt[48]|w[48]a(8|16)|[48][-_]?bits?|g?128g?|w[48]))+$",
    re.IGNORECASE,
)
_REQUANTISERS = frozenset(  # publish other makers' models; their own name leads nowhere
    {"thebloke", "hugging-quants", "neuralmagic", "redhatai", "casperhansen", "nm-testing"}
    | {"solidrust", "modelcloud", "cyankiwi", "quanttrio", "intel", "kaitchup", "isotr0py"}
)


def section(config: Mapping[str, Any]) -> Any:
    """The quantization_config of a parsed config.json, or of its text model; None without one."""
    text = config.get("text_config")
    inner = text if isinstance(text, Mapping) else {}
    return config.get("quantization_config") or inner.get("quantization_config") or None


def of(config: Mapping[str, Any]) -> str:
    """How the weights of a parsed config.json are stored: "16-bit", "fp8", "gptq", ..."""
    said = section(config)
    if said is None:
        return PLAIN
    method = said.get("quant_method") if isinstance(said, Mapping) else None
    if not isinstance(said, Mapping) or not isinstance(method or "", str):
        return "an unknown method"
    if said.get("load_in_8bit") or said.get("_load_in_8bit"):
        return "bitsandbytes 8-bit"
    if said.get("load_in_4bit") or said.get("_load_in_4bit"):
        if (storage := said.get("bnb_4bit_quant_storage", "uint8")) != "uint8":
            return f"{FOUR_BIT} in {str(storage)[:20]}"  # for FSDP
        return f"{FOUR_BIT} experts" if _has_experts(config) else FOUR_BIT
    if method == "fp8" and said.get("expert_dtype", "fp8") != "fp8":
        return f"fp8 and {str(said['expert_dtype'])[:20]}"
    return (method or "an unknown method")[:40]


def four_bit(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Type and double quantisation of weights that are stored in bitsandbytes' 4 bits, else None.

    Absent keys are transformers' defaults.
    """
    if of(config) != FOUR_BIT:
        return None
    said = section(config)
    double = bool(said.get("bnb_4bit_use_double_quant", False))
    return {"type": str(said.get("bnb_4bit_quant_type", "fp4")), "double": double}


def kept(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Parts of names of the modules that weights stored in 4 bits leave in 16."""
    said = section(config) if of(config) == FOUR_BIT else {}
    listed = said.get("llm_int8_skip_modules") or ()
    return tuple(name for name in listed if isinstance(name, str))


def _has_experts(config: Mapping[str, Any]) -> bool:
    text = config.get("text_config")
    parts = [config, text if isinstance(text, Mapping) else {}]
    return any(part.get(key) for part in parts for key in _EXPERTS)


def refusal(stored: str, method: Method | None = None) -> str | None:
    """Why weights that are stored so cannot be trained on (by `method`); None if they can."""
    if stored == PLAIN or stored in UNPACKED:
        return None
    if stored == FOUR_BIT:
        if method != "lora":
            return None
        return "its weights are packed in 4 bits (bitsandbytes), which is what qlora trains on"
    if stored == f"{FOUR_BIT} experts":
        return (
            "its experts are packed in 4 bits one by one (bitsandbytes), as no class of "
            "transformers reads them"
        )
    return f"the weights are quantised already ({stored}), which cannot be trained on here"


def remedy(stored: str, name: str = "", made_from: str | None = None) -> str:
    """What to use in place of the model `name` (org/model, or empty) whose weights are refused.

    `made_from` is the model that its makers say it was quantised from.
    """
    known = made_from or original(name)
    if made_from:
        base = f"the 16-bit weights that it was made from, {made_from}"
    elif known:
        base = f"the 16-bit weights of the same model, probably {known}"
    else:
        base = "the 16-bit weights of the same model"
    if stored == FOUR_BIT:
        return f"set tuning.method to qlora, or use {base}"
    return f"use {base}; qlora packs them itself"


def original(name: str) -> str | None:
    """The model that a repository of quantised weights is named after, in the same organisation.

    None where the name does not tell, or the organisation quantises other makers' models.
    """
    owner, _, model = name.partition("/")
    plain = _MARK.sub("", model)
    if not plain or plain == model or owner.lower() in _REQUANTISERS:
        return None
    return f"{owner}/{plain}"
