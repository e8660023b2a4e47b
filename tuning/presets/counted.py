"""Facts of mixtures and hybrids: counted on the real class when their preset was added.

`python -m tuning.training.simulate --write NAME` counts; `configs/memory/NAME.json` keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from tuning.presets import classes, stored
from tuning.presets.architecture import Facts
from tuning.presets.load import entries, examined

# What a config.json may say otherwise about the same tensors.
_FREE = frozenset({"architectures", "max_position_embeddings", "quantization_config"})
# What transformers 5 saves under other names, or as a part of per_layer_config.
_RENAMED = {"num_experts": "num_local_experts"}
_FOLDED = frozenset({"global_head_dim", "num_global_key_value_heads"})
_LAYERS = {"attention": "full_attention", "mamba": "linear_attention"}


def find(config: Mapping[str, Any]) -> Facts | None:
    """The facts of the preset whose shape `config` (a parsed config.json) has; None if none has."""
    for entry in entries():
        if _agrees(config, entry["config"]) and (record := _record(entry["name"])):
            text = config.get("text_config") or config
            context = text.get("max_position_embeddings") or record["context"]
            said = {"context": context, "stored": stored.of(config), **packing(config)}
            said["tied"] = _tied(entry["config"])
            return Facts.from_json(record | said)
    return None


def packing(config: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured of packed rows in the class of `config`."""
    safe, reason = (classes.of(config) or classes.Class()).packs
    return {"packing_safe": safe, "packing_reason": reason}


def _tied(config: Mapping[str, Any]) -> bool:
    """Whether the output layer is the embedding, as far as the config says: or else yes."""
    outer = config.get("tie_word_embeddings")
    inner = (config.get("text_config") or {}).get("tie_word_embeddings")
    return bool(outer if outer is not None else inner is not False)


def _agrees(config: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    """Whether `config` says all that `known` says about the shape."""
    return all(_same(config, key, value) for key, value in known.items() if key not in _FREE)


def _same(config: Mapping[str, Any], key: str, value: Any) -> bool:
    if key not in config:
        key = _RENAMED.get(key, key)
    if key in _FOLDED and key not in config:
        return "per_layer_config" in config
    said = config.get(key)
    if isinstance(value, Mapping) and isinstance(said, Mapping):
        return _agrees(said, value)
    if key == "layer_types" and isinstance(said, list):
        return [_LAYERS.get(x, x) for x in said] == [_LAYERS.get(x, x) for x in value]
    return bool(said == value)


@cache
def _record(name: str) -> dict[str, Any]:
    return dict(examined(name).get("facts", {}))
