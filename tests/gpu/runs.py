"""What whole runs on a GPU must show: a kill survived, a full card, planned memory.

Written as checks.py, for any device and size.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import commands
import tiny_models
import tiny_runs
import torch
import transformers
from gpu.checks import CARD, Record, Sizes
from torch.distributed.device_mesh import init_device_mesh

import tuning.plan as plan
from tuning.errors import OutOfMemoryError
from tuning.models.shards import Split
from tuning.plan.backends import FUSED, VARLEN
from tuning.training import distributed, train


def base_model(folder: Path, sizes: Sizes) -> Path:
    """A Phi-3 with random weights, made on the device, with a tokenizer."""
    if (folder / "tokenizer.json").exists():
        return folder
    tokenizer = tiny_models.build_tokenizer("phi3")
    _, shape, _ = tiny_models.FAMILIES["phi3"]
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos")}
    config = transformers.Phi3Config(
        **shape | sizes.model | ends,
        vocab_size=max(sizes.vocabulary, len(tokenizer)),
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device(sizes.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def yaml_to_image(sizes: Sizes, folder: Path) -> Record:
    """QLoRA from a Workspace to an image, killed with SIGKILL in the middle, and started again."""
    base = base_model(folder / "base", sizes)
    rows = folder / "rows.jsonl"
    made = tiny_models.message_rows(sizes.rows)
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    settings = {"max_steps": sizes.steps, "save_steps": 2, "learning_rate": 1e-4}
    workspace = commands.workspace(folder / "job.yaml", method="qlora", settings=settings)
    run, image = folder / "run", folder / "image"
    command = [
        sys.executable, "-m", "tuning", "run", "-f", str(workspace), "--base-model", str(base),
        "--data", str(rows), "--run-dir", str(run), "--output", f"oci:{image}",
    ]  # fmt: skip
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    killed = _killed(command, run, environment)
    began = time.monotonic()
    again = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=400, check=False
    )
    assert 0 == again.returncode, again.stdout + again.stderr
    lines = (run / "metrics.jsonl").read_text().splitlines()
    metrics = {entry["step"]: entry for entry in map(json.loads, lines)}
    assert list(range(1, sizes.steps + 1)) == sorted(metrics)
    assert all(entry["loss"] and 0 < entry["loss"] < 20 for entry in metrics.values())
    journal = map(json.loads, (run / "journal.jsonl").read_text().splitlines())
    (trained,) = (r["value"] for r in journal if (r["phase"], r["event"]) == ("train", "end"))
    assert trained["resumed_from"] >= 2
    assert (image / "index.json").is_file()
    placed = json.loads((run / "plan.json").read_text())
    return {
        "killed_at_step": killed,
        "resumed_from": trained["resumed_from"],
        "seconds_to_finish": time.monotonic() - began,
        "losses": [entry["loss"] for entry in metrics.values()],
        "peak_memory_bytes": max(entry["memory_bytes"] for entry in metrics.values()),
        "tokens_per_second": metrics[sizes.steps]["tokens_per_second"],
        "plan": {key: placed.get(key) for key in ("device", "placement", "memory")},
    }


def _killed(command: list[str], run: Path, environment: dict[str, str]) -> int:
    """Start the command and kill it once a checkpoint is there; the step it had come to."""
    running = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )
    deadline = time.monotonic() + 400
    while not list(run.glob("checkpoints/[!.]*/MANIFEST.json")):
        if running.poll() is not None or time.monotonic() > deadline:
            running.kill()
            assert running.stderr is not None
            raise AssertionError(f"no checkpoint: {running.stderr.read().decode()[-3000:]}")
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)  # the child dies with its parent
    running.communicate()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return max(json.loads(line)["step"] for line in lines)


def out_of_memory(sizes: Sizes, folder: Path) -> Record:
    """With too little memory the same run goes on with fewer rows at once, and finishes.

    The memory is that of the most frugal placement, and half as much again.
    """
    shape = {"hidden_size": 1024, "intermediate_size": 4096} if sizes is CARD else {}
    base = tiny_models.build("llama", folder / "base", **shape)
    recipe = tiny_runs.recipe(
        packing=True, dropout=0.0, global_batch=sizes.batch, steps=2, max_length=sizes.row_tokens
    )
    first = tiny_runs.placement(
        device=sizes.device,
        micro_batch=sizes.batch,
        accumulation=1,
        attention=VARLEN,
        kernels=FUSED,
    )
    ways = plan.fallbacks(first)
    _forget()
    frugal = _train(folder / "frugal", base, recipe, ways[-1], sizes)
    _forget()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(1.5 * frugal["peak_memory_bytes"] / total)
    tried: list[int] = []
    try:
        for way in ways:
            tried.append(way.micro_batch)
            try:
                done = _train(folder / "limited", base, recipe, way, sizes)
                break
            except OutOfMemoryError as error:
                assert "TRAIN-140" in str(error)
            _forget()
        else:
            raise AssertionError(f"nothing fits: {tried}")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(tried) > 1, "it fitted at once"
    assert done["loss_by_step"] == _about(frugal["loss_by_step"])
    return {"rows_at_once": tried, "losses": done["loss_by_step"], "frugal": asdict(ways[-1])}


def _forget() -> None:
    """Free what an earlier training in this process left; the product's is a process of its own."""
    gc.collect()
    torch.cuda.empty_cache()


def _about(losses: list[float]) -> Any:
    import pytest

    return pytest.approx(losses, rel=0.02)


def _train(folder: Path, base: Path, recipe: Any, placement: Any, sizes: Sizes) -> Record:
    """One training in this process, of rows that are as long as allowed."""
    torch.cuda.reset_peak_memory_stats()
    request = tiny_runs.request(folder, base, recipe, placement, count=0)
    ids = [5 + n % 200 for n in range(sizes.row_tokens)]
    row = {"input_ids": ids, "labels": ids, "seq_lengths": [sizes.row_tokens]}
    tiny_runs.write_rows(folder / "data" / "train.arrow", [row] * (2 * sizes.batch))
    return train.work(request)


def resumed(sizes: Sizes, folder: Path) -> Record:
    """Training that stops at a checkpoint and goes on is training that never stopped."""
    base = tiny_models.build("llama", folder / "base")
    found = {}
    for method in sizes.methods:
        recipe = tiny_runs.recipe(method=method, packing=True, dropout=0.0, steps=4)
        placement = tiny_runs.placement(device=sizes.device, attention=VARLEN, kernels=FUSED)
        whole = tiny_runs.request(folder / f"{method}-whole", base, recipe, placement, count=51)
        parts = tiny_runs.request(folder / f"{method}-parts", base, recipe, placement, count=51)
        expected = train.work(whole)["loss_by_step"]
        _cut(train.work, parts | {"save_steps": 2})
        done = train.work(parts)
        assert 2 == done["resumed_from"]
        found[method] = {"whole": expected, "parts": done["loss_by_step"]}
        assert found[method]["parts"] == _about(expected)
    return found


def shared(sizes: Sizes, folder: Path) -> Record:
    """A model that ranks share (FSDP2), here one rank, trains as one that is whole; both timed."""
    base = base_model(folder / "base", sizes)
    found = {}
    for method in sizes.methods:
        recipe = tiny_runs.recipe(method=method, packing=True, dropout=0.0, steps=sizes.steps)
        placement = tiny_runs.placement(
            device=sizes.device,
            attention=VARLEN if sizes.device == "cuda" else "sdpa",
            kernels=FUSED,
            checkpointing=True,
        )
        made = {}
        for way in ("whole", "shared"):
            request = tiny_runs.request(
                folder / f"{method}-{way}", base, recipe, placement, count=51
            )
            with _one_shard(sizes.device) if way == "shared" else contextlib.nullcontext():
                made[way] = train.work(request)
        assert made["shared"]["loss_by_step"] == _about(made["whole"]["loss_by_step"])
        found[method] = {
            way: {key: done[key] for key in ("loss_by_step", "seconds", "peak_memory_bytes")}
            for way, done in made.items()
        }
    return found


@contextlib.contextmanager
def _one_shard(device: str) -> Iterator[None]:
    """Inside, a training shares its model over the ranks of a group of one."""
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(
        backend, store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    own = distributed.Ranks.split
    mesh = init_device_mesh(device, (1,), mesh_dim_names=("shards",))
    distributed.Ranks.split = lambda *_: Split(mesh)  # type: ignore[method-assign]
    try:
        yield
    finally:
        distributed.Ranks.split = own  # type: ignore[method-assign]
        torch.distributed.destroy_process_group()


def _cut(work: Callable[..., Any], request: Record) -> None:
    """Run until the first checkpoint is written, and no further."""
    from tuning.training import checkpoint

    class Cut(Exception):
        """Power off."""

    own = checkpoint.save

    def save(*arguments: Any, **options: Any) -> None:
        own(*arguments, **options)
        raise Cut

    checkpoint.save = save
    try:
        work(request)
    except Cut:
        return
    finally:
        checkpoint.save = own
    raise AssertionError("no checkpoint was written")


def planned_memory(folder: Path, *, dry: bool) -> Record:
    """The estimate beside the measured peak of six ways to train; a random model of each preset."""
    from benchmarks import gpu_plan

    cases = gpu_plan.dry_cases()[:2] if dry else tuple(gpu_plan.CASES[n] for n in PLANNED)
    lines = folder / "plan.jsonl"
    summary = gpu_plan.run(cases, lines, seconds=200)
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    measured = [line for line in found if line["kind"] == "measured"]
    assert len(cases) == len(measured) == summary["cases"]
    assert summary["met"] or dry, summary
    return {"summary": summary, "cases": measured}


# Phi-3: LoRA, LoRA and QLoRA in one pass, fp16; Llama: LoRA and QLoRA in one pass, short rows.
PLANNED = (0, 14, 3, 7, 16, 17)
