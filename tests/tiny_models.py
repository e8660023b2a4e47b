"""Tiny random models of the real classes, made without a network.

Each is an ordinary `save_pretrained` folder with a trained tokenizer and a chat template, written
in a moment, so that tests load, quantise, train, save and reload real model classes on a CPU.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

STYLES = {  # name -> (bos, eos, further special tokens, chat template)
    "phi3": (
        "<s>",
        "<|endoftext|>",
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        PHI3,
    ),
    "chatml": ("<|endoftext|>", "<|im_end|>", ["<|im_start|>"], CHATML),
}
PAD = "<|pad|>"

COUNT = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
THINGS = ["cat", "dog", "tree", "runs", "sees", "likes", "big", "small", "red", "blue"]
WORDS = [*THINGS, *COUNT, "the", "a", "plus", "minus", "is", "equals", "what", "how", "hello"]


def dense(**changes: Any) -> dict[str, Any]:
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    return shape | changes


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + i for i in range(8)],
}
FALCON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "parallel_attn": True,
    "bias": False,
    "alibi": False,
    "max_position_embeddings": 4096,
}
GEMMA = dense(head_dim=16, tie_word_embeddings=True)
GEMMA_SLIDING = GEMMA | {"query_pre_attn_scalar": 16, "sliding_window": 64}
EXPERTS = {"head_dim": 16, "num_experts_per_tok": 2}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {  # name -> (config class, shape, style)
    "phi3": ("Phi3Config", dense(num_key_value_heads=4), "phi3"),
    "phi3-longrope": (
        "Phi3Config",
        dense(
            num_key_value_heads=4,
            max_position_embeddings=8192,
            original_max_position_embeddings=256,
            rope_parameters=LONGROPE,
        ),
        "phi3",
    ),
    "phi4-mini": (
        "Phi3Config",
        dense(partial_rotary_factor=0.75, tie_word_embeddings=True),
        "phi3",
    ),
    "llama": ("LlamaConfig", dense(), "chatml"),
    "mistral": ("MistralConfig", dense(sliding_window=64, head_dim=16), "chatml"),
    "ministral3": ("Ministral3Config", dense(head_dim=16), "chatml"),
    "qwen2": ("Qwen2Config", dense(tie_word_embeddings=True), "chatml"),
    "qwen3": ("Qwen3Config", dense(head_dim=16, tie_word_embeddings=True), "chatml"),
    "gemma3": ("Gemma3TextConfig", GEMMA_SLIDING, "chatml"),
    "falcon": (
        "FalconConfig",
        FALCON | {"multi_query": True, "new_decoder_architecture": False},
        "chatml",
    ),
    "falcon-new": (
        "FalconConfig",
        FALCON | {"num_kv_heads": 2, "new_decoder_architecture": True},
        "chatml",
    ),
    "phi2": ("PhiConfig", dense(), "chatml"),
    "qwen3moe": (
        "Qwen3MoeConfig",
        dense(**EXPERTS, moe_intermediate_size=32, num_experts=4),
        "chatml",
    ),
    "gptoss": ("GptOssConfig", dense(**EXPERTS, num_local_experts=4, sliding_window=64), "chatml"),
}
# Known to configs/architectures.yaml, without a preset.
MORE_FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "gemma": ("GemmaConfig", GEMMA, "chatml"),
    "gemma2": ("Gemma2Config", GEMMA_SLIDING, "chatml"),
    "smollm3": ("SmolLM3Config", dense(tie_word_embeddings=True), "chatml"),
    "olmo2": ("Olmo2Config", dense(), "chatml"),
    "olmo3": ("Olmo3Config", dense(sliding_window=64), "chatml"),
    "granite": ("GraniteConfig", dense(tie_word_embeddings=True), "chatml"),
}
VISION_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {  # -> (config class, text, vision)
    "gemma3-vision": (
        "Gemma3Config",
        "gemma3",
        VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
    ),
    "mistral3-vision": (
        "Mistral3Config",
        "ministral3",
        VISION | {"model_type": "pixtral", "head_dim": 16},
    ),
}


def sentences(count: int = 2000, seed: int = 0) -> Iterator[str]:
    rng = random.Random(seed)
    for _ in range(count):
        yield " ".join(rng.choice(WORDS) for _ in range(rng.randint(4, 24))) + "."


@cache
def build_tokenizer(style: str = "phi3", vocab_size: int = 512) -> Any:
    bos, eos, extra, template = STYLES[style]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        sentences(),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(dict.fromkeys([bos, eos, PAD, *extra])),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=bos,
        eos_token=eos,
        pad_token=PAD,
        additional_special_tokens=extra,
        model_max_length=4096,
        padding_side="right",
    )
    tokenizer.chat_template = template
    return tokenizer


def build(
    family: str,
    folder: Path,
    vocab_size: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Write one family to `folder`; `changes` override its shape, e.g. hidden_size=1024."""
    if family in VISION_FAMILIES:
        config_class, text_family, vision = VISION_FAMILIES[family]
        text_class, shape, style = FAMILIES[text_family]
    else:
        (config_class, shape, style), vision = (FAMILIES | MORE_FAMILIES)[family], None
    tokenizer = build_tokenizer(style, vocab_size)
    shape = shape | changes
    shape |= {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if vision is None:
        kind, config = (
            transformers.AutoModelForCausalLM,
            getattr(transformers, config_class)(**shape),
        )
    else:
        kind = transformers.AutoModelForImageTextToText
        text = getattr(transformers, text_class)(**shape)
        config = getattr(transformers, config_class)(
            text_config=text.to_dict(), vision_config=vision, tie_word_embeddings=False
        )
        if hasattr(config, "mm_tokens_per_image"):
            config.mm_tokens_per_image = 4
    torch.manual_seed(seed)
    kind.from_config(config, dtype=dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def message_rows(count: int = 256, seed: int = 1, system: bool = True) -> Iterator[dict[str, Any]]:
    """A task a tiny model can learn: the answer is the question's words in reverse."""
    rng = random.Random(seed)
    for _ in range(count):
        words = [rng.choice(WORDS[:12]) for _ in range(rng.randint(2, 5))]
        turns = [
            {"role": "user", "content": " ".join(words)},
            {"role": "assistant", "content": " ".join(reversed(words))},
        ]
        first = [{"role": "system", "content": "reverse the words."}] if system else []
        yield {"messages": first + turns}
