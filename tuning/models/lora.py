"""LoRA layers on every attention and MLP projection of a model, counted.

Projections are the linear layers of the model's repeated blocks, so that fused names (`qkv_proj`,
`query_key_value`, ...) need no table. Two libraries fail silently here: PEFT adapts what it
recognises, and transformers quantises what is exactly `nn.Linear`. So the result is counted
(`Coverage`), and a model that is not covered as requested is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from tuning.errors import Problem, SpecError
from tuning.models import new_tokens
from tuning.plan import Recipe

TOWER = re.compile(r"vision|image|audio|projector|multi_modal", re.IGNORECASE)
TOWERS = r".*(vision|image|audio|projector|multi_modal).*"
ROUTERS = frozenset({"router", "gate", "shared_expert_gate"})
REPEATED = re.compile(r"\.(\d+)\.")
REACHED = 0.98  # share of the layers' weights to reach: a router or two may be left out
CHANGE_MODEL = "choose a dense text model from `python -m tuning presets`"


@dataclass(frozen=True)
class Coverage:
    """Counts of the adapted and the 4-bit layers."""

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


def projections(model: torch.nn.Module) -> tuple[str, ...]:
    """Full names of every attention and MLP projection: the linear layers of the repeated blocks.

    Head, embeddings, routers and vision or audio towers are left out.
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
    targets = _named(targets)
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


def _named(targets: tuple[str, ...] | None) -> tuple[str, ...] | None:
    return None if targets is None or "all-linear" in targets else targets


def _ends(name: str, parts: Iterable[str]) -> bool:
    return any(name == part or name.endswith(f".{part}") for part in parts)


def _layer(name: str) -> int:
    match = REPEATED.search(name)
    return int(match[1]) if match else -1


def adapt(
    model: Any, recipe: Recipe, rows: new_tokens.Indices | None = None
) -> tuple[PeftModel, Coverage]:
    """Put LoRA layers on `model`, seeded, and count what they cover; `rows` of tokens are trained.

    Raises SpecError when the model holds weights that LoRA or 4-bit packing cannot reach (fused
    experts), when a target matches nothing, or when a requested projection is not covered.
    """
    available = projections(model)
    weights = dict(_block_weights(model))
    packed = sum(count for _, count in _packed(model))
    total = packed + sum(p.numel() for p in model.parameters() if p.dtype != torch.uint8)
    _refuse_unreachable(model, available, weights, recipe)
    expected = select(
        available, targets=recipe.targets, exclude=recipe.exclude, layers=recipe.layers
    )

    transformers.set_seed(recipe.seed)
    config = lora_config(model, recipe, expected)
    config.trainable_token_indices = rows
    peft_model = get_peft_model(model, config)
    adapted = tuple(
        name.removeprefix("base_model.model.")
        for name, module in peft_model.named_modules()
        if isinstance(module, LoraLayer)
    )
    missing, extra = sorted(set(expected) - set(adapted)), sorted(set(adapted) - set(expected))
    if missing or extra:
        fact = f"PEFT left out {missing[:3]} and adapted {extra[:3]}, which was not requested"
        raise SpecError.at("MODEL-115", model.config.model_type, fact, CHANGE_MODEL)
    quantised = None
    if recipe.quantisation:
        quantised = packed / max(1, sum(weights.values()))
        if quantised < REACHED:
            fact = f"only {quantised:.1%} of its layers' weights could be packed in 4 bits"
            raise SpecError.at("MODEL-114", model.config.model_type, fact, "use method lora")
    trainable = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    return peft_model, Coverage(expected, adapted, quantised, trainable, total)


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
    model: Any, available: tuple[str, ...], weights: dict[str, int], recipe: Recipe
) -> None:
    """Raise SpecError for fused experts: one tensor that neither LoRA nor 4-bit packing reaches.

    Named targets are allowed, in 16 bits.
    """
    linear = {f"{name}.weight" for name in available}
    reached = sum(n for name, n in weights.items() if name in linear)
    share = reached / max(1, sum(weights.values()))
    if share >= REACHED or (_named(recipe.targets) and not recipe.quantisation):
        return
    fact = (
        f"keeps {1 - share:.1%} of its layers' weights outside linear layers (fused experts), "
        f"where {recipe.method} cannot reach them, so that its MLPs would stay untrained"
    )
    change = f"{CHANGE_MODEL}; or use method lora and name attention projections in target_modules"
    raise SpecError.at("MODEL-113", model.config.model_type, fact, change)


def lora_config(model: torch.nn.Module, recipe: Recipe, chosen: tuple[str, ...]) -> LoraConfig:
    """PEFT's config for LoRA on exactly the projections `chosen`.

    Short names where they match the same modules: every reader of an adapter understands them.
    """
    short = sorted({name.rpartition(".")[2] for name in chosen})
    layers = list(recipe.layers) if recipe.layers is not None else None
    matches = {name for name, _ in model.named_modules() if _ends(name, short)}
    if layers is not None:
        matches = {name for name in matches if _layer(name) in layers}
    towers = {name for name in matches if TOWER.search(name)}
    exact = matches - towers == set(chosen)
    return LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        use_rslora=recipe.rslora,
        use_dora=recipe.dora,
        target_modules=short if exact else sorted(chosen),
        layers_to_transform=layers if exact else None,
        exclude_modules=TOWERS if exact and towers else None,
        bias="none",
        task_type="CAUSAL_LM",
    )
