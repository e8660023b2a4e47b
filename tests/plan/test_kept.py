"""What is kept of the activations: the order of ways, memory of GPU and host, words, fallbacks."""

import contextlib
import itertools
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import tuning.plan as plan
from benchmarks import longest_rows
from tuning import presets
from tuning.errors import SpecError
from tuning.plan import Base, Lengths, sizing
from tuning.plan.activations import ALL, INPUTS, LOOKED_UP, OFFLOADED, TILED, Activations, on_host
from tuning.plan.coefficients import preset_coefficients
from tuning.plan.device import Device
from tuning.plan.sharding import ALONE, Layout
from tuning.spec import Destination, Settings, Source, Spec

GIB = 1 << 30
ROOT = Path(__file__).parents[2]
PRESET = presets.find("llama-3.1-8b-instruct")
MODEL = sizing.Model(PRESET.facts, preset_coefficients(PRESET.name))
BASE = Base(PRESET.hub_id, PRESET.revision, PRESET.facts)
DEMAND = replace(longest_rows.DEMAND, rank=16)
CARD = presets.gpu("RTX-4090")


def at(length, **changes):
    return replace(DEMAND, length=length, span=float(length), **changes)


SPEC = Spec(
    name="t",
    preset=PRESET.name,
    method="qlora",
    source=Source(urls=("https://h.example/d",)),
    destination=Destination(image="r.example/x:1"),
)


def made(card_gib, length, host_gib=None, **settings):
    chosen = Settings(max_length=length, micro_batch=1, accumulation=1, **settings)
    spec = replace(SPEC, settings=chosen)
    host = None if host_gib is None else host_gib * GIB
    device = Device("cuda", "card", 1, card_gib * GIB, True, (8, 9), gpu=CARD, host_bytes=host)
    lengths = Lengths(rows=100, tokens=100 * length, longest=length)
    return plan.make(spec, BASE, device, lengths=lengths, versions={})


def test_a_longer_row_takes_the_next_way_only_where_the_last_does_not_fit():
    """All kept, some layers recomputed, all; on the host inputs; MLPs in tiles; embeddings."""
    order, seen = [ALL, Activations(True, 1), INPUTS, OFFLOADED, TILED, LOOKED_UP], []
    for length in range(1024, 150_000, 512):
        fit = sizing.best(MODEL, at(length), CARD, free_bytes=24 * GIB)
        if fit is None:
            break
        kept = fit.activations
        seen.append(replace(kept, recomputed=None if kept.recomputed is None else 1))
        assert fit.memory.total <= 24 * GIB * (1 - sizing.HEADROOM)
    assert order == sorted(set(seen), key=order.index) and seen == sorted(seen, key=order.index)


def test_as_few_layers_are_recomputed_as_fit_and_each_costs_time():
    """One layer less would not fit; the time lies between that of none and of all."""
    before = 0
    for length in range(6_000, 31_000, 3_000):
        keeping, all_of = (
            next(iter(sizing.placements(MODEL, at(length), CARD, (kept,))))
            for kept in (ALL, INPUTS)
        )
        fit = sizing.best(MODEL, at(length), CARD, free_bytes=24 * GIB)
        recomputed = fit.activations.recomputed
        assert recomputed is not None and recomputed >= before
        before, free = recomputed, 24 * GIB * (1 - sizing.HEADROOM)
        more = all_of.memory.towards(keeping.memory, (33 - recomputed) / 32)
        assert fit.memory.total <= free < more.total
        assert keeping.seconds_per_token < fit.seconds_per_token < all_of.seconds_per_token


def test_pinned_memory_counts_against_the_machine():
    """A machine without it gets shorter rows, and refuses what it cannot hold; the words say so."""
    length = 60_000
    taken = made(24, length)
    assert taken.placement.activation_offloading and not taken.placement.tiled_mlp
    pinned = on_host(32, length, 4096, 2)
    assert pinned == taken.fit.host_bytes == taken.to_json()["memory"]["host"] == 16 * GIB
    assert "16.0 GiB of host memory" in taken.reasons["activation_offloading"]
    assert made(24, length, 20).placement == taken.placement
    with pytest.raises(SpecError, match=r"PLAN-120 .*of a machine's host memory 17.0 of 19.9 GiB"):
        made(24, length, 19.9)
    assert made(24, 30_000, 1).placement.checkpointing


def test_offload_costs_little_and_tiles_more():
    """A few per cent, as others report, where a card computes longer than it copies."""
    offloaded, tiled, inputs = (
        next(iter(sizing.placements(MODEL, at(20_000), CARD, (kept,)))).seconds_per_token
        for kept in (OFFLOADED, TILED, INPUTS)
    )
    assert 1.01 < offloaded / inputs < 1.04
    assert offloaded < tiled < 1.1 * offloaded


def test_the_config_decides_and_the_run_id_does_not_know():
    """True takes it on a large card, false never; neither changes the recipe."""
    free, forced = made(80, 4096), made(80, 4096, activation_offloading=True)

    assert not free.placement.activation_offloading
    assert forced.placement.activation_offloading and forced.placement.checkpointing
    assert "set in the config" == forced.reasons["activation_offloading"]
    assert forced.fit.host_bytes and asdict(free.recipe) == asdict(forced.recipe)
    with pytest.raises(SpecError, match=r"PLAN-120 .*leave out TrainingArguments.activation_off"):
        made(24, 60_000, activation_offloading=False)
    with pytest.raises(SpecError, match="PLAN-150"):
        made(80, 4096, activation_offloading=True, checkpointing=False)


def test_constants_are_unpacked_where_there_is_room():
    """It never takes the place of anything, is told, and counted; single quantisation has none."""
    bits = 0.5 - 8 / 64 - 32 / (64 * 256)  # of memory for a weight
    for gib, length in itertools.product((8, 12, 24, 80), (512, 4096, 16_384)):
        try:
            planned = made(gib, length)
        except SpecError:
            continue
        kept, limit = planned.placement.float_constants, gib * GIB * (1 - sizing.HEADROOM)
        total = planned.fit.memory.total
        more = MODEL.coefficients.packed * bits / 8
        assert kept == ("constants" in planned.reasons)
        assert total <= limit if kept else total + more * 1.01 > limit
        assert planned.fit.memory.constants == pytest.approx(
            MODEL.coefficients.packed / 8 * (0.5 if kept else 0.5 - bits), rel=0.01
        )
    assert made(80, 4096).placement.float_constants
    assert not made(80, 4096, double_quant=False).placement.float_constants


def test_a_layers_weights_stay_unpacked_where_there_is_room():
    """Only where it is computed again and packed; it takes the place of nothing, and is counted."""
    layer = MODEL.coefficients.packed // 32 * 2
    for gib, length in itertools.product((8, 12, 24), (512, 2048, 8192, 16_384, 60_000)):
        try:
            planned = made(gib, length)
        except SpecError:
            continue
        kept, fit = planned.placement.activations, planned.fit
        limit = gib * GIB * (1 - sizing.HEADROOM)
        assert kept.unpacked == planned.placement.unpacked_layer
        assert kept.unpacked == ("unpacked_layer" in planned.reasons)
        assert fit.memory.total <= limit
        assert f": {fit.memory.total / GIB:.1f} of {gib:.1f} GiB" in planned.reasons["micro_batch"]
        if kept.unpacked:
            assert kept.checkpointing and not kept.tiled and fit.memory.dequantisation >= layer
        elif kept.checkpointing and not kept.tiled:
            assert fit.memory.total + layer > limit
    assert made(24, 16_384).placement.unpacked_layer
    assert not made(80, 2048).placement.unpacked_layer
    assert not made(24, 8192, dropout=0.1).placement.unpacked_layer


def test_out_of_memory_ends_with_host_memory_and_tiles():
    """After fewer rows and all layers recomputed; not what the machine's memory cannot hold."""
    placed = plan.Placement("cuda", 1, 2, 2, True, "sdpa", recomputed_layers=7)
    placed = replace(placed, float_constants=True, unpacked_layer=True)

    ways = plan.fallbacks(placed, offload=True)
    assert [True, False, False, False, False] == [way.float_constants for way in ways]
    assert [True, False, False, False, False] == [way.unpacked_layer for way in ways]
    assert 2 == len(plan.fallbacks(replace(ways[-1], float_constants=True)))
    kept = [way.activations for way in ways]
    assert [Activations(True, 7, unpacked=True), INPUTS, INPUTS, OFFLOADED, TILED] == kept
    assert [2, 2, 1, 1, 1] == [way.micro_batch for way in ways]
    assert [] == plan.fallbacks(ways[-1], offload=True)[1:]
    assert not any(way.activation_offloading for way in plan.fallbacks(placed))
    assert [*ways, replace(ways[-1], host_embeddings=True)] == plan.fallbacks(
        placed, offload=True, looks_up=True
    )

    assert made(24, 8192).offloads and not made(24, 8192, 1).offloads
    assert made(24, 8192).looks_up and not made(24, 8192, 1).looks_up


def test_embeddings_are_looked_up_on_the_host_only_if_nothing_else_needs_them():
    """Their bytes go from one side to the other; not those of an output layer or of new tokens."""
    free = 8 * GIB
    longest = sizing.longest(MODEL, at(1 << 20), CARD, free_bytes=free)
    tiled = next(iter(sizing.placements(MODEL, at(longest), CARD, (TILED,))))
    fit = sizing.best(MODEL, at(longest), CARD, free_bytes=free)

    assert LOOKED_UP == fit.activations and not tiled.fits(free)
    moved = 128_256 * 4096 * 2
    assert moved == tiled.memory.weights - fit.memory.weights
    assert moved == fit.memory.host - tiled.memory.host
    assert not sizing.best(MODEL, at(longest), CARD, free_bytes=free, host_bytes=moved)
    planned = made(8, longest)
    assert planned.placement.host_embeddings
    assert "layer inputs and embeddings in" in planned.reasons["activation_offloading"]
    assert "input embeddings in host memory" in planned.placement.activations.text

    for model, demand in (
        (MODEL, at(longest, new_tokens=True)),
        (replace(MODEL, facts=replace(MODEL.facts, tied=True)), at(longest)),
    ):
        assert not sizing.best(model, demand, CARD, free_bytes=free)
        assert sizing.longest(model, demand, CARD, free_bytes=free) < longest


def test_ranks_that_each_hold_the_model_keep_their_embeddings():
    """DDP holds on to every parameter that it has seen, also to those that are taken away."""
    free, demand = 8 * GIB, at(4096, rows=2)
    alone = sizing.longest(MODEL, at(1 << 20), CARD, free_bytes=free)
    two = replace(demand, length=alone, span=float(alone), layout=Layout(2))
    assert sizing.best(MODEL, replace(two, layout=ALONE), CARD, free_bytes=free)
    assert not sizing.best(MODEL, two, CARD, free_bytes=free)


def test_embeddings_need_their_host_memory_after_out_of_memory_too():
    """Two tables of one place: the inputs of the layers lie there as well."""
    length = 8192
    inputs = on_host(32, length, 4096, 2) / GIB
    needed = (inputs + 128_256 * 4096 * 2 / GIB) / sizing.HOST_SHARE
    assert made(24, length, needed * 1.01).looks_up
    less = made(24, length, needed * 0.99)
    assert less.offloads and not less.looks_up


@pytest.mark.parametrize("preset", ["qwen3-32b", "qwen2.5-32b-instruct", "llama-3.3-70b-instruct"])
@pytest.mark.parametrize("machine", ["g6.2xlarge", "Standard_NC24ads_A100_v4", "g2-standard-48"])
def test_no_other_layout_of_the_ranks_is_faster(preset, machine):
    """Whatever has to lie in host memory for it: what is taken is as fast as what can be asked."""
    facts = presets.find(preset)
    spec = replace(SPEC, preset=preset, settings=Settings(max_length=1024))
    base, lengths = Base(facts.hub_id, facts.revision, facts.facts), Lengths(10_000, 10**7, 2000)
    speeds = {}
    for sharding in (None, "no_shard", "full_shard"):
        asked = replace(spec, settings=replace(spec.settings, sharding=sharding))
        with contextlib.suppress(SpecError):
            planned = plan.make(
                asked, base, plan.device_of(machine, 2), lengths=lengths, versions={}
            )
            speeds[sharding] = planned.tokens_per_second
            assert "-" not in planned.reasons["shards"].partition("%")[0]
    if speeds:
        assert speeds[None] >= 0.999 * max(speeds.values())


def test_a_frozen_recipe_on_another_machine_has_the_reasons_of_its_own_placement():
    """Nothing of the fresh plan's is left that is not so."""
    small, large = made(8, 4096, 64), made(80, 2048)
    frozen = plan.freeze(small, SPEC, rows=100, data=("x",)).recipe
    again = plan.resume(large, frozen, BASE, SPEC, rows=100)

    assert 4096 == again.recipe.max_length
    assert "as this run began" == again.reasons["max_length"] == again.reasons["steps"]
    for name, there in (
        ("activation_offloading", again.placement.activation_offloading),
        ("unpacked_layer", again.placement.unpacked_layer),
        ("constants", again.placement.float_constants),
    ):
        assert there == (name in again.reasons)


def test_a_machine_that_is_named_holds_what_is_asked_also_in_host_memory():
    """With inputs of layers in host memory, as the config says."""
    wanted = {"activation_offloading": True, "max_length": 100_000}
    spec = replace(SPEC, method="lora", settings=Settings(**wanted))
    with pytest.raises(SpecError, match="PLAN-120") as refused:
        plan.make(spec, BASE, plan.device_of("g6.xlarge"), lengths=None, versions={})
    named = re.search(r"use (\S+) \(\d+ x", str(refused.value))[1]
    assert plan.make(spec, BASE, plan.device_of(named), lengths=None, versions={}).fit


def test_a_host_that_may_not_be_used_is_not_after_out_of_memory_either():
    """`activation_offloading: false` holds for the ways that are tried then."""
    free = made(24, 8192)
    kept = made(24, 8192, activation_offloading=False)

    assert free.offloads and not kept.offloads


def test_layers_of_other_widths_are_recomputed_all_or_none():
    """The line between both is an upper bound only if layers are alike."""
    alike = {sizing.even(preset.facts) for preset in presets.all()}
    preset = presets.find("gemma-4-e2b-instruct")
    wide = {linear.layers for linear in preset.facts.linears}

    assert {True, False} == alike and len(wide) > 1
    assert sizing.even(PRESET.facts) and not sizing.even(preset.facts)


def test_checkpointing_is_off_where_the_config_says_so(monkeypatch):
    """Also for a model whose memory is not known, which is recomputed for safety else."""
    monkeypatch.setattr(Base, "sized", lambda *_: None)
    assert not made(24, 1024, checkpointing=False).placement.checkpointing
    assert made(24, 1024, checkpointing=True).placement.checkpointing
    assert made(24, 1024).placement.checkpointing


@pytest.mark.parametrize(("gib", "unsloth"), longest_rows.UNSLOTH.items())
def test_rows_are_as_long_as_unsloths(gib, unsloth):
    """Longer from 12 GB on with AdamW in float32, and everywhere with AdamW in 8 bits."""
    row, fit = longest_rows.longest(gib)

    assert row >= (unsloth if gib > 8 else 0.8 * unsloth)
    assert fit.memory.total <= gib * GIB * (1 - sizing.HEADROOM)
    eight_bit = replace(longest_rows.DEMAND, optimizer="adamw_8bit")
    assert longest_rows.longest(gib, eight_bit)[0] > 1.5 * unsloth
