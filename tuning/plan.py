"""spec + model + device + lengths -> Plan: recipe, placement, reasons.

The recipe decides the adapter's bytes and is frozen once complete; the placement says how one
machine carries it out and is derived again at each start. Each number carries its reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tuning import files, presets, sizing
from tuning.device import Device
from tuning.errors import Problem, SpecError
from tuning.sizing import Fit
from tuning.spec import Settings, Spec


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the adapter's bytes; its hash is the run id. No path, host, clock."""

    base_model: str  # hub id, preset's hub id, or "local"
    base_revision: str  # commit of the hub, or "sha256:..." of a local folder's files
    data: tuple[str, ...]  # sha256 of each file, in order
    method: Literal["lora", "qlora"]
    precision: Literal["bfloat16", "float16", "float32"]  # weights and compute
    quantisation: dict[str, Any] | None  # {"type": "nf4", "double": true, "compute": "bfloat16"}
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...] | None  # None: every attention and MLP projection of the model
    exclude: tuple[str, ...]
    layers: tuple[int, ...] | None
    rslora: bool
    dora: bool
    optimizer: str  # a name transformers knows: adamw_torch_fused, adamw_torch, ...
    learning_rate: float
    schedule: str
    warmup_steps: int
    weight_decay: float
    betas: tuple[float, float]
    epsilon: float
    max_grad_norm: float
    neftune_alpha: float | None
    max_length: int
    packing: bool
    train_on: Literal["assistant", "all"]
    chat_template: str | None  # sha256 of a user's template
    columns: dict[str, str]  # messages_column, context_column, response_column as set
    shuffle: bool
    train_share: float
    global_batch: int  # rows (packed rows when packing) an optimizer step
    epochs: float
    steps: int
    seed: int
    eval_steps: int | None
    versions: dict[str, str] = field(
        default_factory=dict
    )  # torch, transformers, trl, peft, bitsandbytes

    @property
    def run_id(self) -> str:
        """sha256 of the canonical recipe, 64 hexadecimal digits."""
        return files.digest(files.canonical(asdict(self)))


@dataclass(frozen=True)
class Placement:
    """How this machine carries the recipe out; derived again at will."""

    device: Literal["cuda", "cpu"]
    ranks: int
    micro_batch: int  # rows at once on one rank
    accumulation: int  # global_batch == micro_batch * accumulation * ranks
    checkpointing: bool
    attention: str
    threads: int | None = None  # intra-op threads on a CPU; None leaves torch's choice


@dataclass(frozen=True)
class Lengths:
    """What tokenising found, in tokens a row."""

    rows: int
    tokens: int
    longest: int

    @property
    def mean(self) -> float:
        """Mean tokens of a row."""
        return self.tokens / max(1, self.rows)


@dataclass(frozen=True)
class Base:
    """What the plan must know of the base model; `facts` is None for an unknown family."""

    name: str  # hub id, or "local"
    revision: str
    facts: presets.Facts | None
    config: dict[str, Any] = field(default_factory=dict)  # config.json, where there are no facts

    @property
    def context(self) -> int:
        """The longest sequence it reads, in tokens."""
        if self.facts:
            return self.facts.context
        return int(self.config.get("max_position_embeddings", DRAFT_LENGTH))

    @property
    def packing(self) -> tuple[bool, str]:
        """Whether packed rows stay apart, and why."""
        if self.facts:
            return self.facts.packing_safe, self.facts.packing_reason
        return False, "nobody has checked that this family keeps packed rows apart"


def base_from_config(name: str, revision: str, config: dict[str, Any]) -> Base:
    """The base whose parsed `config.json` is `config`. Raises SpecError for an impossible one."""
    return Base(name, revision, presets.facts(config), config)


@dataclass(frozen=True)
class Plan:
    """A recipe, a placement, and the reason of each number.

    Made from the spec alone it is a draft (`rows` is None): lengths are upper bounds and the number
    of steps is not known. `freeze` completes it.
    """

    recipe: Recipe
    placement: Placement
    device: Device
    reasons: dict[str, str]
    lengths: Lengths | None = None
    rows: int | None = None  # training rows after packing
    fit: Fit | None = None  # its memory and speed, where they can be foretold

    @property
    def seconds(self) -> float | None:
        """Predicted seconds of training, once the steps are known."""
        if self.rows is None or self.fit is None or self.fit.seconds_per_token is None:
            return None
        recipe = self.recipe
        tokens = recipe.steps * recipe.global_batch * recipe.max_length
        return tokens * self.fit.seconds_per_token / self.placement.ranks

    def to_json(self) -> dict[str, Any]:
        """For `plan.json` and `plan --json`."""
        return {
            "run_id": self.recipe.run_id if self.rows is not None else None,
            "recipe": asdict(self.recipe),
            "placement": asdict(self.placement),
            "device": asdict(self.device),
            "reasons": self.reasons,
            "lengths": asdict(self.lengths) if self.lengths else None,
            "rows": self.rows,
            "memory": _memory_json(self.fit, self.device),
            "seconds": self.seconds,
        }


def _memory_json(fit: Fit | None, device: Device) -> dict[str, Any] | None:
    if fit is None:
        return None
    return {
        "terms": fit.ledger.terms,
        "total": fit.ledger.total,
        "free": device.memory_bytes,
        "moment": fit.ledger.moment,
        "tokens_per_second": fit.seconds_per_token and 1 / fit.seconds_per_token,
    }


def recipe_from_json(record: dict[str, Any]) -> Recipe:
    """The recipe that `dataclasses.asdict` and JSON made a dictionary of."""
    tuples = ("data", "targets", "exclude", "layers", "betas")
    fixed = {k: tuple(record[k]) for k in tuples if record[k] is not None}
    return Recipe(**(record | fixed))


# Defaults that suit LoRA; KAITO's and trl's (rank 8, learning rate 2e-5) suit full fine-tuning.
RANK = 16
LEARNING_RATE = 2e-4
EPOCHS = 3.0
BATCH_ROWS = 16  # conversations an optimizer step
WARMUP_SHARE = 0.03
SMALLEST_PACK, LARGEST_PACK = 256, 8192  # tokens of a packed row, unless a row is longer
DRAFT_LENGTH = 2048  # before the data was read
SMALL_ON_CPU = 50 * 10**6  # parameters
SHORTEST = 512  # tokens: rows are not made shorter than this to fit a GPU


class _Choices:
    """Chosen values and why: what the user set wins, and the reason says so."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def pick(self, name: str, user: Any, value: Any, reason: str) -> Any:
        self.reasons[name] = "set in the config" if user is not None else reason
        return value if user is None else user


def make(
    spec: Spec, base: Base, device: Device, *, lengths: Lengths | None, versions: dict[str, str]
) -> Plan:
    """Decide everything that can be decided before packing; steps come with `freeze`.

    Raises SpecError for what cannot work together. `lengths` None makes a draft.
    """
    refuse_unsupported(spec, base, device)
    s, choices = spec.settings, _Choices()
    pick = choices.pick
    precision = pick("precision", s.dtype, *_precision(device))
    packing, max_length = _rows(spec, base, lengths, pick)
    user_batch = None
    if s.micro_batch or s.accumulation:
        user_batch = (s.micro_batch or 1) * (s.accumulation or 1)
    recipe = Recipe(
        base_model=base.name,
        base_revision=base.revision,
        data=(),
        method=spec.method,
        precision=precision,
        quantisation=_quantisation(spec, precision, pick),
        rank=pick("rank", s.rank, RANK, "enough for most tasks at 1 % of the weights"),
        alpha=pick("alpha", s.alpha, 2.0 * (s.rank or RANK), "twice the rank"),
        dropout=pick("dropout", s.dropout, 0.0, "dropout costs a third of the speed"),
        targets=pick("targets", s.target_modules, None, "every attention and MLP projection"),
        exclude=s.exclude_modules or (),
        layers=s.layers,
        rslora=bool(s.rslora),
        dora=bool(s.dora),
        optimizer=pick("optimizer", s.optimizer, "adamw_torch_fused", "AdamW in one kernel"),
        learning_rate=pick(
            "learning_rate", s.learning_rate, LEARNING_RATE, "ten times that of full fine-tuning"
        ),
        schedule=pick("schedule", s.schedule, "cosine", "ends near zero, forgives a high start"),
        warmup_steps=0,
        weight_decay=pick("weight_decay", s.weight_decay, 0.0, "a low rank is restraint enough"),
        betas=(_or(s.beta1, 0.9), _or(s.beta2, 0.999)),
        epsilon=_or(s.epsilon, 1e-8),
        max_grad_norm=pick("max_grad_norm", s.max_grad_norm, 1.0, "the usual guard"),
        neftune_alpha=s.neftune_alpha,
        max_length=max_length,
        packing=packing,
        train_on=pick("train_on", s.train_on, "assistant", "the answers are what should change"),
        chat_template=files.digest(s.chat_template.encode()) if s.chat_template else None,
        columns={
            name: value
            for name in ("messages_column", "context_column", "response_column")
            if (value := getattr(s, name)) is not None
        },
        shuffle=_or(s.shuffle, True),
        train_share=_or(s.train_share, 1.0),
        global_batch=pick("global_batch", user_batch, *_batch(lengths, max_length, packing)),
        epochs=pick("epochs", s.epochs, EPOCHS, "three looks at each row"),
        steps=0,
        seed=_or(s.seed, 42),
        eval_steps=s.eval_steps,
        versions=versions,
    )
    if s.max_length is None:
        recipe = _shortened(recipe, base, device, spec, lengths, choices.reasons)
    if device.capability:
        major, minor = device.capability
        reason = f"the newest build of torch for compute capability {major}.{minor}"
        choices.reasons["engine"] = reason
    placement, fit = place(
        recipe, base, device, spec=spec, lengths=lengths, reasons=choices.reasons
    )
    return Plan(recipe, placement, device, choices.reasons, lengths, fit=fit)


def freeze(plan: Plan, spec: Spec, *, rows: int, data: tuple[str, ...]) -> Plan:
    """The complete plan, now that the data is packed into `rows` training rows.

    `data` holds the sha256 of each file, in order. From here on the run id is fixed.
    """
    recipe, reasons = plan.recipe, dict(plan.reasons)
    per_epoch = math.ceil(rows / recipe.global_batch)
    steps = spec.settings.max_steps or max(1, math.ceil(per_epoch * recipe.epochs))
    reasons["steps"] = (
        "set in the config"
        if spec.settings.max_steps
        else f"{rows:,} rows / {recipe.global_batch} a step x {recipe.epochs:g} epochs"
    )
    warmup = _or(spec.settings.warmup, WARMUP_SHARE)
    warmup_steps = math.ceil(warmup * steps) if isinstance(warmup, float) and warmup < 1 else warmup
    if spec.settings.warmup is None:
        reasons["warmup_steps"] = f"{WARMUP_SHARE:.0%} of the steps, so that Adam finds its scale"
    recipe = replace(recipe, steps=steps, warmup_steps=int(warmup_steps), data=data)
    return replace(plan, recipe=recipe, reasons=reasons, rows=rows)


def again(plan: Plan, recipe: Recipe, base: Base, spec: Spec, *, rows: int) -> Plan:
    """A plan that keeps the frozen `recipe` and places it on the device of `plan`."""
    placement, fit = place(
        recipe, base, plan.device, spec=spec, lengths=plan.lengths, reasons=plan.reasons
    )
    return replace(plan, recipe=recipe, placement=placement, rows=rows, fit=fit)


def place(
    recipe: Recipe,
    base: Base,
    device: Device,
    *,
    spec: Spec,
    lengths: Lengths | None,
    reasons: dict[str, str],
) -> tuple[Placement, Fit | None]:
    """How `device` carries out `recipe`: never changes the run id, may differ at each start.

    On a GPU, for a model whose memory is known, the fastest placement that fits. Raises SpecError
    (PLAN-120) when none does, with the smallest machine that would hold it.
    """
    settings = spec.settings
    micro_batch, checkpointing, fit = _unsized(recipe, settings, reasons), False, None
    attention = settings.attention or "sdpa"
    model = sizing.model(base.facts) if device.kind == "cuda" else None
    if model is not None:
        demand = _demand(recipe, settings, lengths)
        fit = sizing.best(model, demand, device.gpu, memory=device.memory_bytes)
        if fit is None:
            raise _does_not_fit(model, demand, base, device)
        micro_batch, checkpointing = fit.micro_batch, fit.checkpointing
        taken = f"{fit.ledger.total / 2**30:.1f} of {device.memory_bytes / 2**30:.1f} GiB"
        reasons["micro_batch"] = f"the fastest that fits: {taken}"
        why = "nothing smaller would fit" if checkpointing else "it fits without; saves a third"
        reasons["checkpointing"] = why
    elif device.kind == "cuda":
        checkpointing = True
        reasons["checkpointing"] = "nobody has sized this model: the careful way"
    if settings.checkpointing is not None:
        checkpointing = settings.checkpointing
        reasons["checkpointing"] = "set in the config"
    placement = Placement(
        device=device.kind,
        ranks=1,
        micro_batch=micro_batch,
        accumulation=recipe.global_batch // micro_batch,
        checkpointing=checkpointing,
        attention=attention,
        threads=_threads(base, device, reasons),
    )
    return placement, fit


def fallbacks(placement: Placement) -> list[Placement]:
    """`placement`, and what takes less memory, step by step: half the rows, then checkpointing.

    The global batch stays what it is, and so does the run id.
    """
    found = [placement]
    rows = placement.micro_batch * placement.accumulation
    while (last := found[-1]).micro_batch > 1:
        fewer = _divisor(rows, last.micro_batch // 2)
        found.append(replace(last, micro_batch=fewer, accumulation=rows // fewer))
    if not placement.checkpointing:
        found.append(replace(found[-1], checkpointing=True))
    return found


def disk_bytes(recipe: Recipe, base: Base) -> int:
    """Bytes that training leaves in the run directory at the most; 0 for an unknown family.

    Three checkpoints (two are kept while one is written) of weights and two moments, the adapter
    twice while it is put in place, and its image.
    """
    if base.facts is None:
        return 0
    chosen = [
        linear
        for linear in base.facts.linears
        if recipe.targets is None or linear.name.rpartition(".")[2] in recipe.targets
    ]
    a_layer = recipe.rank * sum(linear.inputs + linear.outputs for linear in chosen)
    layers = base.facts.layers if recipe.layers is None else len(recipe.layers)
    return a_layer * layers * 4 * (3 * 3 + 2 + 1)


def _threads(base: Base, device: Device, reasons: dict[str, str]) -> int | None:
    """Threads of one operator on a CPU; None leaves the choice to torch."""
    if device.kind == "cuda" or base.facts is None or base.facts.parameters >= SMALL_ON_CPU:
        return None
    reasons["threads"] = "operators of a model this small wait longer for threads than they work"
    return 1


def _unsized(recipe: Recipe, settings: Settings, reasons: dict[str, str]) -> int:
    """A micro-batch where memory is no question, or nobody knows the answer."""
    if settings.micro_batch:
        reasons["micro_batch"] = "set in the config"
        return _divisor(recipe.global_batch, settings.micro_batch)
    if recipe.packing:
        reasons["micro_batch"] = "a packed row is full as it is"
        return 1
    reasons["micro_batch"] = "a few rows at once, with little padding"
    return _divisor(recipe.global_batch, 4)


def _demand(recipe: Recipe, settings: Settings, lengths: Lengths | None) -> sizing.Demand:
    quantisation = recipe.quantisation or {}
    return sizing.Demand(
        method=recipe.method,
        precision=recipe.precision,
        rank=recipe.rank,
        dropout=recipe.dropout,
        optimizer=recipe.optimizer,
        attention="sdpa",
        double_quant=bool(quantisation.get("double", True)),
        targets=recipe.targets,
        length=recipe.max_length,
        rows=recipe.global_batch,
        packed=recipe.packing,
        span=lengths.mean if lengths else float(recipe.max_length),
        micro_batch=settings.micro_batch,
        checkpointing=settings.checkpointing,
    )


def _shortened(
    recipe: Recipe,
    base: Base,
    device: Device,
    spec: Spec,
    lengths: Lengths | None,
    reasons: dict[str, str],
) -> Recipe:
    """The recipe with rows short enough for the GPU, where the user left their length to us."""
    model = sizing.model(base.facts) if device.kind == "cuda" else None
    if model is None:
        return recipe
    whole = recipe
    while recipe.max_length > SHORTEST:
        demand = _demand(recipe, spec.settings, lengths)
        if sizing.smallest(model, demand, device.gpu).fits(device.memory_bytes):
            return recipe
        reasons["max_length"] = f"{whole.max_length} would not fit the memory of {device.name}"
        recipe = replace(recipe, max_length=recipe.max_length // 2)
        if spec.settings.micro_batch is None and spec.settings.accumulation is None:
            batch, reasons["global_batch"] = _batch(lengths, recipe.max_length, recipe.packing)
            recipe = replace(recipe, global_batch=batch)
    return recipe


def _does_not_fit(
    model: sizing.Model, demand: sizing.Demand, base: Base, device: Device
) -> SpecError:
    least = sizing.smallest(model, demand, device.gpu).ledger
    terms = sorted(least.terms.items(), key=lambda term: -term[1])[:2]
    largest = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in terms)
    free = device.memory_bytes / 2**30
    cloud = next((m.cloud for m in presets.instances() if m.name == device.origin), None)
    machine = sizing.smallest_machine(model, demand, cloud=cloud)
    changes = []
    if machine is not None:
        changes.append(f"use {machine.name} ({machine.gpus} x {machine.gpu.name}) or larger")
    smaller = replace(demand, method="qlora")
    if demand.method == "lora" and sizing.smallest(model, smaller, device.gpu).fits(
        device.memory_bytes
    ):
        changes.append("or method qlora, which fits here")
    return SpecError.at(
        "PLAN-120",
        base.name,
        f"does not fit {device.name}: {demand.method} with rows of {demand.length} tokens takes "
        f"at least {least.total / 2**30:.1f} GiB ({largest}), and {free:.1f} GiB are there",
        ", ".join(changes) or "choose a smaller model: no known machine holds this one on a GPU",
    )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is not above `at_most`."""
    return next(n for n in range(min(number, max(1, at_most)), 0, -1) if number % n == 0)


def _precision(device: Device) -> tuple[str, str]:
    if device.bf16:
        return "bfloat16", f"{device.name} computes in bfloat16"
    if device.kind == "cuda":
        return "float16", f"{device.name} has no bfloat16 (compute capability below 8.0)"
    return "float32", "this processor has no bfloat16 instructions"


def _quantisation(spec: Spec, precision: str, pick: Callable[..., Any]) -> dict[str, Any] | None:
    if spec.method != "qlora":
        return None
    s = spec.settings
    return {
        "type": pick("quant_type", s.quant_type, "nf4", "fits normally distributed weights best"),
        "double": pick("double_quant", s.double_quant, True, "saves 0.37 bits a weight"),
        "compute": s.compute_dtype or precision,
    }


@dataclass(frozen=True)
class Packing:
    """What turns tokenised rows into training rows; no GPU has a say in it."""

    packing: bool
    max_length: int
    shuffle: bool
    seed: int
    train_share: float
    reasons: dict[str, str] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, recipe: Recipe) -> Packing:
        """That of a recipe."""
        r = recipe
        return cls(r.packing, r.max_length, r.shuffle, r.seed, r.train_share)


def packing(spec: Spec, base: Base, lengths: Lengths) -> Packing:
    """The packing that `make` would put into the recipe on any device. Raises SpecError."""
    s, choices = spec.settings, _Choices()
    packed, max_length = _rows(spec, base, lengths, choices.pick)
    return Packing(
        packed,
        max_length,
        _or(s.shuffle, True),
        _or(s.seed, 42),
        _or(s.train_share, 1.0),
        choices.reasons,
    )


def _rows(
    spec: Spec, base: Base, lengths: Lengths | None, pick: Callable[..., Any]
) -> tuple[bool, int]:
    """Whether rows are packed, and how many tokens a training row holds at most."""
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


def _packing(user: bool | None, base: Base, pick: Callable[..., Any]) -> bool:
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
    wanted = 1 << math.ceil(math.log2(max(lengths.longest, pack)))
    if wanted > context:
        return context, f"all the model reads; the longest row has {lengths.longest:,} tokens"
    return wanted, f"holds the longest row ({lengths.longest:,} tokens) and some of mean length"


def _batch(lengths: Lengths | None, max_length: int, packing: bool) -> tuple[int, str]:
    if lengths is None or not packing:
        return BATCH_ROWS, f"{BATCH_ROWS} rows a step are the usual for LoRA"
    packed = max(1, round(BATCH_ROWS * lengths.mean / max_length))
    rows = packed * max_length / lengths.mean
    return packed, f"about {rows:.0f} rows of mean length ({lengths.mean:.0f} tokens) a step"


LARGEST_ON_CPU = 10**9  # parameters; a step of a larger model takes minutes without a GPU


def refuse_unsupported(spec: Spec, base: Base, device: Device) -> None:
    """Raise SpecError, with all reasons, for model, method and device that do not go together."""
    problems = []
    if base.facts and not (answer := presets.support(base.facts, spec.method)).supported:
        problems.append(Problem("PLAN-101", base.name, answer.reason, answer.change))
    if device.kind == "cpu" and base.facts and base.facts.parameters > LARGEST_ON_CPU:
        billions = base.facts.parameters / 1e9
        problems.append(
            Problem(
                "PLAN-102",
                base.name,
                f"has {billions:.1f} billion parameters and needs a GPU; there is none here",
                "run on a machine with an NVIDIA GPU and its driver (nvidia-smi must answer), or "
                "plan for one with --instance",
            )
        )
    if device.gpu and not (answer := presets.gpu_support(device.gpu, spec.method)).supported:
        problems.append(Problem("PLAN-106", device.origin, answer.reason, answer.change))
    if problems:
        raise SpecError(problems)


class Unknown(SpecError):
    """The base model's shape is not known without the network."""


def draft(spec: Spec, *, here: Device) -> Plan:
    """The plan that the spec alone allows: no data, no weights, no network.

    Sized for the spec's machine type if it names one, else for the device `here`. Raises SpecError,
    with code PLAN-107 for a hub model that is not among the presets: its shape is not known here.
    """
    device = device_of(spec.instance) if spec.instance else here
    return make(spec, known_base(spec), device, lengths=None, versions={})


def known_base(spec: Spec) -> Base:
    """The base model as far as it is known without the network. Raises Unknown, SpecError."""
    name = spec.base_model or spec.preset
    if name.startswith("oci:"):  # an image with the preset's weights
        name = spec.preset
    folder = Path(name)
    if spec.base_model and folder.is_dir():
        try:
            config = files.read_json(folder / "config.json")
        except (OSError, ValueError) as error:
            raise SpecError.at(
                "PLAN-108",
                str(folder / "config.json"),
                f"cannot be read ({error.__class__.__name__})",
                "name a folder with config.json, *.safetensors and a tokenizer",
            ) from None
        return base_from_config(spec.preset, "local", config)
    if preset := presets.find(name):
        return Base(preset.hub_id, spec.settings.revision or preset.revision, preset.facts)
    raise Unknown.at(
        "PLAN-107",
        name,
        "is not among the presets, so its shape is not known without the network",
        "plan with --base-model FOLDER, or let `run` fetch its config first",
    )


def device_of(instance: str) -> Device:
    """The device that a machine type has. Raises SpecError for an unknown one."""
    machine = presets.instance(instance)
    return Device(
        kind="cuda",
        name=machine.gpu.name,
        count=machine.gpus,
        memory_bytes=machine.memory_bytes,
        bf16=machine.gpu.bf16,
        capability=machine.gpu.capability,
        origin=machine.name,
        gpu=machine.gpu,
    )
