"""The plan: what is decided, what the user's word changes, and what never moves the run id."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import jsonschema
import pytest

import tuning.plan as plan
from tuning import presets
from tuning.errors import SpecError
from tuning.plan import Base, Lengths
from tuning.plan.device import Device
from tuning.spec import Destination, Settings, Source, Spec

ROOT = Path(__file__).resolve().parents[2]
H100 = Device("cuda", "H100", 1, 80 * 2**30, True, (9, 0))
CPU = Device("cpu", "CPU", 1, 16 * 2**30, True)
PHI = presets.find("phi-3-mini-128k-instruct")
BASE = Base(PHI.hub_id, PHI.revision, PHI.facts)
CHAT = Lengths(rows=10_000, tokens=2_000_000, longest=1_500)


def spec(method="lora", preset="phi-3-mini-128k-instruct", **settings):
    return Spec(
        name="t",
        preset=preset,
        method=method,
        source=Source(urls=("https://h.example/d",)),
        destination=Destination(image="r.example/x:1"),
        settings=Settings(**settings),
    )


def make(job, *, base=BASE, device=H100, lengths=CHAT):
    return plan.make(job, base, device, lengths=lengths, versions={"torch": "2.13.0"})


def test_every_decided_number_has_its_reason():
    """What the table shows has a reason, also once the data is packed."""
    decided = plan.freeze(make(spec()), spec(), rows=500, data=("d",))

    for name in ("precision", "rank", "alpha", "learning_rate", "max_length", "packing", "steps"):
        assert decided.reasons[name]
    assert "500 rows / 1 a step x 3 epochs" == decided.reasons["steps"]
    assert 1500 == decided.recipe.steps


def test_keeping_the_best_weights_takes_held_out_rows_and_several_looks():
    """Ten evaluations unless the user says how many; without held-out rows it is refused."""
    asked = spec(keep_best=True, train_share=0.9)
    decided = plan.freeze(make(asked), asked, rows=500, data=("d",))

    assert (True, 150) == (decided.recipe.keep_best, decided.recipe.eval_steps)
    assert "ten evaluations" in decided.reasons["eval_steps"]
    with pytest.raises(SpecError, match=r"PLAN-109 .*load_best_model_at_end"):
        make(spec(keep_best=True))


@pytest.mark.parametrize("stage", ["draft", "frozen"])
def test_the_json_of_a_plan_follows_its_schema(stage):
    """What programs read is described by configs/plan.schema.json, which the code wrote."""
    kept = json.loads((ROOT / "configs" / "plan.schema.json").read_text())
    decided = make(spec(), lengths=None if stage == "draft" else CHAT)
    if stage == "frozen":
        decided = plan.freeze(decided, spec(), rows=500, data=("d",))

    jsonschema.validate(json.loads(json.dumps(decided.to_json())), kept)


def test_what_the_user_sets_wins():
    """A set value is taken as it is and says so."""
    decided = make(spec(rank=8, learning_rate=1e-3, max_length=4096, packing=False, seed=7))

    assert (8, 1e-3, 4096, False, 7) == (
        decided.recipe.rank,
        decided.recipe.learning_rate,
        decided.recipe.max_length,
        decided.recipe.packing,
        decided.recipe.seed,
    )
    assert 16.0 == decided.recipe.alpha  # still twice the rank
    assert "set in the config" == decided.reasons["rank"]


def test_packed_rows_hold_the_longest_row():
    """The packed length is a power of two that no row exceeds, within what the model reads."""
    assert 4096 == make(spec()).recipe.max_length  # 16 rows of 200 tokens, longest 1,500
    long = replace(CHAT, longest=9_000)
    assert 16_384 == make(spec(), lengths=long).recipe.max_length
    short = Base(BASE.name, BASE.revision, presets.find("phi-3-mini-4k-instruct").facts)
    assert 4096 == make(spec(), base=short, lengths=long).recipe.max_length


def test_a_small_dataset_still_takes_many_steps():
    """Few short rows are not packed into a handful of steps."""
    decided = plan.freeze(
        make(spec(), lengths=Lengths(rows=300, tokens=12_000, longest=60)),
        spec(),
        rows=24,  # 12,000 tokens in rows of 512
        data=("d",),
    )

    assert 512 + 512 == decided.recipe.max_length
    assert 72 == decided.recipe.steps


def test_precision_follows_the_hardware():
    """bfloat16 where it is native, else float16 on a GPU and float32 on a CPU."""
    v100 = Device("cuda", "V100", 1, 16 * 2**30, False, (7, 0))
    old_cpu = replace(CPU, bf16=False)
    tiny = base_of(1000)

    assert "bfloat16" == make(spec()).recipe.precision
    assert "float16" == make(spec(), device=v100).recipe.precision
    assert "float32" == make(spec(), base=tiny, device=old_cpu).recipe.precision


def base_of(hidden):
    config = {"model_type": "phi3", "hidden_size": hidden, "num_attention_heads": 4}
    return Base("tiny", "r", presets.facts(config | {"num_hidden_layers": 2, "vocab_size": 1000}))


def test_the_run_id_is_the_recipe_and_nothing_else():
    """Another device or micro-batch keeps it; data, seed, base revision or a library change it."""

    def frozen(job, device=H100, data=("d",), base=BASE):
        return plan.freeze(make(job, base=base, device=device), job, rows=500, data=data)

    same = frozen(spec())

    assert same.recipe.run_id == frozen(spec(), device=replace(H100, name="H200")).recipe.run_id
    assert same.recipe.run_id == frozen(replace(spec(), name="other")).recipe.run_id
    others = [
        frozen(spec(seed=1)),
        frozen(spec(), data=("e",)),
        frozen(spec(), base=replace(BASE, revision="b")),
        frozen(spec(method="qlora")),
        frozen(spec(over_length="drop")),
        frozen(spec(train_share=0.9)),
        frozen(spec(train_share=0.9, shuffle_seed=7)),
    ]
    assert same.recipe.run_id == frozen(spec(over_length="auto", shuffle_seed=7)).recipe.run_id
    assert 8 == len({same.recipe.run_id, *(other.recipe.run_id for other in others)})


def test_a_recipe_survives_json():
    """What plan.json holds gives the same run id back."""
    recipe = plan.freeze(make(spec("qlora")), spec("qlora"), rows=9, data=("d",)).recipe

    back = plan.recipe_from_json(json.loads(json.dumps(asdict(recipe))))

    assert (recipe, recipe.run_id) == (back, back.run_id)


def test_packing_that_would_mix_rows_is_refused():
    """Falcon's attention sees across packed rows: no packing by default, an error if asked for."""
    falcon = presets.find("falcon-7b")
    base = Base(falcon.hub_id, falcon.revision, falcon.facts)

    assert not make(spec(), base=base).recipe.packing
    with pytest.raises(SpecError, match="PLAN-104"):
        make(spec(packing=True), base=base)


def test_what_cannot_work_together_is_refused_with_every_reason():
    """Model, method and device are judged in one pass."""
    with pytest.raises(SpecError, match=r"PLAN-102 .* needs a GPU"):
        make(spec(), device=CPU)
    phi = presets.find("phi-4")
    packed = replace(phi.facts, stored="gptq")
    with pytest.raises(SpecError, match=r"PLAN-101 .*gptq") as caught:
        make(spec(), base=Base(phi.hub_id, phi.revision, packed), device=CPU)
    assert ["PLAN-101", "PLAN-102"] == [p.code for p in caught.value.problems]


@pytest.mark.parametrize(
    ("chosen", "code"),
    [
        ({"target_modules": ("q_proj", "o_proj")}, "PLAN-111"),
        ({"exclude_modules": ("gate_proj",)}, "PLAN-111"),
        ({"target_modules": ("qkv_proj", "mlp.down_proj", "all-linear")}, None),
        ({"target_modules": ("model.layers.0.self_attn.qkv_proj",)}, None),
    ],
)
def test_modules_that_the_model_lacks_are_refused_before_it_is_loaded(chosen, code):
    """KAITO's quick start names q_proj for a model that has qkv_proj, and trains two layers."""
    phi = presets.find("phi-3-mini-4k-instruct")
    base = Base(phi.hub_id, phi.revision, phi.facts)
    if code is None:
        make(spec(**chosen), base=base)
        return
    with pytest.raises(SpecError, match=rf"{code} .*use some of down_proj, gate_up_proj, o_proj"):
        make(spec(**chosen), base=base)


def test_a_number_of_steps_is_known_before_the_data():
    drafted = make(spec(max_steps=7))

    assert 7 == drafted.recipe.steps
    assert ("set in the config", "max_steps decides") == (
        drafted.reasons["steps"],
        drafted.reasons["epochs"],
    )


def test_a_longer_length_than_the_model_reads_is_refused():
    """max_length beyond the context names both numbers."""
    with pytest.raises(SpecError, match=r"is 200000, but .* at most 131072 tokens"):
        make(spec(max_length=200_000))


def test_a_draft_needs_neither_data_nor_network():
    """The spec alone gives a plan for its machine type; an unknown hub model says why not."""
    draft = plan.draft(replace(spec("qlora"), instance="standard_nc6s_v3"), here=CPU)

    assert ("float16", None) == (draft.recipe.precision, draft.to_json()["run_id"])
    with pytest.raises(SpecError, match="PLAN-107 someone/model"):
        plan.draft(spec(preset="someone/model"), here=H100)


def test_a_batch_that_the_user_set_is_kept_by_placement():
    """4 rows at once, 8 times, are 32 rows a step."""
    decided = make(spec(micro_batch=4, accumulation=8))

    assert (32, 4, 8) == (
        decided.recipe.global_batch,
        decided.placement.micro_batch,
        decided.placement.accumulation,
    )


def test_less_memory_at_a_time_is_the_same_recipe():
    """Half the rows at once, down to one, then checkpointing; the global batch never changes."""
    placed = plan.Placement("cpu", 1, 6, 2, False, "sdpa")

    ways = plan.fallbacks(placed)

    assert [(6, 2), (3, 4), (1, 12), (1, 12)] == [(w.micro_batch, w.accumulation) for w in ways]
    assert [False, False, False, True] == [way.checkpointing for way in ways]
    assert [] == plan.fallbacks(ways[-1])[1:]


def test_the_disk_must_hold_three_checkpoints_and_the_adapter_with_its_image():
    """Rank 16 on all projections of Phi-3-mini: 25 million numbers, twelve times in 4 bytes."""
    recipe = plan.make(spec(), BASE, H100, lengths=CHAT, versions={}).recipe

    assert 25_165_824 * 12 * 4 == plan.disk_bytes(replace(recipe, rank=16, targets=None), BASE)
    assert 0 == plan.disk_bytes(recipe, replace(BASE, facts=None))


def test_a_tiny_model_on_a_cpu_gets_one_thread_and_a_reason():
    """More threads only wait for each other there; a GPU or a larger model is left to torch."""
    tiny = make(spec(), base=base_of(64), device=CPU)

    assert 1 == tiny.placement.threads
    assert "wait" in tiny.reasons["threads"]
    assert make(spec()).placement.threads is None
    assert "threads" not in asdict(tiny.recipe)


@pytest.mark.parametrize("warmup", [100, 3, 72, 1000000])
def test_a_warm_up_that_never_ends_is_refused(warmup):
    """Every step would learn at less than the learning rate that was set."""
    asked = spec(warmup=warmup, max_steps=3)

    with pytest.raises(SpecError, match=r"PLAN-114 .*of 3 steps, so that learning_rate is never"):
        plan.freeze(make(asked), asked, rows=24, data=("d",))


@pytest.mark.parametrize(("warmup", "steps"), [(2, 2), (0, 0), (0.5, 2), (0.6, 3), (None, 1)])
def test_a_warm_up_within_the_run_is_taken(warmup, steps):
    """A number, or a share of the steps; the default leaves a step to learn."""
    asked = spec(warmup=warmup, max_steps=4 if warmup == 0.6 else 3)

    frozen = plan.freeze(make(asked), asked, rows=24, data=("d",))

    assert min(steps, frozen.recipe.steps - 1) == frozen.recipe.warmup_steps


FOUR_BITS = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
}


def test_a_base_in_4_bits_decides_how_it_is_packed():
    """The recipe says what the weights are; what the user sets otherwise is refused at once."""
    config = {"quantization_config": FOUR_BITS}
    packed = Base("org/four", "main", replace(PHI.facts, stored="bitsandbytes 4-bit"), config)

    recipe = make(spec(method="qlora"), base=packed).recipe
    assert {"type": "fp4", "double": False, "compute": "bfloat16"} == recipe.quantisation
    same = make(spec(method="qlora", quant_type="fp4", compute_dtype="float16"), base=packed)
    assert {"type": "fp4", "double": False, "compute": "float16"} == same.recipe.quantisation
    with pytest.raises(SpecError, match="PLAN-117") as caught:
        make(spec(method="qlora", quant_type="nf4", double_quant=True), base=packed)
    assert 2 == len(caught.value.problems)
    with pytest.raises(SpecError, match=r"PLAN-101 org/four: .*4 bits.*set tuning.method to qlora"):
        make(spec(), base=packed)


@pytest.mark.parametrize(("stored", "supported"), [("fp8", True), ("gptq", False)])
def test_an_unknown_family_is_judged_by_its_config(stored, supported):
    """As one with a preset is."""
    config = {"model_type": "nobody", "quantization_config": {"quant_method": stored}}
    unknown = Base("org/model-GPTQ", "main", None, config)

    if supported:
        plan.refuse_unsupported(spec(), unknown, H100)
    else:
        with pytest.raises(SpecError, match=r"PLAN-101 .*\(gptq\).*probably org/model"):
            plan.refuse_unsupported(spec(), unknown, H100)


@pytest.mark.parametrize(
    ("preset", "attention"),
    [
        ("gpt-oss-20b", "torch_varlen"),
        ("gpt-oss-20b", "sdpa"),
        ("falcon-7b", "torch_varlen"),
        ("falcon-7b", "flex_attention"),
    ],
)
def test_an_attention_that_the_class_has_not_is_refused(preset, attention):
    """A run would take another in silence, or fail once the weights are loaded."""
    asked = spec("lora", preset, attention=attention)
    with pytest.raises(SpecError, match=r"PLAN-112 ModelConfig.attn_implementation"):
        plan.make(asked, plan.known_base(asked), H100, lengths=None, versions={})
    assert plan.make(
        replace(asked, settings=replace(asked.settings, attention="eager")),
        plan.known_base(asked), H100, lengths=None, versions={},
    ).placement.attention == "eager"  # fmt: skip


def test_offloading_on_a_cpu_is_ignored_and_said():
    """Also of a model so small that its memory is not asked for."""
    asked = spec("lora", activation_offloading=True)
    tiny = replace(BASE, facts=replace(PHI.facts, parameters=10**6))
    made = plan.make(asked, tiny, plan.device.cpu(), lengths=None, versions={})
    assert "ignored: it is for GPUs" == made.reasons["activation_offloading"]
    assert not made.placement.activation_offloading


def test_packing_is_no_advice_for_a_card_that_cannot():
    """bitsandbytes has no kernels for an M60."""
    asked = spec("lora", "phi-4-mini-reasoning")
    card = {"gpu": presets.gpu("M60"), "memory_bytes": 7 << 30, "capability": (7, 5)}
    device = replace(plan.device_of("Standard_NC4as_T4_v3"), **card)
    with pytest.raises(SpecError) as refused:
        plan.make(asked, plan.known_base(asked), device, lengths=None, versions={})
    assert "PLAN-120" in str(refused.value) and "use method qlora" not in str(refused.value)


def test_targets_that_are_all_excluded_are_refused():
    """Nothing would be left to train."""
    every = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")
    for chosen in (
        {"exclude_modules": every},
        {"target_modules": every[:1], "exclude_modules": every[:1]},
    ):
        asked = spec("lora", "llama-3.1-8b-instruct", **chosen)
        with pytest.raises(SpecError, match=r"PLAN-111 .*leaves nothing"):
            plan.make(asked, plan.known_base(asked), H100, lengths=None, versions={})


def test_a_precision_without_coefficients_is_planned_as_an_unknown_size():
    """float32 on a GPU is in no preset's table: a simulation is wanted, and no error raised."""
    asked = spec("qlora", "llama-3.1-8b-instruct", dtype="float32")
    known = plan.known_base(asked)
    made = plan.make(asked, known, H100, lengths=None, versions={})

    assert plan.wants_simulation(known, H100, asked)
    assert made.fit is None and made.placement.checkpointing
    assert "unknown" in made.reasons["checkpointing"]
    usual = spec("qlora", "llama-3.1-8b-instruct")
    assert not plan.wants_simulation(known, H100, usual)


def test_a_base_that_is_unpacked_takes_the_memory_of_16_bits():
    """Its preset's numbers hold for it; those of a base with layers left in 16 bits do not."""
    fp8 = Base("org/fp8", "main", replace(PHI.facts, stored="fp8"))
    kept = {"quantization_config": FOUR_BITS | {"llm_int8_skip_modules": ["model.layers.0.mlp"]}}
    mixed = Base("org/four", "main", replace(PHI.facts, stored="bitsandbytes 4-bit"), kept)

    assert BASE.sized(H100).coefficients == fp8.sized(H100).coefficients
    assert mixed.sized(H100) is None
    assert plan.wants_simulation(mixed, H100, spec())
