"""What fits on which GPU, and which machine would do."""

from dataclasses import replace
from pathlib import Path

import pytest
from fit_page import CLASSES

import tuning.plan as plan
from tuning import presets
from tuning.errors import SpecError
from tuning.plan import sizing
from tuning.plan.coefficients import preset_coefficients
from tuning.spec import Destination, Settings, Source, Spec

ROOT = Path(__file__).parents[2]
DEMAND = sizing.Demand(
    method="qlora",
    precision="bfloat16",
    rank=16,
    dropout=0.0,
    optimizer="adamw_torch_fused",
    attention="sdpa",
    double_quant=True,
    targets=None,
    length=2048,
    rows=8,
    packed=True,
    device="cuda",
    span=300.0,
)


def model(name):
    preset = presets.find(name)
    return sizing.Model(preset.facts, preset_coefficients(name))


def draft(preset, instance, *, method="qlora", **settings):
    spec = Spec(
        name="t",
        preset=preset,
        method=method,
        source=Source(urls=("https://h.example/d",)),
        destination=Destination(image="r.example/x:1"),
        settings=Settings(**settings),
        instance=instance,
    )
    return plan.draft(spec, here=plan.device_of(instance))


def test_what_is_chosen_fits_with_room_to_spare():
    """For every preset and class the peak stays below the GPU's memory less the headroom."""
    for preset in presets.all():
        coefficients = preset_coefficients(preset.name)
        if coefficients is None:
            continue
        base = sizing.Model(preset.facts, coefficients)
        for gpu in map(presets.gpu, CLASSES):
            precision = "bfloat16" if gpu.bf16 else "float16"
            asked = replace(DEMAND, precision=precision, packed=preset.facts.packing_safe)
            found = sizing.best(base, asked, gpu, free_bytes=gpu.memory_bytes)
            if found is None:
                least = sizing.smallest(base, asked, gpu)
                assert not least.fits(gpu.memory_bytes), (preset.name, gpu.name)
            else:
                assert found.memory.total < 0.97 * gpu.memory_bytes, (preset.name, gpu.name)


def test_checkpointing_is_a_last_resort():
    """Where a step fits without it, it is off; a smaller card turns it on before it gives up."""
    llama, gpu = model("llama-3.1-8b-instruct"), presets.gpu("H200-SXM5")

    assert not sizing.best(llama, DEMAND, gpu, free_bytes=141 << 30).checkpointing
    assert sizing.best(llama, DEMAND, gpu, free_bytes=12 << 30).checkpointing
    assert sizing.best(llama, DEMAND, gpu, free_bytes=6 << 30) is None


def test_a_batch_and_checkpointing_that_the_user_fixed_are_kept():
    """The only candidate is the one that was asked for."""
    asked = replace(DEMAND, micro_batch=4, checkpointing=True)

    found = list(sizing.placements(model("phi-4"), asked, presets.gpu("A10")))

    assert [(4, True)] == [(fit.micro_batch, fit.checkpointing) for fit in found]


def test_the_quick_start_is_planned_for_its_old_card():
    """phi-3-mini by qlora on Standard_NC6s_v3: float16, the cu126 engine, and memory left over."""
    decided = draft("phi-3-mini-128k-instruct", "Standard_NC6s_v3")

    assert "float16" == decided.recipe.precision
    assert "cu126" == presets.engine_build(decided.device.capability)
    assert decided.fit.memory.total < 0.96 * decided.device.memory_bytes
    assert "fits" in decided.reasons["micro_batch"]


def test_what_does_not_fit_is_refused_with_the_smallest_machine_that_does():
    """llama-3.3-70b by qlora on 24 GiB: what it takes, what is there, and what would do."""
    with pytest.raises(SpecError, match=r"PLAN-120 .* takes at least .* GiB") as caught:
        draft("llama-3.3-70b-instruct", "Standard_NV36ads_A10_v5")

    (problem,) = caught.value.problems
    name = problem.change.split()[1]
    machine = presets.instance(name)
    assert ("azure", False) == (machine.cloud, machine.retired)
    assert draft("llama-3.3-70b-instruct", name).fit.fits(machine.memory_bytes)
    smaller = [
        m
        for m in presets.instances()
        if m.cloud == "azure"
        and not m.retired
        and m.gpu.capability
        and m.memory_bytes * m.gpus < machine.memory_bytes * machine.gpus
    ]
    for other in smaller:  # none holds it on its GPUs
        try:
            assert draft("llama-3.3-70b-instruct", other.name).placement.offload
        except SpecError as error:
            assert "PLAN-120" in str(error)


def test_lora_that_does_not_fit_is_told_of_qlora():
    """An 8B model in 16 bits is too much for 16 GiB, in 4 bits it is not."""
    with pytest.raises(SpecError, match="use method qlora, which fits here"):
        draft("llama-3.1-8b-instruct", "Standard_NC4as_T4_v3", method="lora")


def test_rows_are_shortened_only_where_the_user_left_their_length_open():
    """A small card gets shorter rows and says why; a set length is kept and refused instead."""
    tight = replace(plan.device_of("Standard_NV36ads_A10_v5"), memory_bytes=int(4.0 * 2**30))
    lengths = plan.Lengths(rows=1000, tokens=2_000_000, longest=8000)
    spec = Spec(
        name="t",
        preset="phi-3-mini-128k-instruct",
        method="qlora",
        source=Source(urls=("https://h.example/d",)),
        destination=Destination(image="r.example/x:1"),
    )
    base = plan.known_base(spec)

    decided = plan.make(spec, base, tight, lengths=lengths, versions={})

    assert 512 <= decided.recipe.max_length < 8000
    assert "would not fit" in decided.reasons["max_length"]
    fixed = replace(spec, settings=Settings(max_length=8192))
    with pytest.raises(SpecError, match="PLAN-120"):
        plan.make(fixed, base, tight, lengths=lengths, versions={})


def test_a_model_that_nobody_sized_is_placed_with_care():
    """Other shapes than the presets' have no ledger: one row at once, checkpointing on."""
    facts = replace(presets.find("phi-4").facts, layers=7)
    spec = Spec(
        name="t",
        preset="someone/model",
        method="lora",
        source=Source(urls=("https://h.example/d",)),
        destination=Destination(image="r.example/x:1"),
    )
    device = plan.device_of("Standard_NC24ads_A100_v4")

    decided = plan.make(
        spec, plan.Base("someone/model", "r", facts), device, lengths=None, versions={}
    )

    assert decided.fit is None
    assert decided.placement.checkpointing
