"""spec + base + device + lengths -> Plan."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from tuning import files
from tuning.errors import SpecError
from tuning.plan import placing
from tuning.plan.base import Base, Unknown, known_base, planned_device, refuse_unsupported
from tuning.plan.choices import (
    BETA,
    DPO_EPOCHS,
    DPO_RATE,
    EPOCHS,
    LEARNING_RATE,
    RANK,
    SEED,
    WARMUP_SHARE,
    Choices,
    Pick,
    batch,
    chosen_objective,
    or_default,
    precision,
    quantisation,
    row_shape,
)
from tuning.plan.device import Device
from tuning.plan.placing import place
from tuning.plan.values import Lengths, Plan, Recipe
from tuning.spec import Settings, Spec
from tuning.spec.mixture import COLUMNS

EVALUATIONS = 10  # of a run that keeps its best weights, unless eval_steps says otherwise


def make(
    spec: Spec,
    base: Base,
    device: Device,
    *,
    lengths: Lengths | None,
    versions: dict[str, str],
    start: str | None = None,
) -> Plan:
    """The plan before packing; `freeze` adds the steps. `lengths` None makes a draft.

    `start` is the sha256 of the start adapter's weights, whose shape the spec's settings have.
    Raises SpecError for a combination that cannot work.
    """
    refuse_unsupported(spec, base, device)
    s, choices = spec.settings, Choices()
    recipe = _recipe(spec, base, device, choices.pick, lengths=lengths, versions=versions)
    recipe = replace(recipe, start_adapter=start)
    if s.new_tokens:
        choices.reasons["new_tokens"] = "rows of the embedding and the output layer, trained"
    if s.start_adapter:
        choices.reasons["start_adapter"] = f"training goes on from {s.start_adapter}"
        own = "that of start_adapter" + ("" if s.rank else ", once it is read; this is a guess")
        choices.reasons |= dict.fromkeys(("rank", "alpha", "targets"), own)
    if s.eval_steps and recipe.eval_steps is None:
        choices.reasons["eval_steps"] = "ignored: there is no evaluation split (train_test_split)"
    if s.max_length is None:
        recipe = placing.shortened(recipe, base, device, spec, lengths, choices.reasons)
    if device.capability:
        major, minor = device.capability
        reason = f"the newest build of torch for compute capability {major}.{minor}"
        if device.cuda:
            reason += f" and a driver of CUDA {device.cuda[0]}.{device.cuda[1]}"
        choices.reasons["engine"] = reason
    placement, fit = place(
        recipe, base, device, spec=spec, lengths=lengths, reasons=choices.reasons
    )
    if reached := base.reached:
        choices.reasons["adapts"] = reached.text()
    if s.max_steps:
        choices.reasons["steps"] = "set in the config"
        choices.reasons["epochs"] = "max_steps decides"
    return Plan(recipe, placement, device, choices.reasons, lengths, fit=fit)


def _recipe(
    spec: Spec,
    base: Base,
    device: Device,
    pick: Pick,
    *,
    lengths: Lengths | None,
    versions: dict[str, str],
) -> Recipe:
    """The recipe without data and number of steps, each value by the user or by `pick`'s reason."""
    s = spec.settings
    dtype = pick("precision", s.dtype, *precision(device))
    objective = chosen_objective(s, lengths, pick)
    rate, epochs = (DPO_RATE, DPO_EPOCHS) if objective else (LEARNING_RATE, EPOCHS)
    packed, max_length = row_shape(spec, base, lengths, pick)
    usual = batch(lengths, max_length, packed, device.ranks)
    return Recipe(
        base_model=base.name,
        base_revision=base.revision,
        data=(),
        method=spec.method,
        precision=dtype,
        quantisation=quantisation(spec, base, dtype, pick),
        rank=pick(
            "rank", s.rank, RANK, "enough for most tasks (the pair r: 8, alpha: 8 is not set)"
        ),
        alpha=pick("alpha", s.alpha, 2.0 * (s.rank or RANK), "twice the rank"),
        dropout=pick("dropout", s.dropout, 0.0, "dropout costs a third of the speed"),
        targets=pick("targets", s.target_modules, None, "every attention and MLP projection"),
        exclude=s.exclude_modules or (),
        layers=s.layers,
        rslora=bool(s.rslora),
        dora=bool(s.dora),
        optimizer=pick("optimizer", s.optimizer, "adamw_torch_fused", "AdamW in one kernel"),
        learning_rate=pick("learning_rate", s.learning_rate, *rate),
        schedule=pick("schedule", s.schedule, "cosine", "ends near zero, forgives a high start"),
        warmup_steps=0,
        weight_decay=pick("weight_decay", s.weight_decay, 0.0, "a low rank is restraint enough"),
        betas=(or_default(s.beta1, 0.9), or_default(s.beta2, 0.999)),
        epsilon=or_default(s.epsilon, 1e-8),
        max_grad_norm=pick("max_grad_norm", s.max_grad_norm, 1.0, "the usual guard"),
        neftune_alpha=s.neftune_alpha,
        max_length=max_length,
        packing=packed,
        train_on=pick("train_on", s.train_on, "assistant", "the answers are what should change"),
        chat_template=files.digest(s.chat_template.encode()) if s.chat_template else None,
        columns=_columns(s),
        shuffle=or_default(s.shuffle, True),
        train_share=or_default(s.train_share, 1.0),
        global_batch=pick("global_batch", _user_batch(s, device), *usual),
        epochs=pick("epochs", s.epochs, *epochs),
        steps=s.max_steps or 0,
        seed=or_default(s.seed, SEED),
        eval_steps=s.eval_steps if or_default(s.train_share, 1.0) < 1 else None,
        keep_best=_keeps_best(s),
        patience=s.patience,
        patience_threshold=s.patience_threshold if s.patience else None,
        over_length=None if s.over_length == "auto" else s.over_length,
        split_seed=s.shuffle_seed if or_default(s.train_share, 1.0) < 1 or s.sources else None,
        new_tokens=s.new_tokens or (),
        objective=objective,
        beta=pick("beta", s.beta, BETA, "trl's") if objective else None,
        versions=versions,
    )


def _user_batch(settings: Settings, device: Device) -> int | None:
    """The global batch that the user set, if any."""
    if not settings.micro_batch and not settings.accumulation:
        return None
    return (settings.micro_batch or 1) * (settings.accumulation or 1) * device.ranks


def split_seed(settings: Settings) -> int:
    """The seed of what is drawn among the rows: held-out ones, and a mixture's."""
    return int(or_default(settings.shuffle_seed, or_default(settings.seed, SEED)))


def _columns(settings: Settings) -> dict[str, str]:
    return {name: value for name in COLUMNS if (value := getattr(settings, name)) is not None}


_BEST = "load_best_model_at_end"


def _keeps_best(settings: Settings) -> bool:
    if not settings.keep_best and not settings.patience:
        return False
    if or_default(settings.train_share, 1.0) >= 1:
        raise SpecError.at(
            "PLAN-109",
            f"TrainingArguments.{'early_stopping_patience' if settings.patience else _BEST}",
            "needs an evaluation split, and all rows are trained on",
            "set DatasetConfig.train_test_split below 1, such as 0.95, or leave it out",
        )
    return True


def freeze(
    plan: Plan,
    spec: Spec,
    *,
    rows: int,
    data: tuple[str, ...],
    sources: tuple[dict[str, Any], ...] = (),
) -> Plan:
    """The complete plan of data packed into `rows` training rows; fixes the run id.

    `data` holds the sha256 of each file, in order; `sources` the parts of a mixture.
    """
    recipe, reasons = plan.recipe, dict(plan.reasons)
    per_epoch = math.ceil(rows / recipe.global_batch)
    steps = spec.settings.max_steps or max(1, math.ceil(per_epoch * recipe.epochs))
    reasons["steps"] = (
        "set in the config"
        if spec.settings.max_steps
        else f"{rows:,} rows / {recipe.global_batch} a step x {recipe.epochs:g} epochs"
    )
    warmup = or_default(spec.settings.warmup, WARMUP_SHARE)
    warmup_steps = math.ceil(warmup * steps) if isinstance(warmup, float) and warmup < 1 else warmup
    if spec.settings.warmup is None:
        reasons["warmup_steps"] = f"{WARMUP_SHARE:.0%} of the steps, so that Adam finds its scale"
        warmup_steps = min(int(warmup_steps), steps - 1)  # its first step learns nothing
    elif warmup_steps >= steps:
        what = f"is {warmup_steps:g} of {steps:,} steps, so that learning_rate is never reached"
        change = f"set it below {steps:,}, such as 0.03 for a share, or leave it out"
        raise SpecError.at("PLAN-114", "TrainingArguments.warmup_steps", what, change)
    recipe = replace(recipe, steps=steps, warmup_steps=int(warmup_steps), data=data)
    recipe = replace(recipe, sources=sources)
    if recipe.keep_best and recipe.eval_steps is None:
        recipe = replace(recipe, eval_steps=max(1, steps // EVALUATIONS))
        reasons["eval_steps"] = "ten evaluations to choose the best weights from"
    if recipe.patience and recipe.eval_steps:
        count = steps // recipe.eval_steps
        acts = "set in the config" if count > recipe.patience else "cannot act"
        reasons["patience"] = f"{acts}: there are {count} evaluations"
    return replace(plan, recipe=recipe, reasons=reasons, rows=rows)


def resume(plan: Plan, recipe: Recipe, base: Base, spec: Spec, *, rows: int) -> Plan:
    """A plan that keeps the frozen `recipe` and places it on the device of `plan`."""
    reasons = {name: why for name, why in plan.reasons.items() if name not in placing.REASONED}
    changed = {n for n, value in vars(recipe).items() if value != getattr(plan.recipe, n)}
    reasons |= dict.fromkeys(changed & reasons.keys() | {"steps"}, "as this run began")
    placement, fit = place(
        recipe, base, plan.device, spec=spec, lengths=plan.lengths, reasons=reasons
    )
    return replace(plan, recipe=recipe, placement=placement, rows=rows, fit=fit, reasons=reasons)


def is_enough(spec: Spec, here: Device) -> bool:
    """Whether presets and the base's folder suffice for a draft, without hub or simulation."""
    device = planned_device(spec, here)
    try:
        return not placing.wants_simulation(known_base(spec), device, spec)
    except Unknown:
        return False


def draft(spec: Spec, *, here: Device, base: Base | None = None) -> Plan:
    """The plan from the spec alone: no data, no weights, no network.

    Sized for the spec's machine type if it names one, else for the device `here`. Without `base`
    the base model must be a preset or a folder. Raises SpecError (Unknown, PLAN-107).
    """
    device = planned_device(spec, here)
    return make(spec, base or known_base(spec), device, lengths=None, versions={})
