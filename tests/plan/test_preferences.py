"""Plans of DPO and KTO: what is chosen otherwise than for SFT, what is refused, what it takes."""

from dataclasses import replace

import pytest

import tuning.plan as plan
from tuning.errors import SpecError
from tuning.plan import Lengths, sizing
from tuning.spec import Destination, Settings, Source, Spec, coercion, keys

H100 = plan.device_of("Standard_NC40ads_H100_v5")
PAIRS = Lengths(rows=2_000, tokens=400_000, longest=700, objective="dpo")
RATED = replace(PAIRS, objective="kto")


def spec(**settings):
    return Spec(
        name="t",
        preset="llama-3.1-8b-instruct",
        method="lora",
        source=Source(urls=("https://h.example/d",)),
        destination=Destination(image="r.example/x:1"),
        settings=Settings(**settings),
    )


def made(lengths=None, **settings):
    job = spec(**settings)
    base = plan.known_base(job)
    return plan.make(job, base, H100, lengths=lengths, versions={})


@pytest.mark.parametrize(("lengths", "objective"), [(PAIRS, "dpo"), (RATED, "kto")])
def test_the_rows_decide_the_objective_and_with_it_the_plan(lengths, objective):
    """A tenth of the rate of SFT and less, one epoch, no packing, each with its reason."""
    decided = made(lengths)

    recipe = decided.recipe
    assert (objective, 0.1, 5e-6, 1.0) == (
        recipe.objective,
        recipe.beta,
        recipe.learning_rate,
        recipe.epochs,
    )
    assert (False, 700, 16) == (recipe.packing, recipe.max_length, recipe.global_batch)
    assert "the shape of the rows" == decided.reasons["objective"]
    assert "answers are compared one by one" == decided.reasons["packing"]
    assert "head" not in decided.placement.kernels


def test_the_config_says_it_before_the_data_is_read():
    """A draft knows the objective where DatasetConfig names it, and else plans for SFT."""
    assert "dpo" == made(objective="dpo", beta=0.5).recipe.objective
    assert 0.5 == made(objective="dpo", beta=0.5).recipe.beta
    assert None is made().recipe.objective
    assert None is made(PAIRS, objective="sft").recipe.objective


def test_a_run_of_sft_has_the_run_id_it_always_had():
    """Of a recipe without an objective nothing is said about it."""
    assert not {"objective", "beta"} & made().recipe.to_json().keys()
    assert {"objective", "beta"} <= made(PAIRS).recipe.to_json().keys()


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"packing": True}, "TrainingArguments.packing"),
        ({"train_on": "all"}, "DatasetConfig.train_on"),
        ({"over_length": "split"}, "DatasetConfig.over_length"),
    ],
)
@pytest.mark.parametrize("lengths", [PAIRS, RATED, None])
def test_settings_of_sft_alone_are_refused(lengths, settings, where):
    """Never left out in silence: packing, training on prompts, answers split in parts."""
    with pytest.raises(SpecError) as error:
        made(lengths, objective=lengths.objective if lengths else "dpo", **settings)

    (problem,) = error.value.problems
    assert ("PLAN-122", where) == (problem.code, problem.where)


def demand(**changes):
    usual = sizing.Demand(
        method="lora",
        precision="bfloat16",
        rank=16,
        dropout=0.0,
        optimizer="adamw_torch_fused",
        attention="varlen",
        double_quant=True,
        targets=None,
        length=1024,
        rows=8,
        packed=False,
        device="cuda",
        span=300.0,
        fused=True,
    )
    return replace(usual, **changes)


def test_both_answers_of_a_pair_are_in_memory_together():
    """One pair takes what two rows take, and trl's head scores more tokens at once than ours."""
    known = plan.known_base(spec())
    model = sizing.model(known.facts)
    for checkpointing in (False, True):
        pair, two = (
            sizing.smallest(model, demand(checkpointing=checkpointing, **each), H100.gpu)
            for each in ({"answers": 2, "micro_batch": 2}, {"micro_batch": 4})
        )
        assert pair.memory == two.memory
        theirs = demand(checkpointing=checkpointing, answers=2, micro_batch=2, compares=True)
        assert sizing.smallest(model, theirs, H100.gpu).memory.total >= pair.memory.total


def test_the_predicted_time_counts_the_passes_of_the_reference():
    """DPO: two sequences and one forward pass of each; KTO: an answer to another prompt, too."""
    times = {}
    for lengths in (PAIRS, RATED):
        decided = plan.freeze(made(lengths), spec(), rows=1000, data=("d",))
        recipe = decided.recipe
        tokens = recipe.steps * recipe.global_batch * recipe.max_length
        times[recipe.objective] = decided.seconds * decided.tokens_per_second / tokens
    assert {"dpo": 3.0, "kto": 2.5} == pytest.approx(times)


@pytest.mark.parametrize("name", ["orpo", "simpo", "ipo", "grpo", "ppo", "reward"])
def test_other_objectives_are_refused_with_a_pointer(name):
    """What is there is listed, and where the others are."""
    key = keys.sections()["DatasetConfig"]["objective"]
    with pytest.raises(coercion.Invalid) as error:
        coercion.coerce(key, name)

    assert "use one of sft, dpo, kto" in error.value.change
    assert "https://huggingface.co/docs/trl" in error.value.change


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_head_of_its_own_kind_is_not_compared_by_trls(kind):
    """The plan refuses pairs for it, keeps no one-pass head, and sizes all of its logits."""
    job = spec()
    known = plan.known_base(job)
    base = replace(known, config=known.config | {"model_type": kind})
    if kind == "bert":
        with pytest.raises(SpecError, match="PLAN-123"):
            plan.make(job, base, H100, lengths=PAIRS, versions={})
    else:
        plan.make(job, base, H100, lengths=PAIRS, versions={})
    taught = plan.make(job, base, H100, lengths=replace(PAIRS, objective="sft"), versions={})

    assert (kind == "llama") == ("head" in taught.placement.kernels)
    assert (kind == "bert") == ("model's own head" in taught.reasons["kernels"])


def test_kept_logits_are_in_the_estimate():
    """A head of its own kind has logits of every token in memory, not of a tile of them."""
    model = sizing.model(plan.known_base(spec()).facts)
    sizes = [
        sizing.smallest(model, demand(micro_batch=8, **each), H100.gpu).memory.total
        for each in ({"compares": True}, {"own_head": True})
    ]
    vocabulary, tile = 128_256, 4096
    assert sizes[1] - sizes[0] >= 12 * vocabulary * 8 * 1024 - 10 * vocabulary * tile
