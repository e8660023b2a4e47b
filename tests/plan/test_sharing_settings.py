"""What decides how GPUs hold a model: settings of the user, and what cannot be shared."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import yaml
from several_gpus import LLAMA, cards, on_cpu, workspace

import tuning.plan as plan
from tuning import presets
from tuning.errors import SpecError
from tuning.plan.coefficients import preset_coefficients


@pytest.mark.parametrize(
    ("value", "shards"),
    [
        ("full_shard", 4),
        ("hybrid_shard", 2),
        ("no_shard", 1),
        ("true", 4),
        ("full_shard auto_wrap", 4),
        ("[hybrid_shard, auto_wrap]", 2),
        ("FULL_SHARD", 4),
        ('""', 1),
        ("[]", 1),
        ("false", 1),
    ],
)
def test_fsdp_of_the_config_decides(value: str, shards: int) -> None:
    """transformers' spellings; on processors as well, where tests run."""
    parsed = workspace("smollm3-3b", "p4d.24xlarge", count=2, arguments=f"fsdp: {value}")
    base = plan.Base("x/y", "r", replace(presets.find("smollm3-3b").facts, parameters=10**6))
    for device in (replace(on_cpu(2, 8), nodes=2), replace(cards("L4", 2), nodes=2)):
        decided = plan.make(parsed, base, device, lengths=None, versions={})
        assert (4, 2, shards) == (
            decided.placement.ranks,
            decided.placement.nodes,
            decided.placement.shards,
        )
        assert shards == 1 or decided.reasons["shards"] == "set in the config (fsdp)"
    alone = plan.make(parsed, base, on_cpu(1, 8), lengths=None, versions={})
    assert (1, 1) == (alone.placement.ranks, alone.placement.shards)
    ids = {
        replace(plan.make(parsed, base, d, lengths=None, versions={}).recipe, data=("d",)).run_id
        for d in (on_cpu(2, 8), on_cpu(1, 8))
        if parsed.settings.sharding
    }
    assert len(ids) <= 1  # sixteen rows a step either way


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("fsdp: full_shard offload", "which the plan chooses"),
        ("fsdp: shard_grad_op", "use one of full_shard, hybrid_shard, no_shard"),
        ("fsdp: [full_shard, hybrid_shard]", "which is not known"),
        ("fsdp: 3", "which is not known"),
        ("deepspeed: zero3.json", "shows what fits"),
        ("parallelism_config: {tp_size: 2}", "shows what fits"),
    ],
)
def test_what_fsdp_does_not_take_is_refused(arguments: str, words: str) -> None:
    """With what to write instead; other launchers' files with a pointer."""
    with pytest.raises(SpecError, match=words):
        workspace(LLAMA, "p4d.24xlarge", arguments=arguments)


WHOLE_ONLY = [
    ("LoraConfig: {use_dora: true}", "DoRA (LoraConfig.use_dora)"),
    *(
        (f"TrainingArguments: {{optim: {name}}}", f"the optimizer {name} (TrainingArguments.optim)")
        for name in ("adamw_8bit", "paged_adamw_32bit", "adafactor", "lion_8bit")
    ),
]


@pytest.mark.parametrize(("section", "what"), WHOLE_ONLY)
def test_what_trains_with_whole_copies_only_is_not_shared(section: str, what: str) -> None:
    """A model that fits is held whole; one that does not is refused, and shares are never tried."""
    kind, _, arguments = section.partition(": ")
    more = {kind: yaml.safe_load(arguments)}

    def asked(preset: str, instance: str, fsdp: str | None = None) -> plan.Plan:
        parsed = workspace(preset, instance, more=more, arguments=f"fsdp: {fsdp}" if fsdp else "")
        return plan.draft(parsed, here=plan.device_of(instance))

    for preset, instance in (("mistral-7b", "g5.48xlarge"), ("phi-4", "p5.48xlarge")):
        decided = asked(preset, instance)
        assert (8, 1) == (decided.placement.ranks, decided.placement.shards)
        assert f"the only way with {what}" == decided.reasons["shards"]
        assert 1 == asked(preset, instance, "no_shard").placement.shards
    with pytest.raises(SpecError, match="PLAN-120") as caught:
        asked(LLAMA, "p4d.24xlarge")
    assert f"go without {what}: then its GPUs share" in str(caught.value)
    for fsdp in ("full_shard", "hybrid_shard"):
        with pytest.raises(SpecError, match=r"PLAN-119 .*no_shard") as caught:
            asked("phi-4", "p5.48xlarge", fsdp)
        assert f"is {fsdp}, but with {what} each GPU" in str(caught.value)


def test_all_that_is_in_the_way_of_shares_is_named_at_once() -> None:
    """Taking one of them away would lead to a refusal for the other."""
    more = {"LoraConfig": {"use_dora": True}}
    parsed = workspace(LLAMA, "p4d.24xlarge", more=more, arguments="optim: adafactor")
    both = (
        "DoRA (LoraConfig.use_dora) and the optimizer adafactor (TrainingArguments.optim): then "
        "its GPUs share the model"
    )
    with pytest.raises(SpecError, match=re.escape(f"go without {both}")):
        plan.draft(parsed, here=plan.device_of("p4d.24xlarge"))


@pytest.mark.parametrize("kind", ["zamba", "zamba2"])
def test_classes_whose_layers_share_weights_are_not_shared(kind: str) -> None:
    """As the training would refuse it."""
    facts = replace(presets.find(LLAMA).facts, model_type=kind)
    base = plan.Base("x/y", "r", facts, simulated=preset_coefficients(LLAMA))
    parsed = workspace(LLAMA, "p4d.24xlarge")
    with pytest.raises(SpecError, match="PLAN-120") as caught:
        plan.make(parsed, base, plan.device_of("p4d.24xlarge"), lengths=None, versions={})
    assert "go without" not in str(caught.value)  # nobody can go without the model's class


def test_embeddings_with_new_tokens_stay_whole() -> None:
    """Their rows are trained, so every GPU has them."""
    more = {"ModelConfig": {"new_special_tokens": ["<|order|>"]}}
    parsed = [workspace(LLAMA, "p4d.24xlarge", more=m) for m in ({}, more)]
    plain, new = (plan.draft(x, here=plan.device_of("p4d.24xlarge")).fit.memory for x in parsed)
    table = 2 * 128256 * 8192

    assert new.weights - plain.weights == pytest.approx(2 * table * 7 / 8, rel=1e-3)
    assert plain.gathered - new.gathered == table


def test_how_others_group_layers_is_ignored_with_a_note() -> None:
    """Files written for transformers are taken."""
    arguments = "fsdp: full_shard auto_wrap, fsdp_config: {fsdp_version: 2}"
    parsed = workspace(LLAMA, "p4d.24xlarge", arguments=arguments)

    assert "full_shard" == parsed.settings.sharding
    assert any("fsdp_config" in note and "ignored" in note for note in parsed.notes)


@pytest.mark.parametrize(("count", "words"), [(0, "at least 1"), (65, "at most 64"), (-1, "least")])
def test_a_number_of_machines_that_is_none_is_refused(count: int, words: str) -> None:
    """One to 64."""
    with pytest.raises(SpecError, match=f"SPEC-104 resource.count .*{words}"):
        workspace(LLAMA, "p4d.24xlarge", count=count)
    assert 64 == workspace(LLAMA, "p4d.24xlarge", count=64).nodes
