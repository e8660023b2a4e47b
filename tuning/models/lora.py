"""LoRA layers on every projection and expert of a model, counted.

Two libraries fail silently here: PEFT adapts what it recognises, and transformers quantises what is
exactly `nn.Linear`. So the result is counted (`Coverage`), and a model that is not covered as
requested is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import transformers_weight_conversion as conversion

from tuning import presets
from tuning.errors import Problem, SpecError
from tuning.models import four_bit, new_tokens
from tuning.models.kernels import experts
from tuning.models.survey import REPEATED, TOWER, Survey, survey
from tuning.plan import Recipe
from tuning.plan.verdict import CHANGE_MODEL

TOWERS = f".*({TOWER.pattern}).*"  # as peft matches a pattern: the whole name
REACHED = 0.98  # share of the adaptable weights to pack


@dataclass(frozen=True)
class Coverage:
    """Counts of the adapted and the 4-bit weights."""

    expected: tuple[str, ...]  # full names of the projections and expert parameters to adapt
    adapted: tuple[str, ...]  # full names of those that have a LoRA layer
    quantised: float | None  # share of the adaptable weights held in 4 bits; None without 4-bit
    matrices: int  # of experts that are adapted: a parameter holds those of a layer
    trainable: int  # numbers that are trained
    total: int  # numbers of the base model, unpacked

    def to_json(self) -> dict[str, Any]:
        """For results and cards: counts, shares and the adapted names without their paths."""
        return {
            "expected": len(self.expected),
            "adapted": len(self.adapted),
            "matrices": self.matrices,
            "names": sorted({name.rpartition(".")[2] for name in self.adapted}),
            "quantised": self.quantised,
        }


def select(
    available: Iterable[str],
    *,
    targets: tuple[str, ...] | None,
    exclude: tuple[str, ...] = (),
    layers: tuple[int, ...] | None = None,
) -> tuple[str, ...]:
    """The projections among `available` (full names) that the recipe names.

    A target or exclusion is a name or the end of one, as for PEFT; no targets, or `all-linear`,
    mean all. Raises SpecError naming every target, exclusion and layer without a match.
    """
    available = tuple(available)
    targets = None if targets is None or "all-linear" in targets else targets
    names = ", ".join(sorted({name.rpartition(".")[2] for name in available}))
    numbers = sorted({_layer(name) for name in available})
    problems = []
    for key, parts in (("target_modules", targets or ()), ("exclude_modules", exclude)):
        for part in parts:
            if not any(_ends(name, (part,)) for name in available):
                fact = f"names {part!r}, which is no attention or MLP projection of this model"
                problems.append(Problem("MODEL-110", key, fact, f"use some of {names}"))
    for layer in layers or ():
        if layer not in numbers:
            fact, change = f"names layer {layer}", f"use layers {numbers[0]} to {numbers[-1]}"
            problems.append(Problem("MODEL-111", "layers_to_transform", fact, change))
    chosen = tuple(
        name
        for name in available
        if (targets is None or _ends(name, targets))
        and not _ends(name, exclude)
        and (layers is None or _layer(name) in layers)
    )
    if not chosen and not problems:
        fact = "leave no projection to train"
        problems.append(Problem("MODEL-112", "LoraConfig", fact, f"use some of {names}"))
    if problems:
        raise SpecError(problems)
    return chosen


def _ends(name: str, parts: Iterable[str]) -> bool:
    return any(name == part or name.endswith(f".{part}") for part in parts)


def _layer(name: str) -> int:
    match = REPEATED.search(name)
    return int(match[1]) if match else -1


def adapt(
    model: Any,
    recipe: Recipe,
    rows: new_tokens.Indices | None = None,
    *,
    as_published: bool = False,
) -> tuple[PeftModel, Coverage]:
    """Put LoRA layers on `model`, seeded, and count what they cover; `rows` of tokens are trained.

    `as_published`: the base's makers packed it in 4 bits, and chose what stays in 16.
    Raises SpecError when the model holds weights that LoRA cannot reach, when a target matches
    nothing, or when a requested projection is not covered.
    """
    found, packed = survey(model), dict(four_bit.packed(model))
    total = sum(packed.values()) + sum(
        p.numel() for p in model.parameters() if p.dtype != torch.uint8
    )
    kind = presets.class_of(model.config.to_dict())
    if refused := found.verdict().refusal(dora=recipe.dora, kind=kind):
        raise SpecError.at("MODEL-113", model.config.model_type, *refused)
    expected = select(
        found.adaptable, targets=recipe.targets, exclude=recipe.exclude, layers=recipe.layers
    )
    published = targets(model, found, expected, layers=recipe.layers)
    transformers.set_seed(recipe.seed)
    options = lora_options(recipe) | {"trainable_token_indices": rows}
    peft_model = put(model, options, expected)
    for key, value in published.items():
        setattr(peft_model.peft_config["default"], key, value)
    adapted = adapted_names(peft_model)
    missing, extra = sorted(set(expected) - set(adapted)), sorted(set(adapted) - set(expected))
    if missing or extra:
        fact = f"PEFT left out {missing[:3]} and adapted {extra[:3]}, which was not requested"
        raise SpecError.at("MODEL-115", model.config.model_type, fact, CHANGE_MODEL)
    quantised = None
    if recipe.quantisation:
        quantised = four_bit.share(found, packed)
        if quantised < REACHED and not as_published:
            fact = f"only {quantised:.1%} of its layers' weights could be packed in 4 bits"
            raise SpecError.at("MODEL-114", model.config.model_type, fact, "use method lora")
    trainable = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    matrices = sum(found.sizes.get(name, 0) for name in adapted)
    return peft_model, Coverage(expected, adapted, quantised, matrices, trainable, total)


def put(model: Any, options: dict[str, Any], chosen: Iterable[str]) -> PeftModel:
    """LoRA layers on exactly `chosen`, linear layers and expert parameters by their full names.

    `options` are those of LoraConfig without targets.
    """
    dropout = options.get("lora_dropout", 0.0)
    with by_own_names():
        tuned = get_peft_model(model, config(options, chosen, survey(model)))
    experts.read_packed(tuned)
    made = tuned.peft_config["default"]
    if made.lora_dropout != dropout:  # peft has none for experts, and so refuses it for all
        for layer in tuned.modules():
            if isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper):
                layer.lora_dropout["default"] = torch.nn.Dropout(dropout)
        made.lora_dropout = dropout
    return tuned


def config(options: dict[str, Any], chosen: Iterable[str], found: Survey) -> LoraConfig:
    """PEFT's config for `chosen`, by full names; without dropout where there are experts."""
    chosen = tuple(chosen)
    parameters = [name for name in found.experts if name in set(chosen)]
    return LoraConfig(
        **options | ({"lora_dropout": 0.0} if parameters else {}),
        target_modules=[name for name in chosen if name not in set(parameters)],
        target_parameters=parameters or None,
    )


@contextmanager
def by_own_names() -> Iterator[None]:
    """Inside, peft takes names for what they are.

    It would take `gate_proj` of a shared expert or a dense layer for that of the fused experts of
    earlier versions of transformers.
    """
    table = conversion._MOE_TARGET_MODULE_MAPPING
    held = dict(table)
    table.clear()
    try:
        yield
    finally:
        table.update(held)


def lora_options(recipe: Recipe) -> dict[str, Any]:
    """The options of LoraConfig that a recipe has, without targets."""
    return {
        "r": recipe.rank,
        "lora_alpha": recipe.alpha,
        "lora_dropout": recipe.dropout,
        "use_rslora": recipe.rslora,
        "use_dora": recipe.dora,
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }


def targets(
    model: Any, found: Survey, chosen: Iterable[str], *, layers: tuple[int, ...] | None
) -> dict[str, Any]:
    """The keys of an adapter's config that name `chosen`, as every reader of adapters understands.

    Short names where they match the same weights. Where peft would take a projection's name for
    that of fused experts, the projection is named by its weight, which means the same to it.
    """
    mistaken = conversion._MOE_TARGET_MODULE_MAPPING.get(
        conversion._MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type), {}
    )
    parameters, linears, weights = [], [], []
    for name in chosen:
        if name in set(found.experts):
            parameters.append(name)
        elif name.rpartition(".")[2] in mistaken:
            weights.append(f"{name}.weight")
        else:
            linears.append(name)
    short = sorted({name.rpartition(".")[2] for name in linears})
    matches = {name for name, _ in model.named_modules() if _ends(name, short)}
    if layers is not None:
        matches = {name for name in matches if _layer(name) in layers}
    towers = {name for name in matches if TOWER.search(name)}
    exact = matches - towers == set(linears)
    known = [name for name, _ in model.named_parameters()] + list(found.experts)
    return {
        "target_modules": short if exact else sorted(linears),
        "layers_to_transform": list(layers) if exact and linears and layers is not None else None,
        "exclude_modules": TOWERS if exact and towers else None,
        "target_parameters": _shortest([*parameters, *weights], known) or None,
    }


def _shortest(names: list[str], known: Iterable[str]) -> list[str]:
    """Ends of `names` with their module that match no other name in `known`; or whole names."""
    ends = sorted({".".join(name.split(".")[-2:]) for name in names})
    matched = {name for name in known if _ends(name, ends)}
    return ends if matched == set(names) else sorted(names)


def adapted_names(model: PeftModel) -> tuple[str, ...]:
    """Full names, in the base model, of what has a LoRA layer."""
    names = []
    for path, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            inner = path.removeprefix("base_model.model.").replace(".base_layer", "")
            names.append(f"{inner}.{module.parameter_name}")
        elif isinstance(module, LoraLayer):
            names.append(path.removeprefix("base_model.model."))
    return tuple(names)
