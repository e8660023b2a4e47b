"""How one machine runs a recipe: never changes the run id, may differ at each start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tuning.errors import SpecError
from tuning.plan import backends, choices, memory, refusal, sharding, sizing, spare
from tuning.plan.activations import ALL, INPUTS, Activations
from tuning.plan.base import Base
from tuning.plan.choices import batch
from tuning.plan.coefficients import Variant
from tuning.plan.device import Device
from tuning.plan.fallbacks import divisor
from tuning.plan.sharding import Layout, layouts
from tuning.plan.sizing import Fit
from tuning.plan.values import Lengths, Placement, Recipe
from tuning.spec import Settings, Spec

SMALL_ON_CPU = 50 * 10**6  # parameters
# what `place` gives reasons for; what is not among them is the recipe's
REASONED = (
    *("ranks", "shards", "micro_batch", "checkpointing", "activation_offloading", "unpacked_layer"),
    *("constants", "attention", "kernels", "speed", "threads"),
)
SHORTEST = 512  # tokens of a row that is shortened to fit a GPU


def place(
    recipe: Recipe,
    base: Base,
    device: Device,
    *,
    spec: Spec,
    lengths: Lengths | None,
    reasons: dict[str, str],
) -> tuple[Placement, Fit | None]:
    """The placement of `recipe` on `device`, and its memory and speed where they are known.

    On a GPU, for a model of known memory, the fastest placement that fits; on a CPU the usual one,
    or the next smaller that fits. Raises SpecError (PLAN-120) when none does, naming the smallest
    machines that would.
    """
    settings, model = spec.settings, base.sized(device)
    ranks, nodes = _ranks(recipe.global_batch, device, reasons)
    share = recipe.global_batch // ranks  # rows of each rank in a step
    layout, whole = Layout(ranks, nodes), _whole_only(recipe, base, settings)
    if settings.sharding is not None:
        (layout,) = layouts(ranks, nodes, settings.sharding)
    _refuse_offload(settings)
    micro_batch, kept, fit = _unsized(recipe, settings, share, reasons), ALL, None
    wide = False
    backend = _backend(recipe, base, device, settings, reasons)
    demand = _demand(recipe, settings, lengths, device, backend, layout=layout, whole=whole)
    if model is not None and sizing.knows(model, demand):
        fit = _fit(model, demand, base, device, micro_batch, reasons)
        fit, wide = spare.with_constants(fit, model, demand, device, reasons)
        if backends.LORA in backend.kernels:
            fit = spare.with_unpacked(fit, model, demand, device, reasons)
        reasons["micro_batch"] = _taken(fit, model, demand, device)
        micro_batch, kept, layout = fit.micro_batch, fit.activations, fit.layout
    elif device.kind == "cuda":
        kept = INPUTS
        unsized = base.unsized or "this model's memory is unknown"
        reasons["checkpointing"] = f"{unsized}: the safe choice"
    if settings.checkpointing is not None:
        if kept.checkpointing != settings.checkpointing:
            kept = INPUTS if settings.checkpointing else ALL
        reasons["checkpointing"] = "set in the config"
    if settings.activation_offloading is not None:
        kept = _forced(kept, device, reasons) if settings.activation_offloading else kept
    if ranks > 1 and settings.sharding is not None:
        reasons["shards"] = "set in the config (fsdp)"
    elif ranks > 1 and whole:
        reasons["shards"] = f"the only way with {whole}"
    placement = Placement(
        device=device.kind,
        ranks=ranks,
        micro_batch=micro_batch,
        accumulation=share // micro_batch,
        checkpointing=kept.checkpointing,
        attention=backend.attention,
        kernels=backends.without_copies(backend.kernels) if kept.offload else backend.kernels,
        threads=_threads(base, device, reasons),
        nodes=nodes,
        shards=layout.shards,
        offload=layout.offload,
        recomputed_layers=kept.recomputed,
        activation_offloading=kept.offload,
        tiled_mlp=kept.tiled,
        host_embeddings=kept.host_embeddings,
        unpacked_layer=kept.unpacked,
        float_constants=wide,
    )
    return placement, fit


def _refuse_offload(settings: Settings) -> None:
    """Raise SpecError where inputs of layers are to be offloaded, and all else to be kept."""
    if settings.activation_offloading and settings.checkpointing is False:
        raise SpecError.at(
            "PLAN-150",
            "TrainingArguments.activation_offloading",
            "is true, and gradient_checkpointing false: only inputs of checkpointed layers go to "
            "host memory",
            "leave out gradient_checkpointing, or activation_offloading",
        )


def _forced(kept: Activations, device: Device, reasons: dict[str, str]) -> Activations:
    """`kept` with layer inputs in host memory, as the config says."""
    if device.kind == "cpu":
        reasons["activation_offloading"] = "ignored: it is for GPUs"
        return kept
    reasons["activation_offloading"] = "set in the config"
    return replace(kept, checkpointing=True, recomputed=None, offload=True)


def _fit(
    model: sizing.Model,
    demand: sizing.Demand,
    base: Base,
    device: Device,
    micro_batch: int,
    reasons: dict[str, str],
) -> Fit:
    """The placement of `demand` on `device`, of `micro_batch` rows or fewer on a CPU."""
    free = device.rank_bytes
    every = demand.layouts(demand.layout.ranks, demand.layout.nodes)
    if device.kind == "cuda":
        fit = _best(model, demand, device, every)
    else:
        ways = [replace(demand, layout=layout) for layout in every]
        fits = (sizing.first(model, way, micro_batch, free_bytes=free) for way in ways)
        fit = next((fit for fit in fits if fit), None)
    if fit is None:
        raise refusal.of(model, demand, base, device)
    if fit.seconds_per_token is not None:
        reasons["speed"] = "a roofline from the card's datasheet; the run measures it"
        if device.nodes > 1 and device.network is None:
            reasons["speed"] += "; a network of 10 Gbit/s between the machines is assumed"
    reasons["checkpointing"] = "it fits without; saves a third"
    if fit.checkpointing:
        without = replace(demand, layout=fit.layout, checkpointing=False, micro_batch=None)
        larger = sizing.smallest(model, without, device.gpu).fits(free, device.host_bytes)
        reasons["checkpointing"] = "nothing smaller would fit"
        if fit.activations.recomputed is not None:
            reasons["checkpointing"] = "the last layers keep theirs, as many as fit: faster"
        if larger and demand.checkpointing is None:
            reasons["checkpointing"] = "with it more rows fit at once, which is faster"
    if fit.activations.offload:
        what = "layer inputs" + (" and embeddings" if fit.activations.host_embeddings else "")
        reasons["activation_offloading"] = (
            f"nothing faster fits: {what} in {fit.host_bytes / 2**30:.1f} GiB of host memory"
        )
    if fit.layout.ranks > 1:
        reasons["shards"] = _why_shared(model, demand, device, fit)
    return fit


def _taken(fit: Fit, model: sizing.Model, demand: sizing.Demand, device: Device) -> str:
    """What the placement takes of the device's memory, in words."""
    how = "the fastest that fits" if device.kind == "cuda" else "fits"
    taken, free = fit.memory.total / 2**30, device.rank_bytes / 2**30
    words = f"{how}: {taken:.1f} of {free:.1f} GiB"
    if demand.repacks:
        copy = memory.repacked(model.coefficients) / 2**30
        words += f", {copy:.1f} of it for a weight that oneDNN repacks"
    return words


def _whole_only(recipe: Recipe, base: Base, settings: Settings) -> str:
    """What trains only with the whole model on each rank. Raises SpecError if shares are asked."""
    kind = base.facts.model_type if base.facts else base.config.get("model_type")
    whole = sharding.whole_only(kind, dora=recipe.dora, optimizer=recipe.optimizer)
    if whole and settings.sharding not in (None, "no_shard"):
        raise SpecError.at(
            "PLAN-119",
            "TrainingArguments.fsdp",
            f"is {settings.sharding}, but with {whole} each GPU holds the whole model",
            "set it to no_shard, or leave it out",
        )
    return whole


def _best(
    model: sizing.Model, demand: sizing.Demand, device: Device, every: Sequence[Layout]
) -> Fit | None:
    free, host = device.rank_bytes, device.host_bytes
    return sizing.best(
        model, demand, device.gpu, free_bytes=free, host_bytes=host, layouts=tuple(every)
    )


def _why_shared(model: sizing.Model, demand: sizing.Demand, device: Device, fit: Fit) -> str:
    """Why each GPU holds the whole model, or a part of it."""
    whole = replace(demand, layout=replace(fit.layout, shards=1, offload=False))
    copy = sizing.best(
        model, whole, device.gpu, free_bytes=device.rank_bytes, host_bytes=device.host_bytes
    )
    if fit.layout.shards == 1:
        return "the whole model fits, and nothing of it is sent between them"
    if copy is None:
        least = sizing.smallest(model, whole, device.gpu).memory.total / 2**30
        reason = f"a whole copy takes at least {least:.1f} of {device.rank_bytes / 2**30:.1f} GiB"
        if fit.layout.offload:
            return f"{reason}, and no other way fits: slow, as all is copied from host memory"
        return reason
    if copy.seconds_per_token and fit.seconds_per_token:
        gain = copy.seconds_per_token / fit.seconds_per_token - 1
        if gain >= 0.005:
            return f"{gain:.0%} faster than whole copies, which leave less memory for rows"
    return "it fits better than whole copies"


def wants_simulation(base: Base, device: Device, spec: Spec) -> bool:
    """Whether only a simulation can tell whether what `spec` asks for fits `device`."""
    small = base.facts is not None and base.facts.parameters < SMALL_ON_CPU
    model = base.sized(device)
    if model is None:
        return not (device.kind == "cpu" and small)
    plain = [variant for variant in variants(spec, base, device) if not variant.tiled]
    return not all(memory.knows(model.coefficients, variant) for variant in plain)


def variants(spec: Spec, base: Base, device: Device) -> list[Variant]:
    """The variants that a plan for `device` chooses among."""
    settings = spec.settings
    precision = settings.dtype or choices.precision(device)[0]
    dropout = settings.dropout or 0.0
    dora = bool(settings.dora)
    backend = backends.choose(
        settings,
        base.facts,
        device,
        precision=precision,
        dropout=dropout,
        dora=dora,
        reasons={},
        kind=base.kind,
    )
    usual = Variant(
        spec.method,
        precision,  # type: ignore[arg-type]
        backend.sized_as,
        False,
        dropout > 0,
        device.kind,
        fused=bool(backend.kernels),
    )
    found = [usual, replace(usual, checkpointing=True)]
    dense = base.facts is None or not base.facts.experts
    if device.kind == "cuda" and dense and usual.fused and not usual.dropout:
        found.append(replace(usual, checkpointing=True, tiled=True))
    return found


def disk_bytes(recipe: Recipe, base: Base) -> int:
    """Most bytes that training writes to the run directory; 0 for an unknown family.

    Three checkpoints (two are kept while one is written) of weights and two optimizer moments, the
    adapter twice while it is put in place, and its image.
    """
    if base.facts is None:
        return 0
    numbers = recipe.rank * base.facts.adapter(recipe.targets)
    share = 1.0 if recipe.layers is None else len(recipe.layers) / base.facts.layers
    return round(numbers * share) * 4 * (3 * 3 + 2 + 1)


def _threads(base: Base, device: Device, reasons: dict[str, str]) -> int | None:
    """Intra-op threads on a CPU; None leaves the choice to torch."""
    if device.kind == "cuda" or base.facts is None or base.facts.parameters >= SMALL_ON_CPU:
        return None
    reasons["threads"] = "operators of a model this small wait longer for threads than they compute"
    return 1


def _ranks(rows: int, device: Device, reasons: dict[str, str]) -> tuple[int, int]:
    """Processes that share the rows of a step, and their machines: the most that divide them.

    As many on each machine.
    """
    ranks, nodes = max(
        (nodes * each, nodes)
        for nodes in range(1, device.nodes + 1)
        for each in range(1, device.count + 1)
        if rows % (nodes * each) == 0
    )
    if device.ranks > 1:
        one = "one for each GPU" if device.kind == "cuda" else "as many as asked for"
        reasons["ranks"] = f"{one}: each trains different rows of a step"
        if ranks < device.ranks:
            things = "GPUs" if device.kind == "cuda" else "processes"
            reasons["ranks"] = f"{device.ranks} {things} do not divide {rows} rows a step"
        if device.odd:
            reasons["ranks"] += f"; {device.odd}, unless you set {device.without}"
    return ranks, nodes


def _unsized(recipe: Recipe, settings: Settings, share: int, reasons: dict[str, str]) -> int:
    """The micro-batch before memory is considered, or where it is unknown."""
    if settings.micro_batch:
        reasons["micro_batch"] = "set in the config"
        return divisor(share, settings.micro_batch)
    if recipe.packing:
        reasons["micro_batch"] = "a packed row is full as it is"
        return 1
    reasons["micro_batch"] = "a few rows at once, with little padding"
    return divisor(share, 4)


def _backend(
    recipe: Recipe, base: Base, device: Device, settings: Settings, reasons: dict[str, str]
) -> backends.Backend:
    backend = backends.choose(
        settings,
        base.facts,
        device,
        precision=recipe.precision,
        dropout=recipe.dropout,
        dora=recipe.dora,
        reasons=reasons,
        kind=base.kind,
    )
    own = base.kind is not None and base.kind.own_head
    backend = replace(backend, own_head=own)
    if not (own or recipe.objective) or backends.HEAD not in backend.kernels:
        return backend
    what = "loss by the model's own head" if own else "log-probabilities of answers by trl's head"
    reasons["kernels"] += f"; {what}"
    return replace(backend, kernels=tuple(k for k in backend.kernels if k != backends.HEAD))


def _demand(
    recipe: Recipe,
    settings: Settings,
    lengths: Lengths | None,
    device: Device,
    backend: backends.Backend,
    *,
    layout: Layout,
    whole: str,
) -> sizing.Demand:
    quantisation, rows = recipe.quantisation or {}, recipe.global_batch // layout.ranks
    return sizing.Demand(
        method=recipe.method,
        precision=recipe.precision,
        rank=recipe.rank,
        dropout=recipe.dropout,
        optimizer=recipe.optimizer,
        attention=backend.sized_as,
        fused=bool(backend.kernels),
        double_quant=bool(quantisation.get("double", True)),
        targets=recipe.targets,
        length=recipe.max_length,
        answers=recipe.answers,
        compares=recipe.objective is not None,
        own_head=backend.own_head,
        rows=rows,
        layout=layout,
        network=device.network,
        sharding=settings.sharding,
        whole=whole,
        new_tokens=bool(recipe.new_tokens),
        packed=recipe.packing,
        device=device.kind,
        repacks=device.kind == "cpu" and device.bf16 and recipe.precision != "float32",
        span=lengths.mean if lengths else float(recipe.max_length),
        micro_batch=divisor(rows, settings.micro_batch) if settings.micro_batch else None,
        checkpointing=settings.checkpointing,
        offloads=settings.activation_offloading,
    )


def shortened(
    recipe: Recipe,
    base: Base,
    device: Device,
    spec: Spec,
    lengths: Lengths | None,
    reasons: dict[str, str],
) -> Recipe:
    """The recipe with rows short enough for the GPU, where the user did not set their length."""
    model = base.sized(device)
    if model is None:
        return recipe
    original, backend = recipe, _backend(recipe, base, device, spec.settings, {})
    while recipe.max_length > SHORTEST:
        ranks, nodes = _ranks(recipe.global_batch, device, {})
        layout = Layout(ranks, nodes)
        whole = _whole_only(recipe, base, spec.settings)
        demand = _demand(
            recipe, spec.settings, lengths, device, backend, layout=layout, whole=whole
        )
        demand = replace(demand, micro_batch=demand.micro_batch or 1)
        if not sizing.knows(model, demand):
            return recipe
        every = demand.layouts(ranks, nodes)
        if _best(model, demand, device, every) is not None:
            return recipe
        reasons["max_length"] = f"{original.max_length} would not fit the memory of {device.name}"
        recipe = replace(recipe, max_length=max(SHORTEST, recipe.max_length // 2))
        if spec.settings.micro_batch is None and spec.settings.accumulation is None:
            rows, reasons["global_batch"] = batch(
                lengths, recipe.max_length, recipe.packing, device.ranks
            )
            recipe = replace(recipe, global_batch=rows)
    return recipe
