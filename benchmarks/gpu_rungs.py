"""How the GPU ladder trains: from KAITO's defaults over plain trl to ours, one thing at a time.

Each `Rung` is a way to train the same random rows on a model of a preset's shape; `measure` runs
one in this process.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # as in training

import datasets
import torch
import transformers
from peft import LoraConfig, prepare_model_for_kbit_training
from trl import SFTConfig, SFTTrainer

from benchmarks import gpu_plan
from benchmarks.gpu_plan import LLAMA, PHI, Case, shape
from tuning.models import four_bit
from tuning.models.kernels import fuse, head
from tuning.models.load import load_tokenizer
from tuning.models.lora import adapt
from tuning.plan import Placement, Recipe, backends
from tuning.plan.backends import FUSED, HEAD, LORA, MLP, NORM, VARLEN
from tuning.plan.coefficients import Method, Variant
from tuning.plan.speed import operations_per_token
from tuning.presets.config import facts
from tuning.training.arguments import sft_config
from tuning.training.calibration import timed
from tuning.training.progress import Saves
from tuning.training.trainer import Exact

TOKENIZER = Path(__file__).resolve().parent.parent / "examples" / "tiny-model"
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


CARD = Sizes("cuda", 2048, 4, 2048, 3, 8, 8192, (2048, 8192, 16384))
DRY = Sizes("cpu", 64, 2, 48, 1, 1, 64, (32, 64))


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
    liger: bool = False  # trl's switch for liger's kernels
    rank: int = 16
    upcast: bool = False  # norms, embeddings and head in float32, as k-bit preparation does it
    emptied: bool = False  # the allocator's cache, after each step
    constants: bool = False  # those of 4-bit blocks are unpacked to float32


def ladder(method: Method) -> tuple[Rung, ...]:
    """From KAITO's defaults to ours; what needs a package that is not here is left out."""
    here = backends.installed()
    kaito = Rung(
        "KAITO's defaults", method, packed=False, rows=1, rank=8, upcast=method == "qlora",
        emptied=True,
    )  # fmt: skip
    padded = Rung("trl, padded", method, packed=False, rows=8)
    packed = Rung("trl, packed", method)
    liger = replace(packed, name="trl, packed, liger", liger=True)
    varlen = Rung("by document", method, ours=True, attention=VARLEN)
    free = replace(varlen, name="no checkpointing", checkpointing=False)
    norms = replace(free, name="norms", kernels=(NORM,))
    layers = replace(norms, name="fused layers", kernels=(NORM, LORA, MLP))
    loss = replace(layers, name="one-pass loss", kernels=(*layers.kernels, HEAD))
    ways = [kaito, padded, packed]
    ways += [liger] * (backends.LIGER_PACKAGE in here)
    best = replace(loss, name="all kernels", kernels=FUSED, constants=method == "qlora")
    ways += [varlen, free, norms, layers, loss, best]
    for name, (package, _) in backends.FLASH.items():
        if package in here:
            ways.append(replace(best, name=package, attention=name))
            break
    return tuple(ways)


def plans() -> Iterator[tuple[str, Rung, bool]]:
    """Preset, rung and whether its rows are one long document: all runs, the telling ones first."""
    lora, best = ladder("lora"), ladder("lora")[-1]
    packed = next(rung for rung in lora if rung.name == "trl, packed")
    for rung in (lora[0], packed, best, *(r for r in lora if r not in (lora[0], packed, best))):
        yield LLAMA, rung, False
    yield PHI, best, False  # what the peers train, too
    yield LLAMA, ladder("qlora")[-1], False
    yield LLAMA, best, True
    yield PHI, packed, False
    yield LLAMA, replace(best, name=f"{best.name}, again"), False  # less than the spread is noise


def about(preset: str, rung: Rung, *, long: bool) -> dict[str, Any]:
    """What a record is of."""
    return {"preset": preset, "rung": asdict(rung), "long": long}


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


# Training.


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
        use_liger_kernel=rung.liger,
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
        float_constants=rung.constants,
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
    if placement.float_constants:
        four_bit.unpack_constants(tuned)
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


def apart(preset: str, rung: Rung, sizes: Sizes, long: bool) -> dict[str, Any]:
    """`measure` in a fresh process; what goes wrong there is a result, too."""
    try:
        return measure(preset, rung, sizes, long=long)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


def rate(sizes: Sizes) -> float:
    """Operations a second of a large product in bfloat16, of random numbers."""
    n = sizes.square
    a, b = (torch.randn(n, n, device=sizes.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / timed(lambda: a @ b, sizes.device)
