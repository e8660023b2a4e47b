"""How ranks hold a model: placements add up, shares make a copy, waiting takes time."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from several_gpus import LLAMA, cards, drafted, workspace

import tuning.plan as plan
from tuning import presets
from tuning.errors import SpecError
from tuning.plan import communication, memory, sharding, sizing
from tuning.plan.coefficients import preset_coefficients
from tuning.plan.device import Device
from tuning.plan.sharding import Layout, layouts

machines = st.builds(
    replace,
    st.sampled_from([cards(n, 1) for n in ("T4", "L4", "A100-SXM4-40GB", "H200-SXM5")]),
    count=st.integers(1, 8),
    nodes=st.integers(1, 5),
    network=st.sampled_from([None, 1e9, 50e9]),
)


@settings(deadline=None, max_examples=40)
@given(
    machines,
    st.sampled_from(["phi-4", "mistral-7b", LLAMA]),
    st.sampled_from(["lora", "qlora"]),
    st.sampled_from(["", "fsdp: full_shard", "fsdp: hybrid_shard", "fsdp: no_shard"]),
    st.sampled_from([None, 1, 4, 6]),
)
def test_every_placement_adds_up(
    device: Device, preset: str, method: str, arguments: str, micro: int | None
) -> None:
    """On any machines, and when a frozen recipe is taken up on others, the numbers fit together."""
    if micro:
        arguments += f"{', ' if arguments else ''}per_device_train_batch_size: {micro}"
    parsed = replace(
        workspace(preset, "p4d.24xlarge", method=method, arguments=arguments), instance=None
    )
    base = plan.known_base(parsed)
    try:
        first = plan.make(parsed, base, device, lengths=None, versions={})
        frozen = plan.freeze(first, parsed, rows=100, data=("d",))
        other = replace(device, count=3, nodes=2)
        taken_up = plan.resume(replace(frozen, device=other), frozen.recipe, base, parsed, rows=100)
    except SpecError as error:
        assert {"PLAN-120"} >= {problem.code for problem in error.problems}
        return
    for decided in (frozen, taken_up):
        placed = decided.placement
        assert decided.recipe.global_batch == (
            placed.micro_batch * placed.accumulation * placed.ranks
        )
        each = placed.ranks // placed.nodes
        assert placed.ranks == each * placed.nodes
        assert placed.ranks % placed.shards == 0
        assert each % placed.shards == 0 or placed.shards % each == 0
        assert placed.nodes <= decided.device.nodes and each <= decided.device.count
        assert placed.shards > 1 or not placed.offload
        assert decided.fit.fits(device.memory_bytes, device.host_bytes)
        assert placed == plan.placement_from_json(asdict(placed))
        assert all(placed.shards == other.shards for other in plan.fallbacks(placed))
    assert frozen.recipe.run_id == taken_up.recipe.run_id


def test_a_placement_of_an_earlier_version_is_read() -> None:
    """One machine, whole copies."""
    record = asdict(drafted("phi-4", "p4d.24xlarge").placement)
    old = {k: v for k, v in record.items() if k not in ("nodes", "shards", "offload")}

    read = plan.placement_from_json(old)

    assert (1, 1, False) == (read.nodes, read.shards, read.offload)


@given(st.integers(1, 16), st.integers(1, 8))
def test_layouts_lie_on_parts_of_a_machine_or_on_whole_ones(each: int, nodes: int) -> None:
    """Fewest shards first; all together last; the words name what each holds."""
    found = layouts(each * nodes, nodes)

    assert [1, each * nodes] == [found[0].shards, found[-1].shards]
    assert sorted({x.shards for x in found}) == [x.shards for x in found]
    for layout in found:
        assert layout.copies * layout.shards == each * nodes
        assert each % layout.shards == 0 or layout.shards == each * layout.spanned
        assert nodes % layout.spanned == 0


@settings(deadline=None)
@given(
    st.sampled_from([p.name for p in presets.all() if preset_coefficients(p.name)]),
    st.sampled_from(["lora", "qlora"]),
    st.sampled_from([2, 4, 8, 16, 64]),
    st.sampled_from([512, 2048, 16384]),
    st.booleans(),
)
def test_shares_add_up_to_a_copy(
    name: str, method: str, shards: int, tokens: int, checkpointing: bool
) -> None:
    """All shares together are a copy, what is whole aside; gradients have no second buffer."""
    facts, coefficients = presets.find(name).facts, preset_coefficients(name)

    def at(layout: Layout) -> memory.MemoryEstimate:
        return memory.predict(
            coefficients,
            method=method,  # type: ignore[arg-type]
            rank=16,
            tokens=tokens,
            checkpointing=checkpointing,
            attention="sdpa",
            accumulating=True,
            layout=layout,
            facts=facts,
        )

    alone, copies, shared = at(Layout()), at(Layout(shards)), at(Layout(shards, 1, shards))
    hosted = at(Layout(shards, 1, shards, offload=True))
    whole = shared.weights - (alone.weights - shared.weights) / (shards - 1)
    width = 0.5 if method == "qlora" else 2
    tables = 2 * 2 * facts.vocab * facts.hidden * (not facts.tied)

    assert alone.weights - whole == pytest.approx(width * coefficients.packed + tables, rel=1e-3)
    assert shared.adapters == pytest.approx(alone.adapters / shards, abs=1)
    assert shared.optimizer == pytest.approx(alone.optimizer / shards, abs=1)
    assert copies.gradients == 2 * alone.adapters
    assert shared.gradients < copies.gradients
    assert shared.constants == alone.constants
    if shared.moment != "optimizer step":
        assert shared.gathered >= 2 * width * coefficients.packed / coefficients.layers
    embedding = tables / 2  # beside shares in host memory it is whole
    assert hosted.total < shared.total + embedding
    assert hosted.weights == pytest.approx(whole + embedding, rel=1e-3)
    shares = shared.weights - whole - embedding / shards + 2 * shared.adapters + shared.optimizer
    assert hosted.host == pytest.approx(shares, rel=1e-3)


@settings(deadline=None)
@given(
    st.floats(1e-3, 10),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([1, 2, 4]),
    st.floats(1e9, 1e12),
    st.floats(1e8, 1e11),
    st.booleans(),
)
def test_waiting_never_makes_faster(
    compute: float, each: int, nodes: int, inside: float, between: float, checkpointing: bool
) -> None:
    """A micro-batch takes at least its computing; faster links never make it slower."""
    coefficients, facts = preset_coefficients("phi-4"), presets.find("phi-4").facts
    for layout in layouts(each * nodes, nodes):
        shared = sharding.share(
            coefficients, facts, layout, method="lora", precision="bfloat16", lora=10**9
        )

        def seconds(
            inside: float, between: float, *, shared: sharding.Shared = shared, steps: int = 1
        ) -> float:
            return communication.seconds(
                compute,
                shared,
                communication.Links(inside, between),
                checkpointing=checkpointing,
                accumulation=steps,
                bandwidth=2e12,
            )

        now = seconds(inside, between)
        assert now >= compute
        assert now >= seconds(2 * inside, 2 * between) >= compute
        hosted = replace(shared, layout=replace(layout, offload=True))
        assert layout.shards == 1 or seconds(inside, between, shared=hosted) >= now
        if layout.shards == 1:  # adapters only: 1 GB there and back, hidden by the backward
            assert now - compute <= 2e9 / min(inside, between)
            assert seconds(inside, between, steps=64) <= compute + (now - compute) / 63


def test_between_machines_whole_copies_send_the_adapters_gradients_only() -> None:
    """1 GB of them twice over 1 GB/s is two seconds, whatever the base weighs."""
    links = communication.Links(inside=1e12, between=1e9)
    for preset in ("phi-4", LLAMA, "mistral-7b"):
        shared = sharding.share(
            preset_coefficients(preset),
            presets.find(preset).facts,
            Layout(64, 64),
            method="lora",
            precision="bfloat16",
            lora=10**9,
        )
        options = {"checkpointing": False, "accumulation": 1, "bandwidth": 2e12}
        found = communication.seconds(0.0, shared, links, **options)
        assert found == pytest.approx(2 * 63 / 64, rel=0.01)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_weights_are_gathered_before_the_forward_and_before_the_backward(
    checkpointing: bool,
) -> None:
    """Once for each, with checkpointing as well; what computes longer hides them."""
    shared = sharding.share(
        preset_coefficients("phi-4"),
        presets.find("phi-4").facts,
        Layout(8, 1, 8),
        method="lora",
        precision="bfloat16",
        lora=0,
    )

    def seconds(compute: float) -> float:
        return communication.seconds(
            compute,
            shared,
            communication.Links(inside=1e9, between=1e9),
            checkpointing=checkpointing,
            accumulation=1,
            bandwidth=1e15,
        )

    once = shared.layers * 7 / 8 / 1e9
    alone = (shared.layer + shared.embedding + shared.head) * 7 / 8 / 1e9
    assert seconds(0.0) == pytest.approx(2 * once + alone, rel=1e-3)
    assert seconds(10 * once) == pytest.approx(10 * once + alone, rel=1e-3)


def test_each_group_of_ranks_has_buffers_of_its_own() -> None:
    """Of a copy's ranks, and of the ranks with the same share of other copies."""
    facts, coefficients = presets.find("phi-4").facts, preset_coefficients("phi-4")
    contexts = {
        layout: memory.predict(
            coefficients,
            method="lora",
            rank=16,
            tokens=512,
            checkpointing=True,
            layout=layout,
            facts=facts,
        ).context
        for layout in (Layout(), Layout(8), Layout(8, 1, 8), Layout(8, 1, 2), Layout(16, 2, 8))
    }
    alone, *others = contexts.values()

    assert [1, 1, 2, 2] == [(context - alone) / memory.NCCL_BYTES for context in others]


def test_the_tables_know_the_links() -> None:
    """Every GPU of CUDA has its link, every machine that clouds start its network."""
    parts = {"A10-4Q", "A10-8Q", "A10-12Q"}  # vGPU: no other GPU is reached
    without = {g.name for g in presets.gpus() if g.capability and g.link is None}
    unknown = {
        m.name
        for m in presets.instances()
        if m.gpu.capability and not m.retired and m.cloud != "arc" and m.network is None
    }

    assert (parts, set()) == (without, unknown)
    assert presets.gpu("A100-SXM4-80GB MIG 1g.10gb").link is None
    assert presets.gpu("NVIDIA GeForce RTX 4090").name == "RTX-4090"
    assert all(sizing.HOST_SHARE * m.ram_bytes > 0 for m in presets.instances() if m.ram_bytes)
