"""The families of models that are converted to GGUF: names, settings and changed tensors.

Names are those of gguf's own tables. Where llama.cpp computes otherwise than transformers, its
converter changes a tensor; so it is done here, and a LoRA's B is changed as its weight. Whatever
was not compared with llama.cpp's answers is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gguf
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tuning.errors import Problem, SpecError

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
INTERLEAVED = frozenset({"llama", "mistral"})  # rotary pairs lie side by side in llama.cpp
ROPES = ("default", "linear", "llama3")
OWN_CONVERTER = (
    "merge it (tuning merge --output dir:DIR) and run llama.cpp's convert_hf_to_gguf.py DIR"
)


def problems(config: Any, where: str) -> list[Problem]:
    """Why the model of `config` (transformers') is not converted; empty if it is."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        what = f"is of the family {kind}, of which this export writes no GGUF"
        return [Problem("MODEL-320", where, what, OWN_CONVERTER)]
    rope = _rope(config)["rope_type"]
    facts = {
        f"rope_type {rope}": rope not in ROPES,
        f"hidden_act {config.hidden_act}": config.hidden_act != "silu",
    }
    return [
        Problem("MODEL-321", where, f"sets {fact}, which this export does not know", OWN_CONVERTER)
        for fact, unknown in facts.items()
        if unknown
    ]


def _rope(config: Any) -> dict[str, Any]:
    return {"rope_type": "default"} | dict(config.rope_parameters or {})


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", 0) or config.hidden_size // config.num_attention_heads)


class Names:
    """Names of a model's tensors in GGUF."""

    def __init__(self, config: Any) -> None:
        arch = ARCHITECTURES[config.model_type]
        self._map = gguf.get_tensor_name_map(arch, config.num_hidden_layers)

    def __call__(self, name: str, where: str) -> str:
        """The name of the checkpoint's tensor `name`. Raises SpecError if llama.cpp has none."""
        known: str | None = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            what = f"has {name}, for which llama.cpp has no name in this family"
            raise SpecError.at("MODEL-321", where, what, OWN_CONVERTER)
        return known


def changed(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """A tensor [out, ...], or the B [out, rank] of its LoRA, as llama.cpp computes with it.

    transformers turns the halves of each head by the rotary embedding, llama.cpp's Llama pairs of
    neighbours: rows of the query and the key are put in that order.
    """
    layer = name.removesuffix(".weight").removesuffix(".bias")
    if config.model_type not in INTERLEAVED or not layer.endswith(("q_proj", "k_proj")):
        return tensor
    queries = layer.endswith("q_proj")
    heads = config.num_attention_heads if queries else config.num_key_value_heads
    pairs = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape).contiguous()


def frequency_factors(config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that the checkpoint does not hold: what Llama 3 divides its frequencies by."""
    if _rope(config)["rope_type"] == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        size = _head_size(config)
        exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
        plain = 1.0 / (_rope(config)["rope_theta"] ** exponents)
        yield "rope_freqs.weight", (plain / scaled).float()


def write_settings(writer: Any, config: Any) -> None:
    """Write the keys from which llama.cpp builds the model."""
    rope, size = _rope(config), _head_size(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def context_length(config: Any) -> int:
    """Tokens up to which llama.cpp computes the same: of these families it has no window."""
    longest = int(config.max_position_embeddings)
    layers = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if window and (layers is None or "sliding_attention" in layers):
        return min(longest, int(window))
    return longest
