"""Where the time of a step goes on one GPU, and what each mechanism gives: three parts.

    python -m benchmarks.gpu_ladder ceilings    what the card can do, shape by shape
    python -m benchmarks.gpu_ladder steps       from KAITO's defaults to ours, one thing at a time
    python -m benchmarks.gpu_ladder memory      peaks over tokens; start to first step, twice
    ... --dry                                   tiny models on a CPU: that it all runs

Each is for one card of the H200 class and takes less than nine minutes (`--seconds` ends it in
time), needs no network, and writes lines of JSON to `results/gpu_ladder.jsonl` as it goes. Models
have the shapes of presets; weights and tokens are random. Estimates are written before the first
step. LimitFrac is tokens/s x (4 N + 6 N_lora + 6 S h L) / C, where C is the rate of a large product
measured in the same process; tokens are real ones, without padding.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # as in training

import datasets
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, prepare_model_for_kbit_training
from trl import SFTConfig, SFTTrainer
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from benchmarks import gpu_plan
from benchmarks.gpu_plan import LLAMA, PHI, Case, shape, write
from tuning import presets
from tuning.models.kernels import attention, fuse, head, linear, norm
from tuning.models.load import load_tokenizer
from tuning.models.lora import adapt
from tuning.plan import Placement, Recipe, backends
from tuning.plan.backends import HEAD, LORA, MLP, NORM, VARLEN
from tuning.plan.coefficients import Method, Variant
from tuning.plan.speed import operations_per_token, seconds_per_token
from tuning.presets.config import facts
from tuning.training.arguments import sft_config
from tuning.training.progress import Saves
from tuning.training.trainer import Exact

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "gpu_ladder.jsonl"
DRY_RESULTS = HERE.parent / "build" / "gpu-ladder-dry.jsonl"
TOKENIZER = HERE.parent / "examples" / "tiny-model"
DATASHEET = 989e12  # dense bfloat16 of an H100 or H200, for the model FLOPs utilisation
PRESETS = (LLAMA, PHI)


@dataclass(frozen=True)
class Sizes:
    """How large things are: on a GPU as in life, in the dry mode as small as may be."""

    device: str
    length: int  # tokens of a packed row
    rows: int  # packed rows a step; or one row as long as all of them
    longest: int  # tokens of a chat
    warm: int
    timed: int
    square: int  # of the large product
    tokens: tuple[int, ...]  # of a micro-batch, for products and peaks
    repeats: int


CARD = Sizes("cuda", 2048, 4, 2048, 4, 12, 8192, (2048, 8192, 16384), 20)
DRY = Sizes("cpu", 64, 2, 48, 1, 1, 64, (32, 64), 1)


@dataclass(frozen=True)
class Rung:
    """A way to train: everything of the rung below, and one thing more."""

    name: str
    method: Method = "lora"
    ours: bool = False  # our trainer; else trl's
    packed: bool = True
    rows: int | None = None  # chats a step, where they are not packed
    attention: str = "sdpa"
    checkpointing: bool = True
    kernels: tuple[str, ...] = ()
    rank: int = 16
    upcast: bool = False  # norms, embeddings and head in float32, as k-bit preparation does it
    emptied: bool = False  # the allocator's cache, after each step


def ladder(method: Method) -> tuple[Rung, ...]:
    """From KAITO's defaults to ours."""
    kaito = Rung(
        "KAITO's defaults", method, packed=False, rows=1, rank=8, upcast=method == "qlora",
        emptied=True,
    )  # fmt: skip
    padded = Rung("trl, padded", method, packed=False, rows=8)
    packed = Rung("trl, packed", method)
    varlen = Rung("by document", method, ours=True, attention=VARLEN)
    free = replace(varlen, name="no checkpointing", checkpointing=False)
    norms = replace(free, name="norms", kernels=(NORM,))
    layers = replace(norms, name="liger's layers", kernels=(backends.LIGER, NORM))
    liger = backends.LIGER_PACKAGE in backends.installed()
    base = layers if liger else norms
    lora = replace(base, name="fused LoRA", kernels=(*base.kernels, LORA))
    mlp = replace(lora, name="fused MLP", kernels=(*lora.kernels, MLP))
    loss = replace(mlp, name="one-pass loss", kernels=(*mlp.kernels, HEAD))
    return (kaito, padded, packed, varlen, free, norms, *([layers] * liger), lora, mlp, loss)


def plans() -> Iterator[tuple[str, Rung, bool]]:
    """Preset, rung and whether its rows are one long document: all runs, the telling ones first."""
    lora, qlora = ladder("lora"), ladder("qlora")
    best, packed, free = lora[-1], lora[2], lora[4]
    again = replace(best, name="one-pass loss, checkpointing", checkpointing=True)
    wide = replace(qlora[-1], name="one-pass loss, rank 64", rank=64)
    for rung in (*lora, qlora[-1], wide, again, qlora[0], qlora[1]):
        yield LLAMA, rung, False
    for rung in (lora[0], lora[1], packed, free, best, qlora[-1]):
        yield PHI, rung, False
    for preset in PRESETS:
        for rung in (packed, free, best, qlora[-1]):
            yield preset, rung, True
    for rung in (packed, best):  # less than their spread is noise
        yield LLAMA, replace(rung, name=f"{rung.name}, again"), False


# Data.


def chats(sizes: Sizes, tokens: int) -> list[int]:
    """Lengths of chats of about `tokens` tokens in all: most short, a few long."""
    draw, found = random.Random(0), []
    while sum(found) < tokens:
        found.append(min(sizes.longest, max(8, round(draw.lognormvariate(5.0, 0.9)))))
    return found


def bins(lengths: list[int], size: int) -> list[list[int]]:
    """Chats laid into full rows of `size` tokens; the one that overflows is cut."""
    rows: list[list[int]] = [[]]
    for length in lengths:
        rest = size - sum(rows[-1])
        rows[-1].append(min(length, rest))
        if length >= rest:
            rows.append([])
    return rows[:-1] or rows


def row(lengths: list[int], vocabulary: int, draw: random.Random) -> dict[str, Any]:
    """A training row of documents of these lengths, every token labelled."""
    ids = [draw.randrange(vocabulary) for _ in range(sum(lengths))]
    return {"input_ids": ids, "labels": list(ids), "seq_lengths": list(lengths)}


def dataset(rung: Rung, sizes: Sizes, vocabulary: int, *, long: bool) -> datasets.Dataset:
    """Rows for all steps of a rung: packed chats or one long document a step, or chats alone."""
    steps, draw = sizes.warm + sizes.timed, random.Random(1)
    step = sizes.length * sizes.rows
    if not rung.packed:
        wanted = steps * (rung.rows or 1)
        made = [row([n], vocabulary, draw) for n in chats(sizes, wanted * sizes.longest)[:wanted]]
    elif long:
        made = [row([step], vocabulary, draw) for _ in range(steps)]
    else:
        packed = bins(chats(sizes, steps * step + sizes.longest * 2), sizes.length)
        made = [row(lengths, vocabulary, draw) for lengths in packed[: steps * sizes.rows]]
    found: datasets.Dataset = datasets.Dataset.from_list(made)
    return found if rung.packed else found.remove_columns("seq_lengths")


# Steps.


class Clock(transformers.TrainerCallback):  # type: ignore[misc]
    """The end of each step, after everything on the device has happened."""

    def __init__(self, *, emptied: bool) -> None:
        self.ends: list[float] = []
        self.emptied = emptied

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Once an optimizer step."""
        if torch.cuda.is_available():
            if self.emptied:
                torch.cuda.empty_cache()
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def build(preset: str, rung: Rung, sizes: Sizes) -> Any:
    """The base model with random weights on the device, packed for QLoRA."""
    variant = Variant(rung.method, attention="sdpa", device=sizes.device)  # type: ignore[arg-type]
    base = gpu_plan.make(Case(preset, variant, 1, 1))
    if rung.upcast:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    return base


def settings(rung: Rung, sizes: Sizes, scratch: Path, *, long: bool) -> SFTConfig:
    """trl's settings of a rung that is not ours; what is not named is trl's default."""
    rows = rung.rows or (1 if long else sizes.rows)
    known = SFTConfig.__dataclass_fields__
    name = "activation_checkpointing"
    checkpointing = name if name in known else "gradient_checkpointing"
    packing: dict[str, Any] = {"max_length": None}
    if rung.packed:
        packing = {"packing": True, "max_length": sizes.length * (sizes.rows if long else 1)}
    return SFTConfig(
        output_dir=str(scratch),
        use_cpu=sizes.device == "cpu",
        per_device_train_batch_size=rows,
        max_steps=sizes.warm + sizes.timed,
        learning_rate=1e-5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential",
        **{checkpointing: rung.checkpointing},
        **packing,
    )


def recipe_of(rung: Rung, sizes: Sizes, *, long: bool) -> tuple[Recipe, Placement]:
    """What `tuning run` would plan for a rung that is ours."""
    rows = 1 if long else sizes.rows
    quantisation = {"type": "nf4", "double": True, "compute": "bfloat16"}
    recipe = Recipe(
        base_model="random", base_revision="", data=(), method=rung.method, precision="bfloat16",
        quantisation=quantisation if rung.method == "qlora" else None, rank=rung.rank,
        alpha=2.0 * rung.rank, dropout=0.0, targets=None, exclude=(), layers=None, rslora=False,
        dora=False, optimizer="adamw_torch_fused", learning_rate=1e-5, schedule="linear",
        warmup_steps=0, weight_decay=0.0, betas=(0.9, 0.999), epsilon=1e-8, max_grad_norm=1.0,
        neftune_alpha=None, max_length=sizes.length * (sizes.rows if long else 1), packing=True,
        train_on="all", chat_template=None, columns={}, shuffle=False, train_share=1.0,
        global_batch=rows, epochs=1.0, steps=sizes.warm + sizes.timed, seed=0, eval_steps=None,
    )  # fmt: skip
    placement = Placement(
        device=sizes.device,  # type: ignore[arg-type]
        ranks=1,
        micro_batch=rows,
        accumulation=1,
        checkpointing=rung.checkpointing,
        attention=rung.attention,
        kernels=rung.kernels,
    )
    return recipe, placement


def runner(base: Any, rung: Rung, sizes: Sizes, scratch: Path, rows: Any, *, long: bool) -> Any:
    """The trainer of a rung, ready to train `rows`."""
    tokenizer = load_tokenizer(TOKENIZER)
    if not rung.ours:
        lora = LoraConfig(
            r=rung.rank, lora_alpha=2 * rung.rank, target_modules="all-linear",
            task_type="CAUSAL_LM",
        )  # fmt: skip
        return SFTTrainer(
            model=base,
            args=settings(rung, sizes, scratch, long=long),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=lora,
        )
    recipe, placement = recipe_of(rung, sizes, long=long)
    tuned, _ = adapt(base, recipe)
    fuse.fuse(tuned, rung.kernels)
    base.one_pass = HEAD in rung.kernels and head.suits(base)
    base.config._attn_implementation = rung.attention
    return Exact(
        tuned,
        tokenizer,
        rows=rows,
        held_out=None,
        recipe=recipe,
        arguments=sft_config(recipe, placement, scratch, by_offsets=True),
        metrics=scratch / "metrics.jsonl",
        saves=Saves(scratch / "checkpoints", seconds=1e9),
    )


def measure(preset: str, rung: Rung, sizes: Sizes, *, long: bool) -> dict[str, Any]:
    """Speed and peak memory of a rung, in a process of its own."""
    if sizes.device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    peak_rate = rate(sizes)
    base = build(preset, rung, sizes)
    rows = dataset(rung, sizes, base.get_input_embeddings().num_embeddings, long=long)
    clock = Clock(emptied=rung.emptied)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "metrics.jsonl").touch()
        loop = runner(base, rung, sizes, Path(folder), rows, long=long)
        loop.add_callback(clock)
        if sizes.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        loop.train()
    seconds = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)][-sizes.timed :]
    count = len(rows) // (sizes.warm + sizes.timed)
    lengths = rows["seq_lengths"] if rung.packed else [[len(r)] for r in rows["input_ids"]]
    timed = [n for lengths_ in lengths[-count * len(seconds) :] for n in lengths_]
    speed = sum(timed) / sum(seconds)
    known = facts(shape(Case(preset, Variant(device=sizes.device), 1, 1)))  # type: ignore[arg-type]
    assert known is not None
    span = sum(n * n for n in timed) / sum(timed)
    work = operations_per_token(known, effective_length=span, rank=rung.rank)
    return {
        "tokens_per_second": speed,
        "tokens_per_step": sum(timed) / len(seconds),
        "seconds": {
            "median": statistics.median(seconds),
            "lowest": min(seconds),
            "highest": max(seconds),
        },
        "span": span,
        "operations_per_token": work,
        "rate": peak_rate,
        "limit_share": speed * work / peak_rate,
        "model_flops_utilisation": speed * work / DATASHEET,
        "allocated": torch.cuda.max_memory_allocated() if sizes.device == "cuda" else None,
        "losses": [entry["loss"] for entry in loop.state.log_history if "loss" in entry][-1:],
    }


def rate(sizes: Sizes) -> float:
    """Operations a second of a large product in bfloat16, of random numbers."""
    n = sizes.square
    a, b = (torch.randn(n, n, device=sizes.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / timed_call(lambda: a @ b, sizes)


def timed_call(function: Callable[[], Any], sizes: Sizes) -> float:
    """Median seconds of a call."""
    found = []
    for number in range(sizes.repeats + 3):
        if sizes.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if sizes.device == "cuda":
            torch.cuda.synchronize()
        if number >= 3 or sizes.repeats == 1:
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def apart(preset: str, rung: Rung, sizes: Sizes, long: bool) -> dict[str, Any]:
    """`measure` in a fresh process; what goes wrong there is a result, too."""
    try:
        return measure(preset, rung, sizes, long=long)
    except (RuntimeError, ValueError, KeyError, NotImplementedError) as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def steps(sizes: Sizes, path: Path, seconds: float) -> None:
    """The ladder: each run in a process of its own, written down at once."""
    start = time.monotonic()
    for preset, rung, long in plans():
        said = {"speed": foretold(preset, rung, sizes, long=long)}
        write(path, {"kind": "estimate", **about(preset, rung, long), **said})
    # a server that has everything imported and no CUDA context makes processes in no time
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [__name__ if __name__ != "__main__" else "benchmarks.gpu_ladder"]
    )
    for preset, rung, long in plans():
        if time.monotonic() - start > seconds:
            print("out of time, skipped:", preset, rung.name, flush=True)
            continue
        with context.Pool(1) as pool:
            found = pool.apply(apart, (preset, rung, sizes, long))
        write(path, {"kind": "step", **about(preset, rung, long), **found})
        print(line(preset, rung, found, long=long), flush=True)


def about(preset: str, rung: Rung, long: bool) -> dict[str, Any]:
    """What a record is of."""
    return {"preset": preset, "rung": asdict(rung), "long": long} | gpu_plan.machine(
        not torch.cuda.is_available()
    )


def line(preset: str, rung: Rung, found: dict[str, Any], *, long: bool) -> str:
    """One rung for people."""
    head_ = f"{preset:24} {rung.method:5} {'long' if long else 'chat'} {rung.name:30}"
    if "error" in found:
        return f"{head_} {found['error']}"
    peak = f", {found['allocated'] / 1e9:.1f} GB" if found["allocated"] else ""
    return (
        f"{head_} {found['tokens_per_second']:>9,.0f} tokens/s, {found['limit_share']:.3f} of the "
        f"limit{peak}"
    )


def foretold(preset: str, rung: Rung, sizes: Sizes, *, long: bool) -> float | None:
    """Tokens a second by the roofline; None on a CPU and for a card that is not in the table."""
    card = gpu_plan.card() if sizes.device == "cuda" else None
    known = presets.find(preset)
    if card is None or known is None:
        return None
    tokens = (rung.rows or 1) * 250 if not rung.packed else sizes.length * sizes.rows
    seconds = seconds_per_token(
        known.facts,
        card,
        method=rung.method,
        checkpointing=rung.checkpointing,
        tokens=tokens,
        effective_length=tokens if long or rung.attention == "sdpa" else 500,
        rank=rung.rank,
        attention="varlen" if rung.attention == VARLEN else "sdpa",
        fused=LORA in rung.kernels,
    )
    return 1 / seconds if seconds else None


# Ceilings.


def ceilings(sizes: Sizes, path: Path, seconds: float) -> None:
    """The card's rates for every shape that the two models have."""
    start = time.monotonic()
    torch.manual_seed(0)
    machine = gpu_plan.machine(sizes.device == "cpu")
    for name, found in probes(sizes):
        write(path, {"kind": "ceiling", "what": name, **found, **machine})
        print(f"{name:62} " + ", ".join(f"{k} {v:,.3g}" for k, v in found.items()), flush=True)
        if time.monotonic() - start > seconds:
            print("out of time", flush=True)
            return


def probes(sizes: Sizes) -> Iterator[tuple[str, dict[str, float]]]:
    """Every measurement, by name."""
    yield "large product", {"flops": rate(sizes)}
    yield "copy", {"bytes_per_second": copy_rate(sizes)}
    for preset in PRESETS:
        known = facts(shape(Case(preset, Variant(device=sizes.device), 1, 1)))  # type: ignore[arg-type]
        assert known is not None
        for layer in known.linears:
            yield from linear_probes(f"{preset} {layer.name}", layer.outputs, layer.inputs, sizes)
        yield from mlp_probes(preset, known.hidden, known.intermediate, sizes)
        yield from loss_probes(preset, known.hidden, known.vocab, sizes)
        yield from norm_probes(preset, known.hidden, sizes)
        yield from attention_probes(preset, known, sizes)


def copy_rate(sizes: Sizes) -> float:
    """Bytes read and written a second by a large copy."""
    count = 1 << (30 if sizes.device == "cuda" else 12)
    a = torch.empty(count, dtype=torch.bfloat16, device=sizes.device)
    b = torch.empty_like(a)
    return 2 * a.numel() * 2 / timed_call(lambda: b.copy_(a), sizes)


def frozen(outputs: int, inputs: int, sizes: Sizes, *, packed: bool) -> Any:
    """A linear layer of random weights without bias, in 16 or in 4 bits."""
    layer = torch.nn.Linear(inputs, outputs, bias=False, device=sizes.device, dtype=torch.bfloat16)
    layer.requires_grad_(False)
    return gpu_plan.pack(layer, Variant(device=sizes.device)) if packed else layer  # type: ignore[arg-type]


def projection(outputs: int, inputs: int, sizes: Sizes, *, packed: bool) -> linear.Projection:
    """The same with an adapter of rank 16."""
    a, b = (
        torch.nn.Parameter(torch.randn(*size, device=sizes.device) * 0.01)
        for size in ((16, inputs), (outputs, 16))
    )
    return linear.Projection(frozen(outputs, inputs, sizes, packed=packed), a, b, 2.0)


def peft_linear(x: torch.Tensor, part: linear.Projection) -> torch.Tensor:
    """What peft computes, operator by operator."""
    result = part.base(x)
    low = F.linear(x.to(part.a.dtype), part.a)
    return result + F.linear(low, part.b) * part.scale  # type: ignore[no-any-return]


def linear_probes(
    name: str, outputs: int, inputs: int, sizes: Sizes
) -> Iterator[tuple[str, dict[str, float]]]:
    """A projection's bare products, peft's way and ours, in 16 and 4 bits; unpacking alone."""
    for tokens in sizes.tokens:
        yield f"{name} {tokens} tokens", linear_probe(outputs, inputs, tokens, sizes)


def linear_probe(outputs: int, inputs: int, tokens: int, sizes: Sizes) -> dict[str, float]:
    """The same at one number of tokens."""
    x = random_rows(tokens, inputs, sizes)
    grad = torch.randn(tokens, outputs, device=sizes.device, dtype=torch.bfloat16)
    weight = frozen(outputs, inputs, sizes, packed=False).weight
    bare = timed_call(lambda: (x.detach() @ weight.t(), grad @ weight), sizes)
    found = {"products": bare, "flops": 4 * tokens * outputs * inputs / bare}
    for bits, packed in (("16", False), ("4", True)):
        part = projection(outputs, inputs, sizes, packed=packed)
        theirs = partial(peft_linear, x, part)
        ours = partial(linear.linears, x, [part], dtype=torch.bfloat16)
        found[f"peft {bits}"] = both_ways(theirs, grad, sizes)
        found[f"ours {bits}"] = both_ways(lambda ours=ours: ours()[0], grad, sizes)
    found["unpack"] = timed_call(partial(linear.weight, part.base, torch.bfloat16), sizes)
    return found


def random_rows(tokens: int, width: int, sizes: Sizes) -> torch.Tensor:
    """Random numbers that want a gradient."""
    x = torch.randn(tokens, width, device=sizes.device, dtype=torch.bfloat16)
    return x.requires_grad_()


def both_ways(forward: Callable[[], torch.Tensor], grad: torch.Tensor, sizes: Sizes) -> float:
    """Seconds of a forward and a backward under autocast."""

    def once() -> None:
        with torch.autocast(sizes.device, torch.bfloat16):
            out = forward()
        out.backward(grad)

    return timed_call(once, sizes)


def mlp_probes(
    name: str, hidden: int, inner: int, sizes: Sizes
) -> Iterator[tuple[str, dict[str, float]]]:
    """A gated MLP with adapters: peft's way, projections fused, the whole fused."""
    gate, up = (projection(inner, hidden, sizes, packed=False) for _ in range(2))
    down = projection(hidden, inner, sizes, packed=False)
    whole = linear.Mlp((gate, up), down, linear.ACTIVATIONS["SiLU"], gated=True)
    for tokens in sizes.tokens[:2]:
        x = random_rows(tokens, hidden, sizes)
        grad = torch.randn(tokens, hidden, device=sizes.device, dtype=torch.bfloat16)

        def eager(x: torch.Tensor = x) -> torch.Tensor:
            return peft_linear(F.silu(peft_linear(x, gate)) * peft_linear(x, up), down)

        def parts(x: torch.Tensor = x) -> torch.Tensor:
            one, two = linear.linears(x, [gate, up], dtype=torch.bfloat16)
            return linear.linears(F.silu(one) * two, [down], dtype=torch.bfloat16)[0]

        def ours(x: torch.Tensor = x) -> torch.Tensor:
            return linear.mlp(x, whole, dtype=torch.bfloat16)

        ways = {"peft": eager, "projections": parts, "whole": ours}
        yield (
            f"{name} MLP {tokens} tokens",
            {way: both_ways(function, grad, sizes) for way, function in ways.items()},
        )


def loss_probes(
    name: str, hidden: int, vocabulary: int, sizes: Sizes
) -> Iterator[tuple[str, dict[str, float]]]:
    """The loss of a step's tokens, forward and backward: trl's head and ours."""
    tokens = sizes.tokens[1]
    weight = torch.randn(vocabulary, hidden, device=sizes.device, dtype=torch.bfloat16) * 0.02
    x = random_rows(tokens, hidden, sizes)
    labels = torch.randint(0, vocabulary, (1, tokens), device=sizes.device)
    one = torch.ones((), device=sizes.device)

    def theirs() -> torch.Tensor:
        found = ChunkedLogProbFunction.apply(
            x, weight, None, labels[0], 1.0, 32768, None, 1.0, ("entropy", "is_top1")
        )
        return -found[0].sum()  # type: ignore[no-any-return]

    def ours() -> torch.Tensor:
        return head.loss(x[None], weight, None, labels)

    ways = {"trl": theirs, "ours": ours}
    yield (
        f"{name} loss {tokens} tokens",
        {way: both_ways(function, one, sizes) for way, function in ways.items()},
    )


def norm_probes(name: str, hidden: int, sizes: Sizes) -> Iterator[tuple[str, dict[str, float]]]:
    """RMSNorm of a step's tokens: transformers' operators and ours."""
    layer = transformers.models.llama.modeling_llama.LlamaRMSNorm(hidden)
    layer = layer.to(sizes.device, torch.bfloat16).requires_grad_(False)
    x = random_rows(sizes.tokens[1], hidden, sizes)
    grad = torch.randn_like(x)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "transformers": lambda: layer(x),
        "ours": lambda: norm.rms_norm(x, layer.weight, 1e-6),
    }
    yield (
        f"{name} norm {len(x)} tokens",
        {way: both_ways(function, grad, sizes) for way, function in ways.items()},
    )


def attention_probes(
    name: str, known: presets.Facts, sizes: Sizes
) -> Iterator[tuple[str, dict[str, float]]]:
    """Attention of a step's tokens as documents of one length, and as one."""
    for length in (sizes.length, sizes.length * sizes.rows):
        tokens = sizes.length * sizes.rows
        offsets = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=sizes.device)
        q, k, v = (
            torch.randn(tokens, heads, known.head_dim, device=sizes.device, dtype=torch.bfloat16)
            .requires_grad_()
            for heads in (known.heads, known.kv_heads, known.kv_heads)
        )  # fmt: skip
        grad = torch.randn_like(q)

        def varlen(q: Any = q, k: Any = k, v: Any = v, at: Any = offsets, n: int = length) -> Any:
            if sizes.device == "cpu":
                return attention.by_document(q, k, v, at, scale=None, window=None)
            return attention.by_kernel(q, k, v, at, longest=n, scale=None, window=None)

        def sdpa(q: Any = q, k: Any = k, v: Any = v, n: int = length) -> Any:
            rows = [t.view(-1, n, t.shape[1], t.shape[2]).transpose(1, 2) for t in (q, k, v)]
            out = F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2).reshape(q.shape)

        ways = {"varlen": varlen, "sdpa, a row a document": sdpa}
        found = {way: both_ways(function, grad, sizes) for way, function in ways.items()}
        work = 7 * tokens * length * known.queries  # forward 2, backward 5, of the lower half
        found["varlen_flops"] = work / found["varlen"]
        yield f"{name} attention {tokens // length} x {length}", found


# Memory and start.


def memory(sizes: Sizes, path: Path, seconds: float) -> None:
    """Peaks over the tokens of a micro-batch, foretold and found; a job's first step, twice."""
    start = time.monotonic()
    first_steps(sizes, path)
    tokens = (2048, 4096, 8192, 16384, 32768, 65536) if sizes.device == "cuda" else (64, 128)
    kind = "varlen" if sizes.device == "cuda" else "sdpa"
    cases = tuple(
        Case(
            preset,
            Variant(method, attention=kind, checkpointing=again, device=sizes.device, fused=True),  # type: ignore[arg-type]
            max(1, count // sizes.length),
            min(count, sizes.length),
        )
        for preset in PRESETS
        for method in ("lora", "qlora")
        for again in (True, False)
        for count in tokens
    )
    left = seconds - (time.monotonic() - start)
    print(json.dumps(gpu_plan.run(cases, path, seconds=left)))


def first_steps(sizes: Sizes, path: Path) -> None:
    """`tuning run` of a QLoRA job on a local base, from the command to the first step, twice.

    The second start finds the packed weights; both find the libraries in the page cache.
    """
    preset = PHI
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        config = gpu_plan.read(shape(Case(preset, Variant(device=sizes.device), 1, 1)))  # type: ignore[arg-type]
        tokenizer = load_tokenizer(TOKENIZER)
        with torch.device(sizes.device):
            made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        made.save_pretrained(base)
        del made
        tokenizer.save_pretrained(base)
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("".join(json.dumps(chat(n)) + "\n" for n in range(200)))
        for number in (1, 2):
            found = first_step(base, rows, Path(folder), number)
            write(path, {"kind": "start", "run": number, "preset": preset, **found}
                  | gpu_plan.machine(sizes.device == "cpu"))  # fmt: skip
            print(f"start {number}: {json.dumps(found)}", flush=True)
            shutil.rmtree(Path(folder) / f"run-{number}", ignore_errors=True)


def chat(number: int) -> dict[str, Any]:
    """A short conversation."""
    return {
        "messages": [
            {"role": "user", "content": f"What is {number} plus {number}?"},
            {"role": "assistant", "content": f"It is {2 * number}."},
        ]
    }


WORKSPACE = """apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: bench}
resource: {labelSelector: {matchLabels: {apps: bench}}}
tuning:
  preset: {name: tuning/bench}
  method: qlora
  config: bench
  input: {urls: ["https://example.com/rows.jsonl"]}
  output: {image: "registry.example.com/bench:1", imagePushSecret: push}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: bench}
data:
  training_config.yaml: |
    training_config:
      TrainingArguments: {max_steps: 2}
"""


def first_step(base: Path, rows: Path, folder: Path, number: int) -> dict[str, Any]:
    """Seconds of a whole job to its first step, and of loading within it."""
    workspace, run = folder / "workspace.yaml", folder / f"run-{number}"
    workspace.write_text(WORKSPACE)
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    environment["PYTHONPATH"] = str(HERE.parent)
    arguments = [
        *(sys.executable, "-m", "tuning", "run", "-f", str(workspace)),
        *("--base-model", str(base), "--data", str(rows), "--run-dir", str(run)),
        *("--output", f"oci:{run}-image"),
    ]
    start = time.monotonic()
    with (folder / f"log-{number}").open("wb") as log:
        child = subprocess.Popen(arguments, env=environment, stdout=log, stderr=log)
        first = None
        metrics = run / "metrics.jsonl"
        while child.poll() is None:
            if first is None and metrics.exists() and metrics.stat().st_size:
                first = time.monotonic() - start
            time.sleep(0.05)
    if child.returncode:
        return {"error": (folder / f"log-{number}").read_text()[-500:]}
    entries = [json.loads(each) for each in (run / "journal.jsonl").read_text().splitlines()]
    training = next(e["value"] for e in entries if (e["phase"], e["event"]) == ("train", "end"))
    return {
        "first_step": first,
        "load": training["load_seconds"],
        "load_to_first_step": training["first_step_seconds"],
    }


PARTS = {"ceilings": ceilings, "steps": steps, "memory": memory}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--dry", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--out", type=Path, help="JSON lines to append to")
    parser.add_argument("--seconds", type=float, default=480, help="start nothing after these")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if not given.dry and not torch.cuda.is_available():
        print("no GPU here: --dry runs on a CPU", file=sys.stderr)
        return 2
    sizes = DRY if given.dry else CARD
    path = given.out or (DRY_RESULTS if given.dry else RESULTS)
    PARTS[given.part](sizes, path, given.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
