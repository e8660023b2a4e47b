"""DPO and KTO: trl's losses and gradients, a reference that is made once, exact resume."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
import ranks
import tiny_runs
import torch
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from tuning import adapter, files
from tuning.errors import Stopped
from tuning.models.load import load_for_training
from tuning.plan import Placement, Recipe
from tuning.plan.backends import FUSED, VARLEN
from tuning.training import train
from tuning.training.distributed import Ranks
from tuning.training.interruption import Interruption
from tuning.training.preferences import Preferring

Base = Callable[..., Path]
Row = dict[str, Any]

SETTINGS: dict[str, Any] = {"beta": 0.3, "precision": "float32", "dropout": 0.0}
RECIPES = {
    "dpo": tiny_runs.recipe(objective="dpo", **SETTINGS),
    "kto": tiny_runs.recipe(objective="kto", **SETTINGS),
    "qlora": tiny_runs.recipe(objective="kto", method="qlora", beta=0.3, eval_steps=3),
}
FAST = tiny_runs.placement(attention=VARLEN, kernels=FUSED)


def rows(base: Path, count: int, *, objective: str, seed: int = 1) -> list[Row]:
    """Tokenised rows: pairs of answers to one prompt, or answers that are good in turns."""
    made = tiny_runs.rows(base, 2 * count, seed=seed)
    found = []
    for number in range(count):
        first, second = made[2 * number : 2 * number + 2]
        prompt = first["labels"].count(-100)
        answer = second["input_ids"][second["labels"].count(-100) :]
        both = [first, {
            "input_ids": first["input_ids"][:prompt] + answer,
            "labels": [-100] * prompt + answer,
        }]  # fmt: skip
        kept = both if objective == "dpo" else both[number % 2 :][:1]
        found.append(
            {name: [i for each in kept for i in each[name]] for name in ("input_ids", "labels")}
            | {"seq_lengths": [len(each["input_ids"]) for each in kept]}
            | ({"good": number % 2 == 0} if objective == "kto" else {})
        )
    return found


def write(path: Path, made: list[Row]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {"good": pyarrow.bool_()}
    schema = pyarrow.schema([(n, kinds.get(n, pyarrow.list_(pyarrow.int32()))) for n in made[0]])
    with pyarrow.ipc.new_stream(path, schema) as stream:
        stream.write_table(pyarrow.Table.from_pylist(made, schema=schema))
    return str(path)


def request(
    run: Path, base: Path, recipe: Recipe, placement: Placement, *, count: int = 17, **more: Any
) -> Row:
    """A request with 17 rows, so that epochs have five steps, and three held-out ones."""
    objective = str(recipe.objective)
    data = {
        name: write(run / "data" / name, rows(base, number, objective=objective, seed=seed))
        for name, number, seed in (("train", count, 1), ("eval", 3, 2))
    }
    return tiny_runs.request(run, base, recipe, placement) | data | more


def loop_of(run: Path, base: Path, recipe: Recipe, placement: Placement) -> Preferring:
    """A trainer before its first step."""
    asked = train.Request.from_json(request(run, base, recipe, placement, count=4))
    tuned, tokenizer, _ = load_for_training(base, recipe=recipe, placement=placement)
    with Interruption() as stop:
        loop = train._trainer(asked, stop, Ranks(), tuned, tokenizer, train.read_rows(asked.train))
    assert isinstance(loop, Preferring)
    return loop


def parts(row: Row) -> tuple[list[int], list[list[int]]]:
    """The prompt of a row, and its answers."""
    answers, start, prompt = [], 0, 0
    for length in row["seq_lengths"]:
        labels = row["labels"][start : start + length]
        prompt = labels.count(-100)
        answers.append(labels[prompt:])
        start += length
    return row["input_ids"][:prompt], answers


def trl_inputs(made: list[Row], objective: str, pad: int) -> Row:
    """A batch of these rows as trl's collator makes it."""
    if objective == "dpo":
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        examples = [
            dict(zip(names, (prompt, *answers), strict=True))
            for prompt, answers in map(parts, made)
        ]
        return dict(DataCollatorForPreference(pad)(examples))
    others = [parts(row)[1][0] for row in (made[-1], *made[:-1])]
    examples = [
        {
            "prompt_ids": parts(row)[0],
            "completion_ids": parts(row)[1][0],
            "KL_completion_ids": other,
            "label": row["good"],
        }
        for row, other in zip(made, others, strict=True)
    ]
    return dict(DataCollatorForUnpairedPreference(pad)(examples))


def trls(folder: Path, objective: str, tuned: Any, tokenizer: Any, count: int) -> Any:
    """trl's own trainer of `tuned`, whose adapter has not been trained yet."""
    text = {"prompt": "one ", "chosen": "two", "rejected": "three"}
    rated = {"prompt": "one ", "completion": "two", "label": True}
    classes = {"dpo": (DPOTrainer, DPOConfig, text), "kto": (KTOTrainer, KTOConfig, rated)}
    kind, config, row = classes[objective]
    return kind(
        model=tuned,
        args=config(
            output_dir=str(folder),
            beta=0.3,
            use_cpu=True,
            bf16=False,
            report_to="none",
            per_device_train_batch_size=count,
            gradient_checkpointing=False,
        ),
        train_dataset=datasets.Dataset.from_list([row] * 2 * count),
        processing_class=tokenizer,
    )


def disturb(tuned: Any) -> dict[str, torch.Tensor]:
    """Train LoRA's B, by chance; returns all trained weights."""
    generator = torch.Generator().manual_seed(5)
    trained = {
        name: p for name, p in tuned.named_parameters() if p.requires_grad and ".ref." not in name
    }
    with torch.no_grad():
        for name, parameter in trained.items():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return trained


@pytest.mark.parametrize("objective", ["dpo", "kto"])
@pytest.mark.parametrize("placed", ["padded", "padding-free, fused"])
def test_loss_and_gradients_are_those_of_trls_own_trainer(
    objective: str, placed: str, tiny_base: Base, tmp_path: Path
) -> None:
    """In float32 to rounding, whether sequences are padded or laid end to end, in micro-batches."""
    base, recipe = tiny_base("llama"), RECIPES[objective]
    placement = tiny_runs.placement() if placed == "padded" else FAST
    loop = loop_of(tmp_path / "run", base, recipe, placement)
    dataset = loop.train_dataset.add_column("reference", loop._reference()[:4])
    batches = [
        loop._prepare_inputs(loop.data_collator([dataset[n] for n in some]))
        for some in ((0, 1), (2, 3))
    ]
    ours = disturb(loop.model)
    loop.model.train()
    count = loop._get_num_items_in_batch(batches, "cpu")
    found = sum(loop.compute_loss(loop.model, b, num_items_in_batch=count) for b in batches)
    found.backward()

    plain = tiny_runs.placement()
    tuned, tokenizer, _ = load_for_training(base, recipe=recipe, placement=plain)
    theirs = trls(tmp_path / "trl", objective, tuned, tokenizer, 4)
    weights = disturb(tuned)
    for name, parameter in weights.items():
        assert torch.equal(parameter, ours[name])
    made = rows(base, 4, objective=objective)
    inputs = trl_inputs(made, objective, tokenizer.pad_token_id)
    tuned.train()
    expected = theirs.compute_loss(tuned, inputs)
    expected.backward()

    assert expected.item() == pytest.approx(found.item(), rel=1e-5)
    mine, trl_s = (torch.cat([w[n].grad.flatten() for n in weights]) for w in (ours, weights))
    assert float((mine - trl_s).norm() / trl_s.norm()) < 1e-5


def sums(result: Row) -> tuple[Any, ...]:
    """What a run measured, and the sha256 of its adapter."""
    names = ("adapter_sha256", "loss_by_step", "tokens", "eval_loss_before", "eval_loss_after")
    rewards = sorted(name for name in result if name.startswith("eval_reward"))
    return tuple(result[name] for name in (*names, *rewards))


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """`stops(method, call)`: this process gets SIGTERM before that call of a trainer's method."""

    def put(name: str, call: int) -> None:
        original, left = getattr(Preferring, name), [call]

        def method(self: Preferring, *args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == -1:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Preferring, name, method)

    return put


@pytest.mark.parametrize(("name", "placement"), [("dpo", FAST), ("qlora", tiny_runs.placement())])
def test_a_stopped_run_goes_on_bit_for_bit(
    name: str, placement: Placement, tiny_base: Base, stops: Any, tmp_path: Path
) -> None:
    """SIGTERM while the reference is made, in a step, and in the second epoch: the same adapter."""
    base = tiny_base("llama")
    expected = sums(train.work(request(tmp_path / "clean", base, RECIPES[name], placement)))
    asked = request(tmp_path / "run", base, RECIPES[name], placement)

    for method, call in (
        ("_start_log_probabilities", 3),
        ("training_step", 5),
        ("training_step", 7),
    ):
        stops(method, call)
        with pytest.raises(Stopped) as stopped:
            train.work(asked)
        assert 75 == stopped.value.exit_code
    result = train.work(asked)

    assert result["resumed_from"] >= 5
    assert expected == sums(result)


def test_the_reference_is_made_once_and_made_again_only_if_it_is_damaged(
    tiny_base: Base, stops: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on reads it; a cut file is put aside, and the result is the same."""
    base, placement = tiny_base("llama"), tiny_runs.placement()
    calls: list[int] = []
    original = Preferring._start_log_probabilities

    def counted(self: Preferring, examples: Any) -> Any:
        calls.append(len(examples))
        return original(self, examples)

    monkeypatch.setattr(Preferring, "_start_log_probabilities", counted)
    asked = request(tmp_path / "run", base, RECIPES["dpo"], placement)
    stops("training_step", 4)
    with pytest.raises(Stopped):
        train.work(asked)
    made = len(calls)
    stops("training_step", 2)
    with pytest.raises(Stopped):
        train.work(asked)
    assert made == len(calls) == 10  # 17 rows and three held out, two at once

    (kept,) = (tmp_path / "run" / "data" / "reference").iterdir()
    file = kept / "log_probabilities.json"
    assert 20 == len(json.loads(file.read_text()))
    file.write_bytes(file.read_bytes()[:-3])
    result = train.work(asked)

    assert 2 * made == len(calls)
    clean = request(tmp_path / "clean", base, RECIPES["dpo"], placement)
    assert sums(train.work(clean)) == sums(result)


def test_an_adapter_to_go_on_from_is_the_reference(tiny_base: Base, tmp_path: Path) -> None:
    """Preferring after SFT: what is compared with is the tuned model and not its base."""
    base, placement = tiny_base("llama"), tiny_runs.placement()
    train.work(tiny_runs.request(tmp_path / "sft", base, tiny_runs.recipe(), placement))
    start = str(tmp_path / "sft" / "adapter")
    digest = files.digest_file(Path(start, adapter.WEIGHTS))
    recipe = replace(RECIPES["dpo"], start_adapter=digest)

    result = train.work(request(tmp_path / "run", base, recipe, placement, start=start))
    bare = train.work(request(tmp_path / "bare", base, RECIPES["dpo"], placement))

    assert 0.5 == result["eval_reward_accuracy_before"] == bare["eval_reward_accuracy_before"]
    assert 0.0 == result["eval_reward_margin_before"] == bare["eval_reward_margin_before"]
    first, second = (
        json.loads(next((tmp_path / n / "data/reference").rglob("log*.json")).read_text())
        for n in ("run", "bare")
    )
    assert first[0] != pytest.approx(second[0], abs=1e-2)


def test_each_step_tells_accuracy_and_margin(tiny_base: Base, tmp_path: Path) -> None:
    """metrics.jsonl has both for the step's rows, and for held-out rows at each evaluation."""
    recipe = replace(RECIPES["kto"], eval_steps=4)
    train.work(request(tmp_path / "run", tiny_base("llama"), recipe, tiny_runs.placement()))

    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record for record in records if "eval_loss" not in record]
    assert 0.5 == steps[0]["reward_accuracy"]
    assert max(record["reward_margin"] or 0 for record in steps[-3:]) > 0
    assert [4, 8] == [record["step"] for record in records if "eval_reward_accuracy" in record]


def test_another_micro_batch_trains_the_same(tiny_base: Base, tmp_path: Path) -> None:
    """KTO's KL is measured over the rows of a step, so that memory does not decide about it."""
    base = tiny_base("llama")
    results = [
        train.work(
            request(
                tmp_path / str(size),
                base,
                RECIPES["kto"],
                tiny_runs.placement(micro_batch=size, accumulation=4 // size),
            )
        )
        for size in (1, 4)
    ]

    assert results[0]["loss_by_step"] == pytest.approx(results[1]["loss_by_step"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_two_ranks_train_what_one_does(objective: str, tiny_base: Base, tmp_path: Path) -> None:
    """Each scores rows of its own for the reference and the KL; fillers weigh nothing."""
    results = []
    for count in (1, 2):
        placed = tiny_runs.placement(ranks=count, micro_batch=1, accumulation=4 // count)
        run = tmp_path / str(count)
        asked = request(run, tiny_base("llama"), RECIPES[objective], placed)
        data = {name: asked[name] for name in ("train", "eval")}
        recipe, base = RECIPES[objective], tiny_base("llama")
        results.append(ranks.train(run, base, placed, recipe=recipe, **data))

    one, two = results
    assert one["loss_by_step"] == pytest.approx(two["loss_by_step"], rel=1e-4)
    assert one["tokens"] == two["tokens"]
    for name in ("eval_loss_after", "eval_reward_accuracy_after", "eval_reward_margin_after"):
        assert one[name] == pytest.approx(two[name], rel=1e-3)
