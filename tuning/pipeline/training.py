"""The phase "train": one child at a time, with smaller micro-batches after out-of-memory."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import tuning.plan as plan
from tuning import files, process
from tuning.adapter import CONFIG, WEIGHTS, write_config
from tuning.console import Report
from tuning.errors import Killed, OutOfMemoryError, Stopped, TransientError, TuningError
from tuning.oci import delivery
from tuning.pipeline import endings, model_card, outcome
from tuning.pipeline.changes import changed
from tuning.pipeline.run import TRAIN, Run, Value, key_of
from tuning.plan import Plan
from tuning.sources import base

KILLS = 4  # of the training child, with one placement, that end a run


def train(
    run: Run, decided: Plan, packed: Value, model: base.Base, *, weights: Callable[[], Path]
) -> Value:
    """The training child's result, or that of another machine which has pushed the same run."""
    recipe = decided.recipe
    pushed = _claim(run, recipe.run_id)
    key = key_of(recipe.run_id, run.options.questions)
    if pushed is not None and run.journal.done("train", key) is None:
        run.begin("train")
        adopt = partial(run.interruptible, lambda: _adopt(run, pushed, model))
        return run.journal.do("train", key, adopt, outputs=lambda _: _trained(run))
    output = run.folder / "adapter" / WEIGHTS
    trained = is_trained(run, recipe.run_id)
    if not trained and (changes := changed(output.parent, recipe)):
        text = "the adapter in this run directory was trained otherwise and will be replaced: "
        run.console.say(f"  {text}{', '.join(changes)}", style="yellow")
    folder = Path() if trained else weights()
    size = f"{recipe.global_batch} x {recipe.max_length} tokens"
    run.begin("train", f"Training {recipe.steps:,} steps of {size} on {decided.device} ...")
    request = {
        "run": str(run.folder),
        "base": str(folder),
        "base_name": str(model.folder or recipe.base_model),  # what PEFT and transformers can load
        "base_revision": model.revision,
        "preset": run.spec.preset,
        "recipe": asdict(recipe),
        "placement": asdict(decided.placement),
        "train": packed["train"]["path"],
        "eval": packed["eval"]["path"] if packed["eval"] else None,
        "adapter": str(run.folder / "adapter"),
        "questions": list(run.options.questions),
        "chat_template": run.spec.settings.chat_template,
        "start": str(run.start.folder) if run.start else None,
        "packed": str(run.options.cache or files.cache_folder()),
        "kept": str(run.folder / "log" / "trained.json"),
        "save_steps": run.spec.settings.save_steps,
    }

    def work() -> Value:
        with run.console.work("Training", unit="steps") as report:
            done = _fitting(run, request, decided, report)
        run.note(f"after training: {what}" for what in done.get("lost", ()))
        if unread := done.get("unread_layers"):
            run.note(
                [
                    f"the files of the base have {len(unread)} layers more than its config.json "
                    f"(from {unread[0]} on): they were not loaded, and the adapter is without them"
                ]
            )
        if skipped := done.get("skipped_steps"):
            run.note(
                [
                    f"{skipped:,} of {recipe.steps:,} steps changed nothing: their float16 "
                    "gradients overflowed, as the first ones do until the scale is found"
                ]
            )
        if stopped := done.get("stopped"):
            run.note([f"stopped {model_card.stopped_text(stopped, recipe.steps)}"])
        if done.get("resumed_from"):
            run.note([f"continued from the checkpoint of step {done['resumed_from']:,}"])
        if files.digest_file(output) != done["adapter_sha256"]:
            raise run.journal.damaged("train", output)
        return done

    return run.journal.do("train", key, work, outputs=lambda _: _trained(run), needs=("pack",))


def is_trained(run: Run, run_id: str) -> bool:
    """Whether this run directory has the adapter of the run already."""
    key = key_of(run_id, run.options.questions)
    there = (run.folder / "adapter" / WEIGHTS).exists()
    return run.journal.current("train", key) is not None and there


def _trained(run: Run) -> list[Path]:
    """The files that training leaves in adapter/, the weights at least; others come later."""
    folder = run.folder / "adapter"
    there = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    weights = folder / WEIGHTS
    return sorted({weights, *(p for p in there if p.name not in model_card.NAMES)})


def _claim(run: Run, run_id: str) -> str | None:
    """Check the tag again before the GPU is used, now that the run id is known.

    Returns the digest if another machine has pushed the same run.
    """
    run.begin("tag")
    destination, access = run.spec.destination, run.options.access
    return delivery.claim(destination, access, run_id=run_id, own=run.own_digests())


def _adopt(run: Run, pushed: str, model: base.Base) -> Value:
    """Pull the adapter of the same run from the registry instead of training it again."""
    run.console.say(f"The registry has this run's adapter: {pushed}. Nothing is trained.")
    adapter = run.folder / "adapter"
    shutil.rmtree(adapter, ignore_errors=True)
    name = f"{run.spec.destination.image}".partition("@")[0] + f"@{pushed}"
    access = replace(run.options.access, pull_secret=run.options.access.push_secret)
    delivery.pull(name, adapter, access=access, console=run.console)
    if model.folder:
        write_config(adapter, adapter / CONFIG, base_model=str(model.folder))
    weights = files.digest_file(adapter / "adapter_model.safetensors")
    return model_card.training(files.read_json(adapter / "tuning.json")) | {
        "adapter_sha256": weights
    }


def _fitting(run: Run, request: Value, decided: Plan, report: Report) -> Value:
    """Train; after each out-of-memory, continue from the last checkpoint with a smaller placement.

    Out of memory is the child's OutOfMemoryError, or a SIGKILL that the kernel counts as one. The
    journal counts both, so that a later start tries the next placement. The run id stays.
    """
    placements = plan.fallbacks(
        decided.placement, offload=decided.offloads, looks_up=decided.looks_up
    )
    key = key_of(decided.recipe.run_id, asdict(placements[0]), decided.device.name)
    failures = sum((r["event"], r["key"]) == ("oom", key) for r in run.journal.records)
    first = min(failures, len(placements) - 1)
    for number, placement in enumerate(placements[first:], first):
        if number:
            run.console.say(f"  out of memory before, so now {_shape(placement)}", style="yellow")
        placed = request | {"placement": asdict(placement)}
        try:
            return _persistent(run, placed, placement, report)
        except (OutOfMemoryError, endings.KilledForMemory) as error:
            run.journal.append("train", "oom", key, way=_shape(placement), message=str(error))
    raise _out_of_memory(decided, placements)


def _persistent(run: Run, request: Value, placement: plan.Placement, report: Report) -> Value:
    """Train with one placement, again from the last checkpoint if the child is killed.

    Whoever sent the signal, it is no reason for another placement. After KILLS of them, Killed.
    Another machine that stops or is lost is waited for.
    """
    group = run.group(placement.ranks // placement.nodes, placement.nodes)
    left = KILLS
    while True:
        try:
            return _finished(run, request, _watched(run, report), group)
        except Stopped as error:
            if run.stop.is_set() or placement.nodes == 1:
                raise
            _await_others(run, error)
        except TransientError as error:
            if error.problems[0].code != endings.LOST:
                raise
            _await_others(run, error)
        except endings.KilledForMemory:
            raise
        except Killed as error:
            left -= 1
            if not left:
                raise
            run.journal.append("train", "killed", message=str(error))
            run.console.say(f"  {error.problems[0].what}; trying again", style="yellow")


def _await_others(run: Run, error: TuningError) -> None:
    """Say that another machine is gone, which may come back."""
    run.journal.append("train", "lost", message=str(error))
    what = "another machine was stopped or lost: waiting for it, to go on from the last checkpoint"
    run.console.say(f"  {what}", style="yellow")


def _finished(run: Run, request: Value, tick: Callable[[], None], group: process.Group) -> Value:
    """The child's result. What fails once the adapter is in place does not undo the training."""
    kept = Path(request["kept"])
    kept.unlink(missing_ok=True)  # of an earlier try
    try:
        return run.child(TRAIN, request, tick=tick, group=group)
    except Stopped:
        raise
    except TuningError as error:
        try:
            result: Value = files.read_json(kept)
            weights = files.digest_file(run.folder / "adapter" / WEIGHTS)
        except (OSError, ValueError):
            raise error from None
        if weights != result["adapter_sha256"]:
            raise
        return result | {"lost": [f"what follows it was lost: {error}"]}


def _out_of_memory(decided: Plan, placements: list[plan.Placement]) -> OutOfMemoryError:
    what = f"out of memory with each of: {'; '.join(map(_shape, placements))}"
    if decided.fit is not None:
        terms = sorted(decided.fit.memory.terms.items(), key=lambda term: -term[1])
        estimate = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in terms if size)
        what += f". Planned in GiB: {estimate}"
    change = "use a machine with more memory, a smaller model or method qlora, or lower max_length"
    return OutOfMemoryError.at("RUN-140", decided.device.name, what, change)


def _watched(run: Run, report: Report) -> Callable[[], None]:
    """A tick that reports each step, and raises Hung when the child makes no progress."""
    dog = run.options.watchdog()
    names = ("metrics.jsonl", "checkpoints", "adapter", f"log/{run.phase}.log")
    paths = [run.folder / name for name in names]
    before = outcome.metrics_state(run.folder)  # of an earlier start: steps that may be redone

    def tick() -> None:
        now, progress = time.monotonic(), outcome.progress(run.folder)
        if progress is not None and outcome.metrics_state(run.folder) != before:
            _report_step(progress, report)
            give_steps(run)
        changed = [path.stat().st_mtime_ns for path in paths if path.exists()]
        dog.observe(changed, step=progress["step"] if progress else None, now=now)
        if (silence := dog.silence(now)) is not None:
            raise process.Hung(silence)

    return tick


def give_steps(run: Run) -> None:
    """Give new records to the caller's on_step; an exception of it stops the run, state saved."""
    if run.options.on_step is None or run.raised:
        return
    run.steps = run.steps or outcome.Follower(run.folder)
    try:
        for record in run.steps.new():
            run.options.on_step(record)
    except Exception as error:
        run.raised = error
        run.stop.set()


def _report_step(now: Value, report: Report) -> None:
    note = f"loss {now.get('loss', 0):.3f}  {now.get('tokens_per_second', 0):,.0f} tokens/s"
    report(now["step"], now.get("steps"), note)


def _shape(placement: plan.Placement) -> str:
    checkpointing = " with gradient checkpointing" if placement.checkpointing else ""
    if placement.recomputed_layers is not None:
        checkpointing += f" of {placement.recomputed_layers} layers"
    checkpointing += ", layer inputs in host memory" if placement.activation_offloading else ""
    checkpointing += ", MLPs in tiles" if placement.tiled_mlp else ""
    checkpointing += ", input embeddings there, too" if placement.host_embeddings else ""
    return f"{placement.micro_batch} x {placement.accumulation} rows{checkpointing}"
