"""A folder of weights -> the model of its class, all of it or none.

transformers fills what a checkpoint lacks with random numbers, and says so in a log. Here that is
refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.nn import Linear4bit
from transformers.models.auto.auto_factory import _get_model_class
from transformers.pytorch_utils import Conv1D

from tuning.errors import SpecError
from tuning.models import shards, unpacked
from tuning.models.survey import REPEATED, TOWER
from tuning.presets import stored

AGAIN = "fetch the model again, or name one whose weights fit its config.json"


def read(source: Path, record: Mapping[str, Any], config: Any, options: dict[str, Any]) -> Any:
    """The model whose weights lie in `source`, and are stored as its config.json `record` says.

    `config` is what transformers made of that, `options` are its own. The model's `unread_layers`
    are numbers of layers in the files that the config does not have. Raises SpecError if weights
    are missing or of another shape.
    """
    how = stored.of(record)
    extra = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # looked at below
    auto = auto_class(config)
    with converted(str(source)):
        if how in stored.UNPACKED:
            device = "cuda" if "device_map" in options else "cpu"
            weights = unpacked.tensors(source, record, options["dtype"], device)
            model, report = model_class(config).from_pretrained(
                None, config=config, state_dict=weights, **options, **extra
            )
            _name(model, source)
        else:
            model, report = auto.from_pretrained(
                source, config=config, use_safetensors=True, **options, **extra
            )
    if how == stored.FOUR_BIT:
        _as_published(model, options["dtype"])
    refuse_incomplete(str(source), model, report)
    _refuse_untied(str(source), record, model)
    model.unread_layers = _beyond(model, report["unexpected_keys"])
    return model


def auto_class(config: Any) -> Any:
    """The class of transformers that finds that of `config`."""
    causal = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) in causal:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForImageTextToText


@contextmanager
def converted(source: str) -> Iterator[None]:
    """Raise SpecError where weights, such as those of experts, do not make the class's own."""
    try:
        yield
    except RuntimeError as error:
        if "during automatic conversion of the weights" not in str(error):
            raise
        fact = "has weights that do not make those of its class"
        raise SpecError.at("MODEL-119", source, fact, AGAIN) from error


def config_of(record: Mapping[str, Any]) -> Any:
    """The transformers config of a parsed config.json, without how its weights are stored."""
    fields = {k: v for k, v in record.items() if k not in ("quantization_config", "model_type")}
    fields = transformers.PreTrainedConfig._decode_special_floats(copy.deepcopy(fields))
    return transformers.CONFIG_MAPPING[record["model_type"]](**fields)


def model_class(config: Any) -> Any:
    """transformers' class for the models of `config`."""
    return _get_model_class(config, auto_class(config)._model_mapping)


def _name(model: Any, source: Path) -> None:
    """What transformers sets of a model that it reads from a folder itself."""
    model.name_or_path = model.config.name_or_path = str(source)
    if (source / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(source)


def _as_published(model: Any, precision: torch.dtype) -> None:
    """Mend what transformers makes of a checkpoint in 4 bits beside its packed layers.

    A layer that it does not hold in 4 bits after all, since the list of those names modules as an
    older transformers did, becomes a plain one; all that is not packed gets the `precision`.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit) and getattr(module.weight, "quant_state", None) is None:
            size = (module.in_features, module.out_features)
            with torch.device("meta"):
                if getattr(module, "source_cls", None) == Conv1D:  # its sides are swapped
                    plain = Conv1D(size[1], size[0])
                else:
                    plain = torch.nn.Linear(*size, bias=module.bias is not None)
            plain.weight, plain.bias = module.weight, module.bias
            model.set_submodule(name, plain)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            shards.cast(parameter, precision)


def refuse_incomplete(source: str, model: Any, report: Mapping[str, Any]) -> None:
    """Raise SpecError for a `model` that transformers' `report` says was not loaded whole."""
    missing = sorted(report["missing_keys"])
    other = sorted({str(name) for name, *_ in report["mismatched_keys"]} | set(_misshapen(model)))
    if missing:
        fact = f"lacks {len(missing)} weights of its class, such as {missing[0]}"
        raise SpecError.at("MODEL-119", source, fact, AGAIN)
    if other:
        fact = f"has {len(other)} weights of another shape than its class, such as {other[0]}"
        raise SpecError.at("MODEL-119", source, fact, AGAIN)


def _refuse_untied(source: str, record: Mapping[str, Any], model: Any) -> None:
    """Refuse files with an output layer that config.json says is the embedding.

    transformers would use both as they are, and what loads the adapter by config.json another one.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = record.get("tie_word_embeddings") is True and getattr(model, "_tied_weights_keys", None)
    if head is None or not tied:
        return
    if head.weight is not embedding.weight and head.weight.shape == embedding.weight.shape:
        fact = "has an output layer of its own, and config.json says tie_word_embeddings: true"
        change = "set tie_word_embeddings to false there, or fetch the model's newest revision"
        raise SpecError.at("MODEL-119", source, fact, change)


def _beyond(model: Any, unexpected: Iterable[str]) -> list[int]:
    """Numbers of decoder layers that the files have beyond those of config.json.

    Those that a class leaves out on purpose, to predict several tokens, are not `unexpected`.
    """
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    named = (REPEATED.search(name) for name in unexpected if not TOWER.search(name))
    numbers = {int(found[1]) for found in named if found}
    return sorted(number for number in numbers if layers is not None and number >= layers)


def _misshapen(model: Any) -> Iterator[str]:
    """Layers whose packed weight, which transformers does not compare, has another shape."""
    for name, module in model.named_modules():
        state = getattr(module.weight, "quant_state", None) if _is_packed(module) else None
        if state is not None and tuple(state.shape) != (module.out_features, module.in_features):
            yield f"{name}.weight"


def _is_packed(module: torch.nn.Module) -> bool:
    return isinstance(module, Linear4bit)
