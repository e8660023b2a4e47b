"""Base weights -> tokenizer and model, in 4 or 16 bits."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from peft import PeftModel

from tuning import files
from tuning.data.tokenizer import settle_template
from tuning.errors import SpecError
from tuning.models import (
    finite,
    four_bit,
    new_tokens,
    packed,
    reading,
    shards,
    start_adapter,
    unpacked,
)
from tuning.models.kernels import apart, whole
from tuning.models.lora import Coverage, adapt
from tuning.models.shards import Split
from tuning.models.survey import plain_linears
from tuning.plan import Placement, Recipe, gpu_problems
from tuning.plan.device import detect
from tuning.plan.verdict import CHANGE_MODEL
from tuning.presets import quantised, stored

logger = logging.getLogger(__name__)

# Of the base's own attention, which is frozen: no fused kernel has it, and newer classes have 0.
ATTENTION_DROPOUT = (
    *("attention_dropout", "attn_dropout", "attn_pdrop"),
    *("attention_probs_dropout_prob", "attention_dropout_prob"),
)
ROOM = 2 << 30  # bytes beside the weights, to answer or to merge
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def device_for(base: Path) -> str:
    """The device to load the weights in `base` on: cuda where they fit, else cpu.

    Raises SpecError for a GPU for which this build of torch has no kernels.
    """
    if not torch.cuda.is_available():
        return "cpu"
    gpu_problems.refuse(detect(1))
    need = ROOM + quantised.loaded_bytes(unpacked.paths(base), _record(base))
    free, _ = torch.cuda.mem_get_info()
    if need <= free:
        return "cuda"
    logger.warning(
        "the GPU has %.1f GiB free of the %.1f that %s needs: this goes on the CPU, and slowly",
        free / 2**30, need / 2**30, base,
    )  # fmt: skip
    return "cpu"


def read_config(base: Path) -> Any:
    """The transformers config of the model in `base`.

    Raises SpecError for a folder without one, for an architecture that needs code of its own, and
    for weights that are quantised in a way that cannot be read.
    """
    record = _record(base)
    kind = record.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        fact = f"is of model_type {kind!r}, which transformers does not know without remote code"
        raise SpecError.at("MODEL-101", str(base / "config.json"), fact, CHANGE_MODEL)
    if reason := stored.refusal(how := stored.of(record)):
        raise SpecError.at("MODEL-102", str(base / "config.json"), reason, stored.remedy(how))
    try:
        config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False)
        return causal(config)
    except Exception as error:  # whatever its classes raise for a value
        fact = f"is refused by transformers {transformers.__version__}: {error}"
        change = "repair it, or use the model's newest revision"
        raise SpecError.at("MODEL-103", str(base / "config.json"), fact, change) from None


def _record(base: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = files.read_json(base / "config.json")
    except (OSError, ValueError) as error:
        fact = f"has no readable config.json ({error})"
        change = "name a folder with config.json, *.safetensors and a tokenizer"
        raise SpecError.at("MODEL-100", str(base), fact, change) from None
    return record


def causal(config: Any) -> Any:
    """`config`, with attention to earlier tokens alone where its class is an encoder by default.

    BERT and its kin see the token that they are to predict, unless they are told to be decoders.
    """
    if getattr(config, "is_decoder", None) is False and not config.is_encoder_decoder:
        config.is_decoder = True
    return config


def load_tokenizer(base: Path, *, chat_template: str | None = None) -> Any:
    """The tokenizer in `base`; `chat_template` (Jinja text) replaces its own template."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        fact = f"has no tokenizer that transformers can load ({error})"
        change = "copy the model's tokenizer.json and tokenizer_config.json into it"
        raise SpecError.at("MODEL-104", str(base), fact, change) from None
    settle_template(tokenizer, base)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def load_base(
    base: Path,
    *,
    precision: str,
    quantisation: dict[str, Any] | None,
    device: str,
    attention: str | None = None,
    cache: Path | None = None,
    finite_only: bool = False,
    split: Split | None = None,
) -> Any:
    """The base model in `base` on `device` (cpu or cuda), in `precision` or packed in 4 bits.

    `quantisation` is the recipe's: type, double, compute; weights that are stored in 4 bits stay as
    they are, and other quantised ones are unpacked first. A vision tower stays, unquantised, so
    that names in the adapter are those of the published model. Packed weights are cached in the
    folder `cache`. `finite_only` refuses weights with NaN or infinity (packed ones were checked as
    they were packed). Of a model that is `split` over ranks, each layer has this one's share only,
    until `shards.share_out`. Raises SpecError.
    """
    record, config = _record(base), read_config(base)
    if not any(base.glob("*.safetensors")):
        fact, change = "has no *.safetensors file", "convert the weights to safetensors"
        raise SpecError.at("MODEL-105", str(base), fact, change)
    plain_linears()
    options = _options(config, precision, attention, device)
    packing = _packing(record, config, quantisation, precision)
    source = base
    if packing and cache is not None and packed.is_whole(cache):
        source, record, config.quantization_config = cache, {}, packing.to_dict()
    else:
        if packing:
            options["quantization_config"] = packing
        if finite_only and not int(os.environ.get("LOCAL_RANK", "0")):
            finite.require(base, DTYPES[precision])
    try:
        with shards.read_by_layer(split):
            model = reading.read(source, record, config, options)
    except (ValueError, KeyError, OSError, AssertionError) as error:
        if attention and error.args == (attention,):  # Falcon has its own table of classes
            fact, change = f"has no {attention} attention", "leave attn_implementation out"
            raise SpecError.at("MODEL-107", config.model_type, fact, change) from error
        fact = f"cannot be loaded: {error}"
        raise SpecError.at("MODEL-106", str(base), fact, "fetch the model again") from error
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On a CPU with AVX512-BF16 the first answer or evaluation repacks a 4-bit layer for
            # a kernel that has no backward: training on from there drops gradients in silence.
            module.support_avx512bf16_for_cpu = False
    if (
        packing
        and cache is not None
        and source is base
        and split is None
        and not four_bit.has_experts(model)
        and not model.unread_layers  # told at every start, which a cache could not
    ):
        packed.save(model, cache)
    return model


def _options(config: Any, precision: str, attention: str | None, device: str) -> dict[str, Any]:
    """Options of transformers' `from_pretrained`; the `config` loses its attention dropout."""
    for name in ATTENTION_DROPOUT:
        if getattr(config, name, None):
            setattr(config, name, 0.0)
    options: dict[str, Any] = {"dtype": DTYPES[precision], "trust_remote_code": False}
    if attention or config.model_type == "gemma2":  # gemma2's sdpa drops the softcap in silence
        options["attn_implementation"] = offered(config, attention or "eager")
    if device == "cuda":
        options["device_map"] = {"": torch.cuda.current_device()}
    return options


def _packing(
    record: dict[str, Any], config: Any, quantisation: dict[str, Any] | None, precision: str
) -> Any:
    """How transformers packs in 4 bits what it loads, None where it does not.

    Its `config` no longer says that the weights are quantised, unless they stay so.
    """
    for part in (config, config.get_text_config()):
        part.__dict__.pop("quantization_config", None)
    if stored.of(record) == stored.FOUR_BIT:
        compute = quantisation["compute"] if quantisation else precision
        config.quantization_config = {
            **stored.section(record),
            "bnb_4bit_compute_dtype": compute,
        }
        return None
    if not quantisation:
        return None
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantisation["type"],
        bnb_4bit_use_double_quant=quantisation["double"],
        bnb_4bit_compute_dtype=DTYPES[quantisation["compute"]],
    )


def offered(config: Any, attention: str) -> str:
    """`attention`, or eager where the model's class has no sdpa."""
    kind = reading.auto_class(config)._model_mapping.get(type(config), ())
    kinds = kind if isinstance(kind, tuple) else (kind,)
    lacks = attention == "sdpa" and not all(getattr(one, "_supports_sdpa", True) for one in kinds)
    return "eager" if lacks else attention


def _packed_folder(base: Path, recipe: Recipe, root: Path | None, device: str) -> Path | None:
    """Cache folder of the recipe's 4-bit weights; None if they are not cached.

    By kind of device: each sums the scales in another order, so that a few codes differ.
    """
    if root is None or recipe.quantisation is None or not packed.is_worthwhile(base):
        return None
    made_by = {
        "quantisation": recipe.quantisation,
        "precision": recipe.precision,
        "device": device,
        "bitsandbytes": bitsandbytes.__version__,
        "transformers": transformers.__version__,
    }
    return packed.folder(
        root, base=recipe.base_model, revision=recipe.base_revision, made_by=made_by
    )


def load_for_training(
    base: Path,
    *,
    recipe: Recipe,
    placement: Placement,
    chat_template: str | None = None,
    packed_root: Path | None = None,
    start: Path | None = None,
    split: Split | None = None,
) -> tuple[PeftModel, Any, Coverage]:
    """Model with LoRA layers, tokenizer and coverage for `recipe` and `placement`.

    4-bit weights are cached below `packed_root`. `start` is the folder of an adapter to go on from.
    `split`: several ranks share the model.
    """
    tokenizer = load_tokenizer(base, chat_template=chat_template)
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)  # any: what it fills is masked
    model = load_base(
        base,
        precision=recipe.precision,
        quantisation=recipe.quantisation if recipe.method == "qlora" else None,
        device=placement.device,
        attention=apart.ways(placement.attention)[-1],  # a package's is tried on the loaded model
        cache=_packed_folder(base, recipe, packed_root, placement.device),
        finite_only=True,
        split=split,
    )
    as_published = stored.of(_record(base)) == stored.FOUR_BIT
    rows = new_tokens.indices(model, new_tokens.extend(model, tokenizer, recipe.new_tokens))
    adapted, coverage = adapt(model, recipe, rows, as_published=as_published)
    if rows:
        new_tokens.settle(adapted)
    if start is not None:
        start_adapter.load(adapted, start, sha256=recipe.start_adapter)
    _settle_types(adapted)
    if placement.float_constants:
        four_bit.unpack_constants(adapted)
    if split is not None:
        shards.share_out(adapted, split)
    whole.replace(
        adapted,
        placement.kernels,
        placement.attention,
        precision=DTYPES[recipe.precision],
        packing=recipe.packing,
    )
    return adapted, tokenizer, coverage


def _settle_types(adapted: Any) -> None:
    """Make what is trained float32. In bfloat16, most of a late step would be rounded away.

    (At learning rate 2e-5, Adam's full step leaves 61 % of weights of 0.02 as they are.)
    """
    packed = getattr(adapted, "is_loaded_in_4bit", False)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            rounded = packed and "lora_magnitude_vector" not in name  # as trl begins
            parameter.data = (parameter.data.bfloat16() if rounded else parameter.data).float()
