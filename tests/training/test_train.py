"""A training run repeats, stops, goes on and fails as promised: real tiny runs, real signals."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny_models
import tiny_runs
import torch
from trl import SFTTrainer

from tuning import adapter, files, process
from tuning.errors import DataError, DivergedError, OutOfMemoryError, Stopped
from tuning.models import packed
from tuning.plan import Recipe
from tuning.plan.backends import FUSED, VARLEN
from tuning.training import checkpoint, train, trainer
from tuning.training.arguments import sft_config

Base = Callable[..., Path]

RECIPES = {
    "lora": tiny_runs.recipe(packing=True),
    "qlora": tiny_runs.recipe(method="qlora", packing=True),
    "padded": tiny_runs.recipe(eval_steps=3),
    "best": tiny_runs.recipe(eval_steps=3, keep_best=True, learning_rate=0.05, schedule="constant"),
    "fp16": tiny_runs.recipe(precision="float16", packing=True),
    "long": tiny_runs.recipe(method="qlora", packing=True, steps=30),
    # what has fewer than 4,096 numbers keeps its state in 32 bits
    "8-bit": tiny_runs.recipe(optimizer="adamw_8bit", packing=True, rank=64),
    "fast": tiny_runs.recipe(method="qlora", packing=True, dropout=0.0),
}
FAST = tiny_runs.placement(attention=VARLEN, kernels=FUSED)
CLEAN: dict[str, dict[str, Any]] = {}


def request(
    run: Path, base: Base, name: str, *, recipe: Recipe | None = None, **more: Any
) -> dict[str, Any]:
    """A request for the recipe called `name`: 17 rows make epochs of five steps.

    The one that keeps its best weights learns one row by heart.
    """
    packing = RECIPES[name].packing
    usual = FAST if name == "fast" else tiny_runs.placement()
    return tiny_runs.request(
        run,
        base("llama"),
        recipe or RECIPES[name],
        more.pop("placement", usual),
        count=51 if packing else 1 if name == "best" else 17,
        held_out=6 if name in ("padded", "best") else 0,
        **more,
    )


@pytest.fixture
def clean(tiny_base: Base, tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """What an undisturbed run of a recipe gives; each run once a session."""

    def result(name: str) -> dict[str, Any]:
        if name not in CLEAN:
            CLEAN[name] = train.work(request(tmp_path / "clean", tiny_base, name))
        return CLEAN[name]

    return result


def steps_logged(run: Path) -> list[int]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["step"] for record in records if "eval_loss" not in record]


def evaluations(run: Path) -> dict[int, float]:
    """The loss of the evaluation split by the step after which it was measured, in their order."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {each["step"]: each["eval_loss"] for each in records if "eval_loss" in each}


def packed_states(run: Path) -> set[str]:
    """Kinds of optimizer state that are really kept in 8 bits."""
    (saved,) = (run / "checkpoints").glob("*-*")
    tensors = adapter.header(saved / "optimizer.safetensors")
    return {n.rpartition(".")[2] for n, t in tensors.items() if t.dtype == "U8"}


def tree(folder: Path) -> dict[str, str]:
    return {p.name: files.digest_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_two_runs_give_the_same_adapter_byte_for_byte(
    clean: Any, tiny_base: Base, tmp_path: Path
) -> None:
    """All files of the adapter are equal, whatever folder the run and the base were in."""
    clean("lora")
    here = request(tmp_path / "here", tiny_base, "lora")
    moved = shutil.copytree(here["base"], tmp_path / "moved")
    there = request(tmp_path / "there", tiny_base, "lora") | {"base": str(moved)}

    first, second = train.work(here), train.work(there)

    assert tree(tmp_path / "here" / "adapter") == tree(tmp_path / "there" / "adapter")
    assert CLEAN["lora"]["adapter_sha256"] == first["adapter_sha256"] == second["adapter_sha256"]
    assert str(tmp_path) not in (tmp_path / "there/adapter/adapter_config.json").read_text()


@pytest.mark.parametrize(
    ("name", "step", "batch", "saved"),
    [
        ("lora", 3, 0, 3),  # within an accumulation: the step before is saved
        ("lora", 6, 1, 7),  # in a step's last micro-batch: the step is finished and saved
        ("lora", 5, 0, 5),  # within the first step of the second epoch
        ("qlora", 3, 0, 3),
        ("qlora", 4, 0, 5),  # an epoch's last step, of one micro-batch
        ("padded", 3, 0, 3),  # after an evaluation
        ("best", 6, 0, 7),  # after two evaluations, with the best weights so far
        ("fp16", 3, 0, 3),
        ("8-bit", 3, 0, 3),
        ("fast", 3, 0, 3),
        ("fast", 6, 1, 7),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(
    name: str,
    step: int,
    batch: int,
    saved: int,
    clean: Any,
    tiny_base: Base,
    signal_at: Any,
    tmp_path: Path,
) -> None:
    """SIGTERM at any micro-batch: exit 75, and the rerun ends in the same adapter."""
    expected = clean(name)
    asked = request(tmp_path / "run", tiny_base, name)

    signal_at(step, batch)
    with pytest.raises(Stopped) as stopped:
        train.work(asked)
    assert 75 == stopped.value.exit_code
    assert not (tmp_path / "run" / "adapter").exists()

    if name == "8-bit":
        assert 2 == len(packed_states(tmp_path / "run"))
    result = train.work(asked)

    assert saved == result["resumed_from"]
    assert expected["adapter_sha256"] == result["adapter_sha256"]
    assert expected["loss_by_step"] == result["loss_by_step"]
    assert expected["eval_loss_before"] == result["eval_loss_before"]
    assert expected["eval_loss_after"] == result["eval_loss_after"]
    assert expected["best_step"] == result["best_step"]
    assert expected["tokens"] == result["tokens"]
    assert list(range(1, 9)) == steps_logged(tmp_path / "run")


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    clean: Any, tiny_base: Base, signal_at: Any, tmp_path: Path, caplog: Any
) -> None:
    """The newest checkpoint is cut: it is put aside and named, and the result is the same."""
    expected = clean("lora")
    asked = request(tmp_path / "run", tiny_base, "lora", save_steps=2)
    signal_at(7, 0)
    with pytest.raises(Stopped):
        train.work(asked)
    root = tmp_path / "run" / "checkpoints"
    newest = max(root.iterdir())
    weights = newest / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])

    result = train.work(asked)

    assert 6 == result["resumed_from"]
    assert expected["adapter_sha256"] == result["adapter_sha256"]
    assert [newest.name] == [p.name for p in (root / "quarantine").iterdir()]
    assert f"checkpoint {newest.name} is damaged (weights.safetensors" in caplog.text


def test_a_run_goes_on_with_another_micro_batch(
    clean: Any, tiny_base: Base, signal_at: Any, tmp_path: Path
) -> None:
    """The placement may change under the same recipe: same rows, same steps, almost equal loss."""
    expected = clean("padded")
    asked = request(tmp_path / "run", tiny_base, "padded")
    signal_at(6, 0)
    with pytest.raises(Stopped):
        train.work(asked)

    other = tiny_runs.placement(micro_batch=1, accumulation=4, checkpointing=True)
    result = train.work(request(tmp_path / "run", tiny_base, "padded", placement=other))

    assert 6 == result["resumed_from"]
    assert expected["tokens"] == result["tokens"]
    assert expected["loss_by_step"] == pytest.approx(result["loss_by_step"], abs=0.05)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_fast_kernels_change_nothing_but_the_time(
    method: str, packing: bool, tiny_base: Base, tmp_path: Path
) -> None:
    """By document, fused, in one pass: the losses of plain kernels, in float32."""
    quantised = tiny_runs.NF4 | {"compute": "float32"} if method == "qlora" else None
    recipe = tiny_runs.recipe(
        method=method, packing=packing, dropout=0.0, precision="float32", quantisation=quantised
    )
    found = [
        train.work(
            tiny_runs.request(
                tmp_path / str(number), tiny_base("llama"), recipe, placement,
                count=51 if packing else 17, held_out=5,
            )
        )
        for number, placement in enumerate(
            (tiny_runs.placement(), FAST, replace(FAST, checkpointing=True))
        )
    ]  # fmt: skip

    assert ["sdpa", VARLEN, VARLEN] == [result["attention"] for result in found]
    plain, fast, again = found
    assert fast["loss_by_step"] == again["loss_by_step"]
    assert plain["loss_by_step"] == pytest.approx(fast["loss_by_step"], abs=1e-5)
    assert plain["eval_loss_before"] == pytest.approx(fast["eval_loss_before"], abs=1e-5)
    assert plain["eval_loss_after"] == pytest.approx(fast["eval_loss_after"], abs=1e-5)
    assert plain["tokens"] == fast["tokens"]


def test_a_run_goes_on_with_other_kernels(
    clean: Any, tiny_base: Base, signal_at: Any, tmp_path: Path
) -> None:
    """Kernels are placement: a run begun with fast ones ends without, almost the same."""
    expected = clean("fast")
    asked = request(tmp_path / "run", tiny_base, "fast")
    signal_at(5, 0)
    with pytest.raises(Stopped):
        train.work(asked)

    plain = tiny_runs.placement()
    result = train.work(request(tmp_path / "run", tiny_base, "fast", placement=plain))

    assert 5 == result["resumed_from"]
    assert expected["loss_by_step"] == pytest.approx(result["loss_by_step"], abs=0.02)


def test_packed_weights_are_remembered(
    clean: Any, tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second start of the same base packs nothing, and trains the same adapter."""
    expected = clean("fast")
    monkeypatch.setattr(packed, "WORTHWHILE", 0)
    memory = tmp_path / "memory"
    train.work(request(tmp_path / "one", tiny_base, "fast", packed=str(memory)))
    (kept,) = (memory / "packed").iterdir()
    written = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}

    result = train.work(request(tmp_path / "two", tiny_base, "fast", packed=str(memory)))

    assert packed.is_whole(kept)
    monkeypatch.setenv("RANK", "1")  # of several, only the first writes
    packed.save(None, memory / "packed" / "second")
    assert [kept] == list((memory / "packed").iterdir())
    assert written == {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    assert expected["adapter_sha256"] == result["adapter_sha256"]


def test_a_finished_run_trains_nothing_again(tiny_base: Base, tmp_path: Path) -> None:
    """Asked again, it puts the same adapter in place from its last checkpoint."""
    asked = request(tmp_path / "run", tiny_base, "padded")
    first = train.work(asked)
    shutil.rmtree(tmp_path / "run" / "adapter")

    again = train.work(asked)

    assert 8 == again["resumed_from"]
    for name in ("adapter_sha256", "loss_by_step", "eval_loss_before", "eval_loss_after"):
        assert first[name] == again[name], name


def test_another_recipe_never_goes_on_from_a_checkpoint(
    tiny_base: Base, tmp_path: Path, caplog: Any
) -> None:
    """A changed setting is another run: it starts at the first step and says why."""
    train.work(request(tmp_path / "run", tiny_base, "lora"))
    recipe = replace(RECIPES["lora"], learning_rate=4e-3)

    result = train.work(request(tmp_path / "run", tiny_base, "lora", recipe=recipe))

    assert result["resumed_from"] is None
    assert "left alone, of another recipe" in caplog.text


def test_nothing_in_a_run_is_a_pickle(tiny_base: Base, tmp_path: Path) -> None:
    """Checkpoints and adapter are JSON, safetensors and templates."""
    train.work(request(tmp_path / "run", tiny_base, "lora", save_steps=4))

    made = {
        p.suffix for p in (tmp_path / "run").rglob("*") if p.is_file() and "data" not in p.parts
    }

    assert {".json", ".jsonl", ".safetensors", ".jinja"} == made
    assert 2 == len(list((tmp_path / "run" / "checkpoints").iterdir()))


def test_progress_is_told_step_by_step(clean: Any, tiny_base: Base, tmp_path: Path) -> None:
    """metrics.jsonl has the promised fields, and the held-out loss where there was one."""
    train.work(request(tmp_path / "run", tiny_base, "padded"))

    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    fields = {"step", "steps", "epoch", "loss", "lr", "grad_norm", "tokens"}
    fields |= {"tokens_per_second", "eta_seconds", "memory_bytes"}
    assert fields == set(records[0])
    assert [3, 6, 8] == [record["step"] for record in records if "eval_loss" in record]
    assert 0 == records[-1]["eta_seconds"]


def test_divergence_stops_before_the_weights_change(tiny_base: Base, tmp_path: Path) -> None:
    """An absurd learning rate: exit 13 with step, rate and rows; the last good state is kept."""
    recipe = replace(RECIPES["padded"], learning_rate=1e20, max_grad_norm=0.0, eval_steps=None)
    asked = request(tmp_path / "run", tiny_base, "padded", recipe=recipe, save_steps=1)

    with pytest.raises(DivergedError, match=r"TRAIN-13[01] step \d: .* learning rate .*rows \d+"):
        train.work(asked)

    assert not (tmp_path / "run" / "adapter").exists()
    for folder in (tmp_path / "run" / "checkpoints").glob("*-*"):
        weights = checkpoint.unpack_tensors((folder / "weights.safetensors").read_bytes())
        assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


def test_a_poisoned_weight_is_caught(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in a LoRA weight in the middle of a run ends it at that very step."""
    original = trainer.Exact.training_step

    def poisoned(self: trainer.Exact, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            next(iter(self.trained().values())).data.view(-1)[0] = math.nan
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer.Exact, "training_step", poisoned)

    with pytest.raises(DivergedError, match="TRAIN-130 step 4: the loss became nan"):
        train.work(request(tmp_path / "run", tiny_base, "lora"))


def test_an_adapter_that_learned_nothing_is_no_success(tiny_base: Base, tmp_path: Path) -> None:
    """Learning rate 0: every lora_B stays zero, and nothing is put in place."""
    recipe = replace(RECIPES["lora"], learning_rate=0.0)

    with pytest.raises(DivergedError, match=r"TRAIN-133 .*every lora_B is zero"):
        train.work(request(tmp_path / "run", tiny_base, "lora", recipe=recipe))

    assert not (tmp_path / "run" / "adapter").exists()


def test_rows_without_labels_are_refused(tiny_base: Base, tmp_path: Path) -> None:
    """All labels masked: exit 10 before the model is loaded."""
    asked = request(tmp_path / "run", tiny_base, "lora")
    masked = [{"input_ids": [5, 6, 7], "labels": [-100] * 3, "seq_lengths": [3]}] * 9
    tiny_runs.write_rows(Path(asked["train"]), masked)

    with pytest.raises(DataError, match="TRAIN-101"):
        train.work(asked | {"base": "/nowhere"})


def test_out_of_memory_loses_no_finished_step(
    clean: Any, tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent learns that memory ran out and with what; the run goes on from the last step."""
    expected = clean("lora")
    original = SFTTrainer.training_step

    def full(self: trainer.Exact, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        if self.state.global_step == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    asked = request(tmp_path / "run", tiny_base, "lora")
    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "training_step", full)
        with pytest.raises(OutOfMemoryError, match="TRAIN-140 cpu: out of memory with 2 rows"):
            train.work(asked)
    result = train.work(asked)

    assert 5 == result["resumed_from"]
    assert expected["adapter_sha256"] == result["adapter_sha256"]


def test_a_signal_while_loading_stops_at_once(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing to save yet: exit 75, and nothing is left behind."""
    before = signal.getsignal(signal.SIGTERM)

    def told(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on")

    monkeypatch.setattr(train, "load_for_training", told)

    with pytest.raises(Stopped):
        train.work(request(tmp_path / "run", tiny_base, "lora"))

    assert ["data"] == [p.name for p in (tmp_path / "run").iterdir()]
    assert before == signal.getsignal(signal.SIGTERM)


@pytest.mark.parametrize("name", ["padded", "best"])
def test_a_stop_during_an_evaluation_does_not_wait_for_its_end(
    name: str, clean: Any, tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step before the evaluation is saved, and the rerun ends in the same adapter.

    It makes up for the evaluation that was broken off.
    """
    expected = clean(name)
    original = trainer.Exact.prediction_step

    def told(self: trainer.Exact, *args: Any, **kwargs: Any) -> Any:
        if self.is_in_train and self.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)  # a second signal changes nothing
        return original(self, *args, **kwargs)

    asked = request(tmp_path / "run", tiny_base, name)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Exact, "prediction_step", told)
        with pytest.raises(Stopped):
            train.work(asked)
    result = train.work(asked)

    assert 3 == result["resumed_from"]
    assert [3, 6, 8] == list(evaluations(tmp_path / "run"))
    assert expected["adapter_sha256"] == result["adapter_sha256"]
    assert expected["best_step"] == result["best_step"]


def test_the_best_weights_are_kept_when_asked(clean: Any, tiny_base: Base, tmp_path: Path) -> None:
    """The adapter is that of the evaluation with the lowest loss, whichever step that is."""
    kept = clean("best")
    last = train.work(
        request(
            tmp_path / "last", tiny_base, "best", recipe=replace(RECIPES["best"], keep_best=False)
        )
    )

    losses = evaluations(tmp_path / "last")
    best = min(losses, key=lambda step: losses[step])
    assert best == kept["best_step"]
    assert last["best_step"] is None
    assert kept["loss_by_step"] == last["loss_by_step"]
    assert kept["eval_loss_after"] <= last["eval_loss_after"]
    assert (best == 8) == (kept["adapter_sha256"] == last["adapter_sha256"])


def test_of_the_evaluations_the_lowest_loss_is_kept(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses of 3, 1 and 2 after steps 3, 6 and 8: the adapter is that of step 6."""
    prescribed = {3: 3.0, 6: 1.0, 8: 2.0}
    weights: dict[int, dict[str, torch.Tensor]] = {}
    original = trainer.Exact.evaluation_loop

    def evaluated(self: trainer.Exact, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        if self.state.global_step not in weights:  # the last evaluation is of the best weights
            weights[self.state.global_step] = {n: p.clone() for n, p in self.trained().items()}
            output.metrics["eval_loss"] = prescribed.get(self.state.global_step, 9.0)
        return output

    monkeypatch.setattr(trainer.Exact, "evaluation_loop", evaluated)

    result = train.work(request(tmp_path / "run", tiny_base, "best"))

    assert prescribed == evaluations(tmp_path / "run")
    assert 6 == result["best_step"]
    stored = safetensors.torch.load_file(tmp_path / "run" / "adapter" / adapter.WEIGHTS)
    kept = {name.replace(".default.", "."): value for name, value in weights[6].items()}
    assert {name: value.bfloat16().tolist() for name, value in kept.items()} == {
        name: value.tolist() for name, value in stored.items()
    }


def test_held_out_rows_are_answered_in_the_run_directory(tiny_base: Base, tmp_path: Path) -> None:
    """samples.jsonl: the prompt up to the first answer, and three answers: data, base, tuned."""
    train.work(request(tmp_path / "run", tiny_base, "padded"))

    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]

    rows = [row["messages"] for row in tiny_models.message_rows(6, 2)][:3]
    assert [turns[-1]["content"] for turns in rows] == [each["expected"] for each in samples]
    for turns, sample in zip(rows, samples, strict=True):
        assert turns[-2]["content"] in sample["prompt"]
        assert {"prompt", "expected", "base", "tuned"} == set(sample)


def test_saving_often_changes_nothing(clean: Any, tiny_base: Base, tmp_path: Path) -> None:
    """A checkpoint after every step by time, and the same adapter."""
    asked = request(tmp_path / "run", tiny_base, "lora", save_seconds=0)

    assert clean("lora")["adapter_sha256"] == train.work(asked)["adapter_sha256"]
    assert 2 == len(list((tmp_path / "run" / "checkpoints").iterdir()))


def test_fp16_keeps_lora_weights_in_float32(clean: Any, tiny_base: Base, tmp_path: Path) -> None:
    """fp16 base, float32 LoRA and loss scaling learn; the adapter is stored in fp16."""
    expected = clean("fp16")
    asked = request(tmp_path / "run", tiny_base, "fp16")
    result = train.work(asked)

    assert expected["adapter_sha256"] == result["adapter_sha256"]
    assert result["loss_last"] < result["loss_first"]
    stored = adapter.inspect(tmp_path / "run" / "adapter").tensors
    assert {"F16"} == {tensor.dtype for tensor in stored.values()}
    (newest,) = (tmp_path / "run" / "checkpoints").glob("*-*")
    weights = checkpoint.unpack_tensors((newest / "weights.safetensors").read_bytes())
    assert {torch.float32} == {tensor.dtype for tensor in weights.values()}
    assert json.loads((newest / "state.json").read_text())["scaler"]["scale"] > 0


def test_questions_are_answered_before_and_after(tiny_base: Base, tmp_path: Path) -> None:
    """Each question comes back with the base's and the tuned model's answer."""
    asked = request(tmp_path / "run", tiny_base, "lora", questions=["cat dog", "one two"])

    answers = train.work(asked)["answers"]

    assert ["cat dog", "one two"] == [answer["question"] for answer in answers]
    assert {"question", "base", "tuned"} == set(answers[0])


def test_the_child_process_stops_and_goes_on(clean: Any, tiny_base: Base, tmp_path: Path) -> None:
    """As the parent runs it: SIGTERM once some steps are told, exit 75, the same adapter after."""
    expected = clean("long")
    run = tmp_path / "run"
    asked = request(run, tiny_base, "long")

    def some_steps() -> bool:
        return (run / "metrics.jsonl").exists() and len(steps_logged(run)) >= 2

    with pytest.raises(Stopped, match="RUN-130"):
        process.run(
            "training.train", run / "train.json", asked, log=run / "log", stop_asked=some_steps
        )
    result = process.run("training.train", run / "train.json", asked, log=run / "log")

    assert result["resumed_from"] >= 2
    assert expected["adapter_sha256"] == result["adapter_sha256"]


def test_the_learning_rate_waits_for_a_step_that_overflowed(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16 begins with a scale that overflows: those steps change no weight and no schedule."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", partial(scaler, init_scale=2.0**19))
    asked = request(tmp_path / "run", tiny_base, "fp16")

    result = train.work(asked)

    (newest,) = (tmp_path / "run" / "checkpoints").glob("*-*")
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    state = json.loads((newest / "state.json").read_text())
    skipped = 19 - math.log2(state["scaler"]["scale"])  # each halves the scale
    assert 0 < skipped < len(rates)
    assert len(rates) - skipped == state["scheduler"]["last_epoch"]
    assert [rates[0]] * int(skipped) == rates[: int(skipped)]
    assert skipped == result["skipped_steps"] == state["progress"]["skipped"]


def test_qlora_keeps_lora_weights_in_float32_in_bfloat16_too(
    tiny_base: Base, tmp_path: Path
) -> None:
    """The weights and Adam's state; in bfloat16 late steps would be rounded away."""
    recipe = tiny_runs.recipe(method="qlora", precision="bfloat16", packing=True)
    asked = request(tmp_path / "run", tiny_base, "qlora", recipe=recipe)

    train.work(asked)

    (newest,) = (tmp_path / "run" / "checkpoints").glob("*-*")
    for name in ("weights", "optimizer"):
        tensors = checkpoint.unpack_tensors((newest / f"{name}.safetensors").read_bytes())
        assert {torch.float32} == {tensor.dtype for tensor in tensors.values()}
    stored = adapter.inspect(tmp_path / "run" / "adapter").tensors
    assert {"BF16"} == {tensor.dtype for tensor in stored.values()}


def test_several_gpus_walk_no_graph_for_unused_weights(tmp_path: Path) -> None:
    """Every adapter is used in every micro-batch, and no buffer changes: nothing is looked for."""
    made = sft_config(RECIPES["lora"], tiny_runs.placement(), tmp_path)

    assert made.ddp_find_unused_parameters is False
    assert made.ddp_broadcast_buffers is False
