"""Several GPUs and several machines: what the plan answers, and what it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from several_gpus import GIB, LLAMA, MIXTURE, WORKSPACE, cards, drafted, on_cpu, workspace

import tuning.plan as plan
from tuning import presets, spec
from tuning.errors import SpecError
from tuning.plan import memory
from tuning.plan.coefficients import Coefficients, Moment, Variant, preset_coefficients
from tuning.plan.sharding import Layout

# What the plan answers for the models that one GPU does not hold.


def test_70b_by_lora_is_shared_by_eight_gpus_of_40_gib() -> None:
    """Each holds an eighth of the weights; all the rest of a step is believable beside others."""
    decided = drafted(LLAMA, "p4d.24xlarge")
    placed, terms = decided.placement, decided.fit.memory.terms

    assert (8, 8, 1, False) == (placed.ranks, placed.shards, placed.nodes, placed.offload)
    assert "8 GPUs: each holds 1/8 of the weights" == placed.text
    assert "a whole copy takes at least" in decided.reasons["shards"]
    assert terms["frozen weights"] == pytest.approx(141.1e9 / 8, rel=0.01)
    assert terms["gathered weights"] == pytest.approx((2 * 1.71 + 2.1) * 1e9, rel=0.01)


def test_the_memory_of_70b_is_within_a_tenth_of_what_torchtune_publishes() -> None:
    """27.6 GiB a GPU for LoRA of Llama 3.1 70B on 8 x A100: the same rows, rank and projections.

    Their root keeps embedding and output layer whole (3.9 GiB; here the output layer, 2.0), and
    their adapters are in bfloat16; here the buffer that FSDP2 gathers in counts (1.8), which makes
    the estimate the higher one.
    """
    found = memory.predict(
        preset_coefficients(LLAMA),
        method="lora",
        rank=16,
        tokens=2 * 2048,
        rows=2,
        checkpointing=True,
        fused=True,
        targets=("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        layout=Layout(8, 1, 8),
        facts=presets.find(LLAMA).facts,
    )

    assert found.allocated / GIB == pytest.approx(27.6, rel=0.1)


def test_qlora_of_70b_on_two_24_gib_cards_keeps_its_shares_in_host_memory() -> None:
    """Half of the packed weights, with what is whole at once, is more than a card has."""
    two = cards("RTX-3090", 2)
    decided = drafted(LLAMA, "x1", method="qlora", here=two)
    shared = replace(decided.placement, offload=False)

    assert (2, True) == (decided.placement.shards, decided.placement.offload)
    assert "host memory" in decided.placement.text
    assert "no other way fits: slow" in decided.reasons["shards"]
    assert decided.fit.memory.total < two.memory_bytes
    assert decided.fit.memory.weights == pytest.approx(2.1e9, rel=0.01)  # the embedding
    assert decided.fit.host_bytes == pytest.approx(39.7e9, rel=0.02)  # 34 + 2 + adapters
    one_row = memory.predict(
        preset_coefficients(LLAMA),
        method="qlora",
        rank=16,
        tokens=512,
        checkpointing=True,
        fused=True,
        layout=Layout(2, 1, shared.shards),
        facts=presets.find(LLAMA).facts,
    )
    assert one_row.total > two.memory_bytes  # why: even the shortest rows do not fit without
    with pytest.raises(SpecError, match=r"PLAN-120 .* host memory 3\d\.\d of 32\.0 GiB"):
        drafted(LLAMA, "x1", method="qlora", here=cards("RTX-3090", 2, host_gib=32))
    for card, method in (("L40S", "qlora"), ("A100-SXM4-80GB", "lora"), ("A10", "qlora")):
        more = drafted(LLAMA, "x1", method=method, here=cards(card, 4, host_gib=512))
        assert (True, False) == (
            more.placement.shards > 1 or card == "L40S",
            more.placement.offload,
        )


@pytest.mark.parametrize(
    ("instance", "method"),
    [
        ("p5.48xlarge", "lora"),
        ("Standard_ND96amsr_A100_v4", "lora"),
        ("p4d.24xlarge", "qlora"),
        ("a3-highgpu-8g", "qlora"),
    ],
)
def test_a_mixture_of_120b_on_one_machine_of_eight_gpus(instance: str, method: str) -> None:
    """Experts are shared like the rest of a layer, and gathered with it."""
    decided = drafted(MIXTURE, instance, method=method)
    placed, found = decided.placement, decided.fit.memory
    facts = presets.find(MIXTURE).facts
    layer = facts.packed / facts.layers * (2 if method == "lora" else 0.5)

    assert (8, False) == (placed.ranks, placed.offload)
    assert placed.shards > 1
    assert found.gathered > 2 * layer  # all experts of two layers
    assert found.weights == pytest.approx(
        (facts.packed / facts.layers * facts.layers * layer * facts.layers / facts.packed + 2.3e9)
        / placed.shards,
        rel=0.05,
    )


@pytest.mark.parametrize(("count", "copies"), [(1, ""), (2, ", 2 replicas"), (4, ", 4 replicas")])
def test_the_same_file_with_more_machines_makes_replicas(count: int, copies: str) -> None:
    """A copy stays within a machine where it fits: NVLink is faster than any network."""
    decided = drafted(LLAMA, "p4d.24xlarge", count=count)
    where = f" on {count} machines" if count > 1 else ""

    assert f"{8 * count} GPUs{where}: each holds 1/8 of the weights{copies}" == (
        decided.placement.text
    )
    assert decided.recipe.global_batch % (8 * count) == 0
    assert count == decided.device.nodes == decided.placement.nodes
    alone = drafted(LLAMA, "p4d.24xlarge")
    assert decided.tokens_per_second > 0.9 * count * alone.tokens_per_second


def test_plan_prints_it_in_words(tmp_path: Path) -> None:
    """What a person reads on the terminal for `count: 2`."""
    text = WORKSPACE.format(
        preset=LLAMA, instance="p4d.24xlarge", method="lora", count=2, arguments="", more=""
    )
    (tmp_path / "w.yaml").write_text(text)
    shown = subprocess.run(
        [sys.executable, "-m", "tuning", "plan", "-f", "w.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout

    for words in (
        "2 machines, each 8 x A100-SXM4-40GB",
        "16 GPUs on 2 machines: each holds 1/8 of the weights, 2 replicas",
        "a whole copy takes at least",
        "gathered weights",
    ):
        assert words in " ".join(shown.split())


@pytest.mark.parametrize(("gpus", "ranks"), [(2, 2), (4, 4), (8, 8), (16, 8)])
def test_no_more_gpus_are_planned_than_the_job_asks_for(gpus: int, ranks: int) -> None:
    """The annotation `gpus`: what a pod does not get cannot share a model."""
    parsed = replace(workspace("mistral-7b", "p4d.24xlarge", count=2), gpus=gpus)
    decided = plan.draft(parsed, here=plan.device_of("p4d.24xlarge"))

    assert (2 * ranks, ranks) == (decided.placement.ranks, decided.device.count)
    large = replace(workspace(LLAMA, "p4d.24xlarge"), gpus=1)
    with pytest.raises(SpecError, match="PLAN-120"):
        plan.draft(large, here=plan.device_of("p4d.24xlarge"))


def test_the_annotation_gpus_reaches_the_plan() -> None:
    """Of a file; 0, the processor, leaves the device as it is."""
    for value, count in (("4", 4), ("0", 8)):
        text = spec.dump(workspace("mistral-7b", "p4d.24xlarge"))
        annotated = text.replace(
            "name: large", f"name: large\n  annotations: {{tuning.kaito.sh/gpus: '{value}'}}"
        )
        parsed = spec.parse(annotated, origin="w.yaml")
        assert int(value) == parsed.gpus
        assert count == plan.planned_device(parsed).count


def test_a_copy_spans_machines_where_one_does_not_hold_it() -> None:
    """Two machines of one 80 GiB GPU, and four: shares over the network, and its price."""
    here = cards("A100-PCIE-80GB", 1, host_gib=220)
    slow, fast = replace(here, network=2.5e9), replace(here, network=50e9)
    four = [drafted(LLAMA, "x1", count=4, here=device) for device in (slow, fast)]

    assert [4, 4] == [decided.placement.shards for decided in four]
    assert four[1].tokens_per_second > 4 * four[0].tokens_per_second
    assert "10 Gbit/s" in drafted(LLAMA, "x1", count=4, here=here).reasons["speed"]


def test_a_model_that_every_gpu_holds_is_not_shared_over_slow_links() -> None:
    """8B in 16 bits on eight GPUs of 40 GiB, and packed on the smaller ones: whole copies."""
    for instance, method in (
        ("p4d.24xlarge", "lora"),
        ("p5.48xlarge", "lora"),
        ("g5.48xlarge", "qlora"),
    ):
        decided = drafted("llama-3.1-8b-instruct", instance, method=method)
        assert (1, False) == (decided.placement.shards, decided.placement.offload)
        assert "nothing of it is sent" in decided.reasons["shards"]
    faster = drafted("llama-3.1-8b-instruct", "g5.48xlarge")  # only with checkpointing if whole
    assert "faster than whole copies" in faster.reasons["shards"]


# What is refused, and what would do.


@pytest.mark.parametrize(
    ("preset", "instance", "method"),
    [
        ("phi-4", "Standard_NC4_A2", "lora"),
        ("qwen3-32b", "Standard_NC4_A16", "lora"),
        (LLAMA, "Standard_NC8_A2", "qlora"),
    ],
)
def test_a_set_of_machines_is_named_where_no_single_one_does(
    preset: str, instance: str, method: str
) -> None:
    """The least of the cloud that holds it; what is named works when it is taken at its word."""
    with pytest.raises(SpecError, match=r"PLAN-120 .*\(resource.count: \d+\)") as caught:
        drafted(preset, instance, method=method)
    change = caught.value.problems[0].change
    count, name = re.search(r"use (\d+) x (\S+) \(resource.count: \1\)", change).groups()

    assert "arc" == presets.instance(name).cloud
    short = {"method": method, "arguments": "max_length: 512"}  # as short as the refused rows
    taken = drafted(preset, name, count=int(count), **short)
    assert not taken.placement.offload
    try:  # one machine less does not, unless host memory helps
        placed = drafted(preset, name, count=int(count) - 1, **short).placement
        assert placed.offload or placed.activation_offloading
    except SpecError as error:
        assert "PLAN-120" in str(error)


def test_a_single_machine_is_named_first() -> None:
    """Two GPUs of one machine come before two machines."""
    with pytest.raises(SpecError, match=r"use Standard_NC80adis_H100_v5 \(2 x H100-NVL\)"):
        drafted(LLAMA, "Standard_NC24ads_A100_v4")


@pytest.mark.parametrize(
    ("preset", "instance", "method", "length"),
    [
        (LLAMA, "p4d.24xlarge", "lora", 131072),
        ("llama-3.1-8b-instruct", "g4dn.12xlarge", "lora", 120000),
        ("llama-3.1-8b-instruct", "Standard_NV36ads_A10_v5", "qlora", 131072),
        (MIXTURE, "p5.48xlarge", "lora", 65536),
    ],
)
def test_rows_that_no_gpu_holds_are_refused_with_the_arithmetic(
    preset: str, instance: str, method: str, length: int
) -> None:
    """What a token takes, what is left, and the longest row: which fits, and no longer one."""
    with pytest.raises(
        SpecError, match=r"a token of a row takes \d+\.\d\d MiB, .* rows of up to"
    ) as caught:
        drafted(preset, instance, method=method, arguments=f"max_length: {length}")
    problem = caught.value.problems[0]
    row = int(problem.what.rpartition("rows of up to ")[2].split()[0])

    assert f"set TrainingArguments.max_length to {row} or less" in problem.change
    fits = drafted(preset, instance, method=method, arguments=f"max_length: {row}")
    assert (row, 1) == (fits.recipe.max_length, fits.placement.micro_batch)
    with pytest.raises(SpecError, match="PLAN-120"):
        drafted(preset, instance, method=method, arguments=f"max_length: {row + 64}")


@pytest.mark.parametrize(
    ("preset", "instance", "method", "longest", "mean"),
    [
        ("llama-3.1-8b-instruct", "Standard_NC32_A16", "lora", 131072, 19228),
        (LLAMA, "Standard_NC24s_v3", "lora", 16384, 4195),
        ("phi-3-medium-128k-instruct", "Standard_ND40rs_v2", "lora", 131072, 42621),
        ("llama-3.1-8b-instruct", "g4dn.xlarge", "qlora", 131072, 100000),
    ],
)
def test_the_length_that_a_refusal_names_is_one_that_fits(
    preset: str, instance: str, method: str, longest: int, mean: int
) -> None:
    """Also where shorter packed rows are more of them a step, whose gradients add up."""
    device, base = plan.device_of(instance), plan.known_base(workspace(preset, instance))
    read = plan.Lengths(1000, 1000 * mean, longest)

    def made(arguments: str) -> plan.Plan:
        parsed = workspace(preset, instance, method=method, arguments=arguments)
        return plan.make(parsed, base, device, lengths=read, versions={})

    with pytest.raises(SpecError, match="PLAN-120") as caught:
        made(f"max_length: {longest}")
    row = int(caught.value.problems[0].what.rpartition("rows of up to ")[2].split()[0])
    assert row == made(f"max_length: {row}").recipe.max_length


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ("fsdp: no_shard", "fsdp"),
        ("gradient_checkpointing: false, max_length: 8192", "gradient_checkpointing"),
        ("per_device_train_batch_size: 256", "per_device_train_batch_size"),
    ],
)
def test_a_setting_in_the_way_is_named(arguments: str, key: str) -> None:
    """What the user set and without which it would fit."""
    with pytest.raises(SpecError, match=f"leave out TrainingArguments.{key}"):
        drafted(LLAMA, "p4d.24xlarge", arguments=arguments)


# Processors: as many processes as were asked for share their memory.

ON_CPU = Coefficients(
    layers=4,
    kept=10**6,
    packed=4 * 10**8,
    packed_modules=28,
    buffers=0,
    adapters={"up_proj": 40_000, "down_proj": 40_000},
    moments={
        Variant("lora", p, a, c, fused=True, device="cpu"): (
            Moment(
                "forward of the last layer and the loss", {"activations": (0.0, 9e4) + (0.0,) * 6}
            ),
        )
        for p in ("bfloat16", "float32")
        for a in ("sdpa", "varlen")
        for c in (True, False)
    },
)


@pytest.mark.parametrize(
    ("ranks", "gib", "shards"), [(2, 12, 1), (2, 3.2, 2), (4, 9, 1), (4, 6.6, 2), (4, 5.8, 4)]
)
def test_processes_of_a_cpu_share_a_model_that_they_do_not_hold_each(
    ranks: int, gib: float, shards: int
) -> None:
    """Whole copies as long as all of them fit the memory together."""
    facts = replace(presets.find("smollm3-3b").facts, parameters=4 * 10**8, hidden=1000, vocab=1000)
    facts = replace(facts, linears=tuple(replace(x, inputs=1) for x in facts.linears))
    base = plan.Base("x/y", "r", facts, simulated=ON_CPU)
    parsed = workspace("smollm3-3b", "p4d.24xlarge", arguments="max_length: 256")
    decided = plan.make(parsed, base, on_cpu(ranks, gib), lengths=None, versions={})

    assert (ranks, shards, False) == (
        decided.placement.ranks,
        decided.placement.shards,
        decided.placement.offload,
    )
    assert ranks * decided.fit.memory.total <= gib * GIB
