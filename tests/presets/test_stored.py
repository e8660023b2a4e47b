"""How weights are stored, by config.json: what is read, and what is refused in which words."""

from __future__ import annotations

from typing import Any

import pytest

from tuning import presets
from tuning.presets import stored

BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize(
    ("said", "how", "lora", "qlora"),
    [
        (None, "16-bit", True, True),
        ({}, "16-bit", True, True),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", True, True),
        ({"quant_method": "fp8", "weight_block_size": None}, "fp8", True, True),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "fp8 and fp4", False, False),
        ({"quant_method": "mxfp4"}, "mxfp4", True, True),
        (BITS, "bitsandbytes 4-bit", False, True),
        ({"load_in_4bit": True}, "bitsandbytes 4-bit", False, True),
        (BITS | {"bnb_4bit_quant_storage": "bfloat16"}, "bitsandbytes 4-bit in bfloat16",
         False, False),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8-bit",
         False, False),
        ({"quant_method": "gptq"}, "gptq", False, False),
        ({"quant_method": "awq"}, "awq", False, False),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors", False, False),
        ({"quant_method": "hqq"}, "hqq", False, False),
        ({"quant_method": "torchao"}, "torchao", False, False),
        ({"quant_method": "modelopt"}, "modelopt", False, False),
        ({"quant_method": "fbgemm_fp8"}, "fbgemm_fp8", False, False),
        ({"bits": 4}, "an unknown method", False, False),
        ("gptq", "an unknown method", False, False),
        ({"quant_method": ["gptq"]}, "an unknown method", False, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("inside", [False, True], ids=["whole", "text model"])
def test_what_is_read_and_what_is_refused(
    said: Any, how: str, lora: bool, qlora: bool, inside: bool
) -> None:
    """The same answer for a family with a preset, and wherever the config says it."""
    config: dict[str, Any] = {"quantization_config": said} if said is not None else {}
    whole = {"text_config": config} if inside else config

    assert how == stored.of(whole)
    for method, can in (("lora", lora), ("qlora", qlora)):
        reason = stored.refusal(how, method)
        assert can is (reason is None)
        assert bool(reason) is ("16-bit weights" in stored.remedy(how) and bool(reason))
        if not inside:
            known = presets.facts(LLAMA | config)
            assert known is not None and known.stored == how
            verdict = presets.support(known, method)
            assert can is verdict.supported
            assert reason is None or (verdict.reason, verdict.change) == (
                reason,
                stored.remedy(how),
            )


@pytest.mark.parametrize("key", ["num_local_experts", "num_experts", "n_routed_experts"])
def test_experts_in_4_bits_are_refused(key: str) -> None:
    """They are packed one by one, and the classes of transformers hold them together."""
    how = stored.of({"quantization_config": BITS, key: 8})

    assert "one by one" in str(stored.refusal(how, "qlora"))
    assert stored.refusal(stored.of({"quantization_config": BITS, key: 0}), "qlora") is None


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "Qwen/Qwen2.5-7B-Instruct"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen/Qwen2.5-7B-Instruct"),
        ("unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit", "unsloth/Llama-3.2-1B-Instruct"),
        ("unsloth/llama-3-8b-bnb-4bit", "unsloth/llama-3-8b"),
        ("org/model-w4a16", "org/model"),
        ("org/model-8bit", "org/model"),
        ("org/model", None),
        ("org/awq", None),
        ("TheBloke/Mistral-7B-GPTQ", None),
        ("RedHatAI/Llama-3.1-8B-quantized.w8a8", None),
        ("", None),
    ],
)
def test_a_name_leads_to_the_model_where_its_makers_quantised_it(
    name: str, model: str | None
) -> None:
    """Not where somebody else did, whose own models have other names."""
    assert model == stored.original(name)
