"""The recipe's numbers where the user set none, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from tuning.errors import Problem, SpecError
from tuning.plan.base import DRAFT_LENGTH, Base
from tuning.plan.device import Device
from tuning.plan.values import Lengths, Recipe
from tuning.presets import stored
from tuning.spec import Settings, Spec

Pick = Callable[..., Any]

# Defaults that suit LoRA; KAITO's and trl's (rank 8, learning rate 2e-5) suit full fine-tuning.
SEED = 42
RANK = 16
LEARNING_RATE = (2e-4, "ten times that of full fine-tuning")
EPOCHS = (3.0, "each row three times")
# trl's for LoRA; more of either makes answers unlikely that were good.
DPO_RATE = (5e-6, "ten times that of full fine-tuning by preferences")
DPO_EPOCHS = (1.0, "each row once: more moves the model far from where it started")
BETA = 0.1
BATCH_ROWS = 16  # conversations an optimizer step
WARMUP_SHARE = 0.03
SMALLEST_PACK, LARGEST_PACK = 256, 8192  # tokens of a packed row, unless a row is longer


class Choices:
    """Reasons of chosen values; a value that the user set wins."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def pick(self, name: str, user: Any, value: Any, reason: str) -> Any:
        """`value`, unless the user set one."""
        self.reasons[name] = "set in the config" if user is not None else reason
        return value if user is None else user


def or_default(value: Any, default: Any) -> Any:
    """`value`, or `default` for None; 0 and false are kept."""
    return default if value is None else value


def precision(device: Device) -> tuple[str, str]:
    """The precision for `device`, and the reason."""
    if device.bf16:
        return "bfloat16", f"{device.name} computes in bfloat16"
    if device.kind == "cuda":
        return "float16", f"{device.name} has no bfloat16 (compute capability below 8.0)"
    return "float32", "this processor has no bfloat16 instructions"


def quantisation(spec: Spec, base: Base, precision: str, pick: Pick) -> dict[str, Any] | None:
    """How the base is packed, or None for a 16-bit base. Raises SpecError.

    A base that is published in 4 bits stays as it is, so no setting can change that.
    """
    if spec.method != "qlora":
        return None
    s = spec.settings
    if own := stored.four_bit(base.config):
        wrong = [
            Problem(
                "PLAN-117",
                f"QuantizationConfig.{key}",
                f"is {_shown(set_)}, but {base.name} is published in 4 bits with {_shown(has)}",
                f"set it to {_shown(has)}, or leave it out",
            )
            for key, set_, has in (
                ("bnb_4bit_quant_type", s.quant_type, own["type"]),
                ("bnb_4bit_use_double_quant", s.double_quant, own["double"]),
            )
            if set_ not in (None, has)
        ]
        if wrong:
            raise SpecError(wrong)
        reason = "the base is published so"
        return {name: pick(key, None, own[name], reason) for name, key in _OWN.items()} | {
            "compute": s.compute_dtype or precision
        }
    return {
        "type": pick("quant_type", s.quant_type, "nf4", "fits normally distributed weights best"),
        "double": pick("double_quant", s.double_quant, True, "saves 0.37 bits a weight"),
        "compute": s.compute_dtype or precision,
    }


_OWN = {"type": "quant_type", "double": "double_quant"}  # of a recipe, of the settings


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Packing:
    """How tokenised rows become training rows, on any device."""

    packing: bool
    max_length: int
    shuffle: bool
    seed: int
    train_share: float
    reasons: dict[str, str] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, recipe: Recipe) -> Packing:
        """The packing of a recipe."""
        r = recipe
        return cls(r.packing, r.max_length, r.shuffle, r.seed, r.train_share)


def packing(spec: Spec, base: Base, lengths: Lengths) -> Packing:
    """The packing that `make` would put into the recipe on any device. Raises SpecError."""
    s, choices = spec.settings, Choices()
    packed, max_length = row_shape(spec, base, lengths, choices.pick)
    return Packing(
        packed,
        max_length,
        or_default(s.shuffle, True),
        or_default(s.seed, SEED),
        or_default(s.train_share, 1.0),
        choices.reasons,
    )


def row_shape(spec: Spec, base: Base, lengths: Lengths | None, pick: Pick) -> tuple[bool, int]:
    """Whether rows are packed, and how many tokens a training row holds at most."""
    if objective := chosen_objective(spec.settings, lengths, pick):
        if base.kind is not None and base.kind.own_head:
            raise SpecError.at(
                "PLAN-123",
                base.name,
                f"has an output layer of its own kind, which {objective} does not score",
                "choose another base model, or train on the good answers: objective: sft",
            )
        packing = _unpacked(spec.settings, objective, pick)
    else:
        packing = _packing(spec.settings.packing, base, pick)
    user = spec.settings.max_length
    max_length: int = pick("max_length", user, *_max_length(base, lengths, packing))
    if max_length > base.context:
        raise SpecError.at(
            "PLAN-103",
            "TrainingArguments.max_length",
            f"is {max_length}, but {base.name} reads at most {base.context} tokens",
            f"set it to {base.context} or less, or leave it out",
        )
    return packing, max_length


def chosen_objective(
    settings: Settings, lengths: Lengths | None, pick: Pick
) -> Literal["dpo", "kto"] | None:
    """What rows are trained for, if not to be learnt as they are (sft)."""
    usual, reason = (
        ("sft", "the data has not been read yet")
        if lengths is None
        else (lengths.objective, "the shape of the rows")
    )
    chosen = pick("objective", settings.objective, usual, reason)
    return None if chosen == "sft" else chosen


def _unpacked(settings: Settings, objective: str, pick: Pick) -> bool:
    """No packing: answers are compared one by one. Raises SpecError for settings of sft alone."""
    wrong = [
        Problem(
            "PLAN-122", where, f"is {_shown(value)}, and {objective} compares whole answers", change
        )
        for where, value, change in (
            ("TrainingArguments.packing", settings.packing, "leave it out"),
            ("DatasetConfig.train_on", settings.train_on, "leave it out, or set it to assistant"),
            ("DatasetConfig.over_length", settings.over_length, "set it to truncate or drop"),
        )
        if value in (True, "all", "split")
    ]
    if wrong:
        raise SpecError(wrong)
    return bool(pick("packing", settings.packing, False, "answers are compared one by one"))


def _packing(user: bool | None, base: Base, pick: Pick) -> bool:
    safe, reason = base.packing
    if user and not safe:
        raise SpecError.at(
            "PLAN-104",
            "TrainingArguments.packing",
            f"is true, but packed rows may see each other: {reason}",
            "set it to false, or leave it out",
        )
    if safe:
        return bool(pick("packing", user, True, "no padding: short rows cost what they hold"))
    return bool(pick("packing", user, False, reason))


def _max_length(base: Base, lengths: Lengths | None, packing: bool) -> tuple[int, str]:
    context = base.context
    if lengths is None:
        return min(DRAFT_LENGTH, context), "the data has not been read yet"
    if not packing:
        return min(lengths.longest, context), f"the longest row has {lengths.longest:,} tokens"
    pack = min(LARGEST_PACK, max(SMALLEST_PACK, BATCH_ROWS * lengths.mean))
    length = 1 << math.ceil(math.log2(max(lengths.longest, pack)))
    if length > context:
        return context, f"the model's context; the longest row has {lengths.longest:,} tokens"
    return length, f"holds the longest row ({lengths.longest:,} tokens) and some of mean length"


def batch(lengths: Lengths | None, max_length: int, packing: bool, gpus: int) -> tuple[int, str]:
    """Training rows an optimizer step, and why; a multiple of `gpus`, so that none is idle."""
    if lengths is None or not packing:
        rows = math.ceil(BATCH_ROWS / gpus) * gpus
        return rows, f"{BATCH_ROWS} rows a step are the usual for LoRA{_round(gpus)}"
    packed = math.ceil(max(1, round(BATCH_ROWS * lengths.mean / max_length)) / gpus) * gpus
    rows = round(packed * max_length / lengths.mean)
    mean = f"about {rows} rows of mean length ({lengths.mean:.0f} tokens) a step"
    return packed, mean + _round(gpus)


def _round(gpus: int) -> str:
    return f", a multiple of {gpus} GPUs" if gpus > 1 else ""
