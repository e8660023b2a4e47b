"""Base weights -> tokenizer and model, in 4 or 16 bits, with LoRA on every projection.

The projections are found from the model's own linear layers, so that fused names (`qkv_proj`,
`query_key_value`, ...) need no table. Two libraries fail here in silence: PEFT adapts what it
recognises, and transformers quantises what is exactly `nn.Linear`. So what came out is counted
(`Coverage`), and a model that is not covered as asked is refused.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from tuning import files
from tuning.errors import Problem, SpecError
from tuning.models import packed
from tuning.models.kernels import apart, fuse
from tuning.plan import Placement, Recipe
from tuning.plan.backends import BY_OFFSETS

logger = logging.getLogger(__name__)

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
TOWER = re.compile(r"vision|image|audio|projector|multi_modal", re.IGNORECASE)
TOWERS = r".*(vision|image|audio|projector|multi_modal).*"
ROUTERS = frozenset({"router", "gate", "shared_expert_gate"})
REPEATED = re.compile(r"\.(\d+)\.")
REACHED = 0.98  # of the weights in a model's layers; a router or two may stay out
CHANGE_MODEL = "choose a dense text model from `python -m tuning presets`"


@dataclass(frozen=True)
class Coverage:
    """How much of what was asked the adapters and the 4-bit layers cover."""

    expected: tuple[str, ...]  # full names of the projections to adapt
    adapted: tuple[str, ...]  # full names of those that have a LoRA layer
    quantised: float | None  # share of the layers' weights held in 4 bits; None without 4-bit
    trainable: int  # numbers that are trained
    total: int  # numbers of the base model, unpacked

    def to_json(self) -> dict[str, Any]:
        """For results and cards: counts, shares and the adapted names without their paths."""
        return {
            "expected": len(self.expected),
            "adapted": len(self.adapted),
            "names": sorted({name.rpartition(".")[2] for name in self.adapted}),
            "quantised": self.quantised,
        }


def read_config(base: Path) -> Any:
    """The transformers config of the model in `base`.

    Raises SpecError for a folder without one, for an architecture that needs code of its own, and
    for weights that are already quantised.
    """
    try:
        record = files.read_json(base / "config.json")
    except (OSError, ValueError) as error:
        what = f"has no readable config.json ({error})"
        change = "name a folder with config.json, *.safetensors and a tokenizer"
        raise SpecError.at("MODEL-100", str(base), what, change) from None
    kind = record.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        what = f"is of model_type {kind!r}, which transformers does not know without remote code"
        raise SpecError.at("MODEL-101", str(base / "config.json"), what, CHANGE_MODEL)
    quantised = record.get("quantization_config") or {}
    if quantised:
        method = quantised.get("quant_method", "an unknown method")
        what = f"says that the weights are already quantised ({method})"
        change = "use the 16-bit weights of the same model; qlora packs them itself"
        raise SpecError.at("MODEL-102", str(base / "config.json"), what, change)
    try:
        return transformers.AutoConfig.from_pretrained(base, trust_remote_code=False)
    except (ValueError, KeyError, TypeError) as error:
        what = f"is refused by transformers {transformers.__version__}: {error}"
        change = "use the model's newest revision"
        raise SpecError.at("MODEL-103", str(base / "config.json"), what, change) from None


def load_tokenizer(base: Path, *, chat_template: str | None = None) -> Any:
    """The tokenizer in `base`; `chat_template` (Jinja text) replaces its own template."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        what = f"has no tokenizer that transformers can load ({error})"
        change = "copy the model's tokenizer.json and tokenizer_config.json into it"
        raise SpecError.at("MODEL-104", str(base), what, change) from None
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
) -> Any:
    """The base model in `base` on `device` (cpu or cuda), in `precision` or packed in 4 bits.

    `quantisation` is the recipe's: type, double, compute. A model with a vision tower keeps it,
    unquantised, so that names in the adapter are those of the published model. Packed weights are
    taken from the folder `cache` if they are whole, and kept there if not. Raises SpecError.
    """
    config = read_config(base)
    if not any(base.glob("*.safetensors")):
        what, change = "has no *.safetensors file", "convert the weights to safetensors"
        raise SpecError.at("MODEL-105", str(base), what, change)
    # bitsandbytes packs what is exactly nn.Linear; Falcon's subclass of it computes the same
    transformers.models.falcon.modeling_falcon.FalconLinear = torch.nn.Linear
    options: dict[str, Any] = {"dtype": DTYPES[precision], "trust_remote_code": False}
    if attention or config.model_type == "gemma2":  # gemma2's sdpa drops the softcap in silence
        options["attn_implementation"] = attention or "eager"
    if quantisation:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantisation["type"],
            bnb_4bit_use_double_quant=quantisation["double"],
            bnb_4bit_compute_dtype=DTYPES[quantisation["compute"]],
            llm_int8_skip_modules=["lm_head", TOWERS] if _has_towers(config) else None,
        )
    if device == "cuda":
        options["device_map"] = {"": torch.cuda.current_device()}
    source = base
    if quantisation and cache is not None and packed.whole(cache):
        source, config.quantization_config = cache, options.pop("quantization_config").to_dict()
    try:
        model = _auto_class(config).from_pretrained(
            source, config=config, use_safetensors=True, **options
        )
    except (ValueError, KeyError, OSError) as error:
        if attention and error.args == (attention,):  # a family of a table of its own: Falcon
            what, change = f"has no {attention} attention", "leave attn_implementation out"
            raise SpecError.at("MODEL-107", config.model_type, what, change) from error
        what = f"cannot be loaded: {error}"
        raise SpecError.at("MODEL-106", str(base), what, "fetch the model again") from error
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On a CPU with AVX512-BF16 the first answer or evaluation repacks a 4-bit layer for
            # a kernel that has no backward: training on from there drops gradients in silence.
            module.support_avx512bf16_for_cpu = False
    if quantisation and cache is not None and source is base:
        packed.keep(model, cache)
    return model


def _has_towers(config: Any) -> bool:
    return config.get_text_config() is not config


def _auto_class(config: Any) -> Any:
    causal = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) in causal:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForImageTextToText


def _packed_folder(base: Path, recipe: Recipe, root: Path | None) -> Path | None:
    """Where the recipe's 4-bit weights are remembered; None if they are not."""
    if root is None or recipe.quantisation is None or not packed.worthwhile(base):
        return None
    made_by = {
        "quantisation": recipe.quantisation,
        "precision": recipe.precision,
        "bitsandbytes": bitsandbytes.__version__,
        "transformers": transformers.__version__,
    }
    return packed.folder(
        root, base=recipe.base_model, revision=recipe.base_revision, made_by=made_by
    )


def projections(model: torch.nn.Module) -> tuple[str, ...]:
    """Full names of every attention and MLP projection: the linear layers of the repeated blocks.

    Not the head, not the embeddings, no router, nothing of a vision or audio tower.
    """
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and REPEATED.search(name)
        and not TOWER.search(name)
        and name.rpartition(".")[2] not in ROUTERS
    )


def select(
    found: Iterable[str],
    *,
    targets: tuple[str, ...] | None,
    exclude: tuple[str, ...] = (),
    layers: tuple[int, ...] | None = None,
) -> tuple[str, ...]:
    """Those projections of `found` (full names) that the recipe asks for.

    A target or exclusion is a name or the end of one, as for PEFT; no targets, or `all-linear`, are
    all. Raises SpecError naming every target, exclusion and layer that matches nothing.
    """
    found = tuple(found)
    targets = _named(targets)
    names = ", ".join(sorted({name.rpartition(".")[2] for name in found}))
    numbers = sorted({_layer(name) for name in found})
    problems = []
    for key, wanted in (("target_modules", targets or ()), ("exclude_modules", exclude)):
        for part in wanted:
            if not any(_ends(name, (part,)) for name in found):
                what = f"names {part!r}, which is no attention or MLP projection of this model"
                problems.append(Problem("MODEL-110", key, what, f"use some of {names}"))
    for layer in layers or ():
        if layer not in numbers:
            what, change = f"names layer {layer}", f"use layers {numbers[0]} to {numbers[-1]}"
            problems.append(Problem("MODEL-111", "layers_to_transform", what, change))
    chosen = tuple(
        name
        for name in found
        if (targets is None or _ends(name, targets))
        and not _ends(name, exclude)
        and (layers is None or _layer(name) in layers)
    )
    if not chosen and not problems:
        what = "leave no projection to train"
        problems.append(Problem("MODEL-112", "LoraConfig", what, f"use some of {names}"))
    if problems:
        raise SpecError(problems)
    return chosen


def _named(targets: tuple[str, ...] | None) -> tuple[str, ...] | None:
    return None if targets is None or "all-linear" in targets else targets


def _ends(name: str, parts: Iterable[str]) -> bool:
    return any(name == part or name.endswith(f".{part}") for part in parts)


def _layer(name: str) -> int:
    match = REPEATED.search(name)
    return int(match[1]) if match else -1


def adapt(model: Any, recipe: Recipe) -> tuple[PeftModel, Coverage]:
    """Put LoRA layers on `model`, seeded, and count what they cover.

    Raises SpecError when the model holds weights that LoRA or 4-bit packing cannot reach (fused
    experts), when a target matches nothing, or when anything asked for is not covered.
    """
    found = projections(model)
    weights = dict(_block_weights(model))
    total = sum(p.numel() for _, p in model.named_parameters() if p.dtype != torch.uint8)
    total += sum(n for _, n in _packed(model))
    _refuse_unreachable(model, found, weights, recipe)
    wanted = select(found, targets=recipe.targets, exclude=recipe.exclude, layers=recipe.layers)

    transformers.set_seed(recipe.seed)
    adapted_model = get_peft_model(model, lora_config(model, recipe, wanted))
    prefix = "base_model.model."
    adapted = tuple(
        name.removeprefix(prefix)
        for name, module in adapted_model.named_modules()
        if isinstance(module, LoraLayer)
    )
    missing, extra = sorted(set(wanted) - set(adapted)), sorted(set(adapted) - set(wanted))
    if missing or extra:
        what = f"PEFT left out {missing[:3]} and adapted {extra[:3]} beyond what was asked"
        raise SpecError.at("MODEL-115", model.config.model_type, what, CHANGE_MODEL)
    quantised = None
    if recipe.quantisation:
        quantised = sum(n for _, n in _packed(model)) / max(1, sum(weights.values()))
        if quantised < REACHED:
            what = f"only {quantised:.1%} of its layers' weights could be packed in 4 bits"
            raise SpecError.at("MODEL-114", model.config.model_type, what, "use method lora")
    trainable = sum(p.numel() for p in adapted_model.parameters() if p.requires_grad)
    return adapted_model, Coverage(wanted, adapted, quantised, trainable, total)


def _block_weights(model: torch.nn.Module) -> Iterator[tuple[str, int]]:
    """Name and size of each weight matrix in the model's repeated blocks, towers left out."""
    packed = dict(_packed(model))
    for name, parameter in model.named_parameters():
        module = name.rpartition(".")[0]
        if REPEATED.search(name) and not TOWER.search(name) and parameter.ndim >= 2:
            yield name, packed.get(module, parameter.numel())


def _packed(model: torch.nn.Module) -> Iterator[tuple[str, int]]:
    """Name and unpacked size of each 4-bit layer."""
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            yield name, int(module.in_features * module.out_features)


def _refuse_unreachable(
    model: Any, found: tuple[str, ...], weights: dict[str, int], recipe: Recipe
) -> None:
    """Experts are one tensor for all, no linear layers: neither LoRA nor 4-bit packing sees them.

    Who names targets gets those, in 16 bits.
    """
    linear = {f"{name}.weight" for name in found}
    reached = sum(n for name, n in weights.items() if name in linear)
    share = reached / max(1, sum(weights.values()))
    if share >= REACHED or (_named(recipe.targets) and not recipe.quantisation):
        return
    what = (
        f"keeps {1 - share:.1%} of its layers' weights outside linear layers (fused experts), "
        f"where {recipe.method} cannot reach them, so that its MLPs would stay untrained"
    )
    change = f"{CHANGE_MODEL}; or use method lora and name attention projections in target_modules"
    raise SpecError.at("MODEL-113", model.config.model_type, what, change)


def lora_config(model: torch.nn.Module, recipe: Recipe, wanted: tuple[str, ...]) -> LoraConfig:
    """PEFT's config for LoRA on exactly the projections `wanted`.

    Short names where they say the same: they are what every reader of an adapter understands.
    """
    short = sorted({name.rpartition(".")[2] for name in wanted})
    layers = list(recipe.layers) if recipe.layers is not None else None
    hit = {name for name, _ in model.named_modules() if _ends(name, short)}
    if layers is not None:
        hit = {name for name in hit if _layer(name) in layers}
    towers = {name for name in hit if TOWER.search(name)}
    exact = hit - towers == set(wanted)
    return LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        use_rslora=recipe.rslora,
        use_dora=recipe.dora,
        target_modules=short if exact else sorted(wanted),
        layers_to_transform=layers if exact else None,
        exclude_modules=TOWERS if exact and towers else None,
        bias="none",
        task_type="CAUSAL_LM",
    )


def load(
    base: Path,
    *,
    recipe: Recipe,
    placement: Placement,
    chat_template: str | None = None,
    packed_root: Path | None = None,
) -> tuple[PeftModel, Any, Coverage]:
    """Model with LoRA layers, tokenizer and coverage for training `recipe` on this machine.

    4-bit weights are remembered below `packed_root`.
    """
    tokenizer = load_tokenizer(base, chat_template=chat_template)
    model = load_base(
        base,
        precision=recipe.precision,
        quantisation=recipe.quantisation if recipe.method == "qlora" else None,
        device=placement.device,
        attention=placement.attention,
        cache=_packed_folder(base, recipe, packed_root),
    )
    adapted, coverage = adapt(model, recipe)
    logger.info("fused kernels: %s", fuse.fuse(adapted, placement.kernels) or "none")
    if recipe.packing or placement.attention in BY_OFFSETS:
        apart.settle(
            adapted,
            placement.attention,
            precision=DTYPES[recipe.precision],
            packing=recipe.packing,
        )
    return adapted, tokenizer, coverage
