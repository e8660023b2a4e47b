"""What a GPU must show, written once for any device: real sizes on a card, tiny ones on a CPU.

Each function asserts what must hold and returns what it measured, for the record. `Sizes` says how
large. tests/gpu runs them on a GPU, tests/fake_cuda on the fake device (the code, no kernel of
NVIDIA's).
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import commands
import tiny_models
import tiny_runs
import torch
import torch.nn.functional as F
import transformers

from tuning import plan
from tuning.errors import OutOfMemoryError
from tuning.models.kernels import attention, head, norm
from tuning.plan.backends import FUSED, VARLEN
from tuning.training import train

Record = dict[str, Any]
HALF = 0.02  # relative: roundings of bfloat16 are a third of it, another function is tenths off


@dataclass(frozen=True)
class Sizes:
    """How large the checks are."""

    device: str
    lengths: tuple[int, ...]  # tokens of the packed documents
    heads: tuple[tuple[int, int, int], ...]  # of queries, of keys, and their width
    width: int
    vocabulary: int
    model: Record  # changes to a tiny Phi-3
    steps: int  # of the run from YAML to image
    rows: int  # chats that it reads
    batch: int  # rows at once that are too many for the limited memory
    row_tokens: int
    methods: tuple[str, ...] = ("lora", "qlora")  # that are stopped and resumed


CARD = Sizes(
    "cuda",
    lengths=(1, 700, 2048, 37, 1310),
    heads=((32, 32, 96), (32, 8, 128), (32, 32, 80), (16, 4, 64), (8, 4, 256)),
    width=4096,
    vocabulary=32064,
    model={
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "sliding_window": 2047,
    },
    steps=12,
    rows=600,
    batch=64,
    row_tokens=1024,
)
TINY = Sizes(
    "cuda",
    lengths=(1, 7, 20, 5),
    heads=((4, 4, 16), (4, 2, 16)),
    width=64,
    vocabulary=300,
    model={},
    steps=20,
    rows=60,
    batch=8,
    row_tokens=64,
    methods=("qlora",),
)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative difference, in float32 on the CPU."""
    found, expected = found.detach().float().cpu(), expected.detach().float().cpu()
    return float((found - expected).norm() / expected.norm())


def _differentiated(
    function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], grad: torch.Tensor
) -> list[torch.Tensor]:
    """The function's value and its gradients for `inputs`."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.device, out.dtype))]


def _compared(
    ours: Callable[..., torch.Tensor],
    theirs: Callable[..., torch.Tensor],
    inputs: list[torch.Tensor],
    shape: tuple[int, ...],
) -> float:
    """The largest relative error of the value and the gradients; `theirs` is run in float32."""
    grad = torch.randn(shape)
    found = _differentiated(ours, inputs, grad)
    expected = _differentiated(theirs, [t.float() for t in inputs], grad)
    return max(map(_error, found, expected))


# Kernels.


def varlen(sizes: Sizes) -> Record:
    """torch's variable-length flash kernel against attention document by document in float32.

    Forward and gradients, for the head shapes of the presets, with and without a window.
    """
    torch.manual_seed(0)
    offsets = torch.tensor([0, *sizes.lengths]).cumsum(0).to(sizes.device, torch.int32)
    tokens, longest, errors = sum(sizes.lengths), max(sizes.lengths), {}
    for (heads, kv, width), window in [(h, w) for h in sizes.heads for w in (None, 4)]:
        shapes = [(tokens, n, width) for n in (heads, kv, kv)]
        inputs = [torch.randn(s, device=sizes.device).to(torch.bfloat16) for s in shapes]
        reach = None if window is None else longest // window

        def kernel(q: Any, k: Any, v: Any, reach: int | None = reach) -> torch.Tensor:
            return attention.by_kernel(q, k, v, offsets, longest=longest, scale=None, window=reach)

        def documents(q: Any, k: Any, v: Any, reach: int | None = reach) -> torch.Tensor:
            return attention.by_document(q, k, v, offsets, scale=None, window=reach)

        key = f"{heads}/{kv} heads of {width}, window {reach}"
        errors[key] = _compared(kernel, documents, inputs, shapes[0])
    assert max(errors.values()) < HALF, errors
    return {"errors": errors}


def sdpa(sizes: Sizes) -> Record:
    """torch's own attention, which picks its kernel, with and without a mask."""
    torch.manual_seed(0)
    length, errors = max(sizes.lengths), {}
    for heads, kv, width in sizes.heads:
        shapes = [(2, n, length, width) for n in (heads, kv, kv)]
        inputs = [torch.randn(s, device=sizes.device).to(torch.bfloat16) for s in shapes]
        seen = torch.ones(length, length, dtype=torch.bool, device=sizes.device).tril()
        grouped = kv != heads

        def attend(q: Any, k: Any, v: Any, grouped: bool = grouped, **mask: Any) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **mask)

        def by_hand(q: Any, k: Any, v: Any, seen: torch.Tensor = seen) -> torch.Tensor:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v

        for name, mask in (("causal", {"is_causal": True}), ("mask", {"attn_mask": seen})):
            key = f"{heads}/{kv} heads of {width}, {name}"

            def ours(q: Any, k: Any, v: Any, mask: Record = mask) -> torch.Tensor:
                return attend(q, k, v, **mask)

            errors[key] = _compared(ours, by_hand, inputs, shapes[0])
    assert max(errors.values()) < HALF, errors
    return {"errors": errors}


def rms_norm(sizes: Sizes) -> Record:
    """The norm that the card runs, and Gemma's, against the formula in float32."""
    torch.manual_seed(0)
    errors = {}
    for lifted in (False, True):
        x = torch.randn(3, 50, sizes.width, device=sizes.device).to(torch.bfloat16) * 4
        weight = torch.randn(sizes.width, device=sizes.device).to(torch.bfloat16)

        def ours(x: Any, weight: torch.Tensor = weight, lifted: bool = lifted) -> torch.Tensor:
            return norm.rms_norm(x, weight, 1e-6, lifted=lifted)

        def formula(x: Any, weight: torch.Tensor = weight, lifted: bool = lifted) -> torch.Tensor:
            scaled = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
            return scaled * (weight.float() + lifted)

        errors["1 + w" if lifted else "w"] = _compared(ours, formula, [x], tuple(x.shape))
    assert max(errors.values()) < HALF, errors
    return {"errors": errors}


def one_pass_head(sizes: Sizes) -> Record:
    """The loss in tiles and its gradient against cross-entropy on all logits."""
    torch.manual_seed(0)
    length, device = 4 * sum(sizes.lengths), sizes.device
    weight = torch.randn(sizes.vocabulary, sizes.width, device=device) * 0.02
    labels = torch.randint(sizes.vocabulary, (1, length), device=device)
    labels[:, ::3] = head.IGNORED
    hidden = torch.randn(1, length, sizes.width, device=device)
    errors = {}
    for dtype in (torch.bfloat16, torch.float16):

        def ours(x: Any, dtype: torch.dtype = dtype) -> torch.Tensor:
            return head.loss(x, weight.to(dtype), None, labels)

        def plain(x: Any, dtype: torch.dtype = dtype) -> torch.Tensor:
            logits = (x[:, :-1] @ weight.to(dtype).float().t()).flatten(0, 1)
            targets = labels[0, 1:]
            return F.cross_entropy(logits, targets, ignore_index=head.IGNORED, reduction="sum")

        errors[str(dtype)] = _compared(ours, plain, [hidden.to(dtype)], ())
    assert max(errors.values()) < HALF, errors
    return {"errors": errors}


def nf4(sizes: Sizes) -> Record:
    """Weights packed on the CPU are those packed on the card, and unpack to the same numbers."""
    torch.manual_seed(0)
    found = {}
    for dtype in (torch.bfloat16, torch.float16):
        weight = (torch.randn(sizes.width, 3 * sizes.width) * 0.02).to(dtype)
        packed = []
        for device in ("cpu", sizes.device):
            values, state = bnb.functional.quantize_4bit(
                weight.to(device), compress_statistics=True, quant_type="nf4"
            )
            unpacked = bnb.functional.dequantize_4bit(values, state)
            packed.append([t.cpu() for t in (values, state.absmax, state.offset, unpacked)])
        names = ("packed", "absmax", "offset", "unpacked")
        found[str(dtype)] = {
            name: float((a != b).float().mean()) for name, a, b in zip(names, *packed, strict=True)
        }
    assert all(not share for shares in found.values() for share in shares.values()), found
    return {"share that differs": found}


# Runs.


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


# Memory.


def planned_memory(folder: Path, *, dry: bool) -> Record:
    """The estimate beside the measured peak of six ways to train; a random model of each preset."""
    from benchmarks import gpu_plan

    cases = gpu_plan.dry_cases()[:2] if dry else tuple(gpu_plan.CASES[n] for n in PLANNED)
    lines = folder / "plan.jsonl"
    summary = gpu_plan.run(cases, lines, seconds=150)
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    measured = [line for line in found if line["kind"] == "measured"]
    assert len(cases) == len(measured) == summary["cases"]
    assert summary["met"] or dry, summary
    return {"summary": summary, "cases": measured}


# Phi-3: LoRA, LoRA and QLoRA in one pass, fp16; Llama: LoRA and QLoRA in one pass, short rows.
PLANNED = (0, 14, 3, 7, 16, 17)
