"""Where the time of a step goes on one GPU, and what each mechanism gives: three parts.

    python -m benchmarks.gpu_ladder ceilings    what the card can do, shape by shape
    python -m benchmarks.gpu_ladder steps       from KAITO's defaults to ours, one thing at a time
    python -m benchmarks.gpu_ladder memory      peaks, the longest row, the plan's error; starts
    ... --dry                                   tiny models on a CPU: that it all runs

Each is for one card of the H200 class and takes at most four minutes (`--seconds` ends it in time),
needs no network, and writes lines of JSON to `results/gpu_ladder.jsonl` as it goes. Models have the
shapes of presets; weights and tokens are random. Estimates are written before the first step.
`steps` ends with other tools on the same rows (`--peer unsloth=/its/venv/bin/python`) and a table.
LimitFrac is tokens/s x (4 N + 6 N_lora + 6 S h L) / C, where C is the rate of a large product
measured in the same process; tokens are real ones, without padding.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # as in training

import datasets
import torch
import transformers

from benchmarks import gpu_ceilings, gpu_peers, gpu_plan, gpu_start, gpu_table
from benchmarks.gpu_plan import LLAMA, PHI, Case, write
from benchmarks.gpu_rungs import CARD, DRY, PRESETS, Rung, Sizes, about, apart, ladder, plans
from tuning import presets
from tuning.plan.backends import BY_OFFSETS, LORA
from tuning.plan.coefficients import Coefficients, Variant
from tuning.plan.speed import seconds_per_token
from tuning.training.simulate import coefficients

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "gpu_ladder.jsonl"
DRY_RESULTS = HERE.parent / "build" / "gpu-ladder-dry.jsonl"
SECONDS = 225.0  # of a part: nothing starts after these
PEERS_SECONDS = 60.0  # of them, for the peers
SMALL_CARD = 16 << 30  # bytes, whose longest row is asked for


def steps(sizes: Sizes, path: Path, seconds: float, peers: list[str]) -> None:
    """The ladder, each run in a process of its own and written down at once; peers; the table."""
    start, machine = time.monotonic(), gpu_plan.machine(sizes.device == "cpu")
    runs = [(*run, foretold(*run[:2], sizes, long=run[2])) for run in plans()]
    for preset, rung, long, said in runs:
        write(path, {"kind": "estimate", **about(preset, rung, long=long), "planned": said}
              | machine)  # fmt: skip
    order = [rung.name for rung in ladder("lora")]
    # a server that has everything imported and no CUDA context makes processes in no time
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.gpu_rungs"])
    ours = seconds - (PEERS_SECONDS if sizes.device == "cuda" else 0.0)
    for preset, rung, long, said in runs:
        if time.monotonic() - start > ours:
            print("out of time, skipped:", preset, rung.name, flush=True)
            continue
        with context.Pool(1) as pool:
            found = pool.apply(apart, (preset, rung, sizes, long))
        place = order.index(rung.name) if rung.name in order else len(order)
        record = {"kind": "step", "place": place, "planned": said}
        write(path, record | about(preset, rung, long=long) | found | machine)
        print(f"{preset} {rung.method} {rung.name}:", _line(found), flush=True)
    for found in gpu_peers.compare(PHI, sizes, gpu_peers.pythons(peers)):
        place = len(runs)
        write(
            path, {"kind": "peer", "preset": PHI, "long": False, "place": place} | found | machine
        )
        print(f"{PHI} {found['rung']['name']}:", _line(found), flush=True)
    print(gpu_table.table(gpu_table.records(path)))


def _line(found: dict[str, Any]) -> str:
    """One run for people."""
    if "error" in found:
        return str(found["error"])
    return f"{found['tokens_per_second']:,.0f} tokens/s, {found['limit_share']:.3f} of the limit"


def foretold(preset: str, rung: Rung, sizes: Sizes, *, long: bool) -> float | None:
    """Tokens a second by the roofline; None on a CPU and for a card that is not in the table."""
    card = gpu_plan.card() if sizes.device == "cuda" else None
    known = presets.find(preset)
    if card is None or known is None:
        return None
    tokens = (rung.rows or 1) * 250 if not rung.packed else sizes.length * sizes.rows
    by_offsets = rung.attention in BY_OFFSETS
    seconds = seconds_per_token(
        known.facts,
        card,
        method=rung.method,
        checkpointing=rung.checkpointing,
        tokens=tokens,
        effective_length=tokens if long or not by_offsets else 500,
        rank=rung.rank,
        attention="varlen" if by_offsets else "sdpa",
        fused=LORA in rung.kernels,
    )
    return 1 / seconds if seconds else None


def ceilings(sizes: Sizes, path: Path, seconds: float, peers: list[str]) -> None:
    """The card's rates for every shape that the two models have."""
    start = time.monotonic()
    torch.manual_seed(0)
    machine = gpu_plan.machine(sizes.device == "cpu")
    for name, found in gpu_ceilings.probes(sizes):
        write(path, {"kind": "ceiling", "what": name, **found, **machine})
        print(f"{name:62} " + ", ".join(f"{k} {v:,.3g}" for k, v in found.items()), flush=True)
        if time.monotonic() - start > seconds:
            print("out of time", flush=True)
            return


def memory(sizes: Sizes, path: Path, seconds: float, peers: list[str]) -> None:
    """Peaks over the tokens of a micro-batch, planned and found; the longest row of a small card.

    Then, in the time that is left, a job from its command to the first step, twice.
    """
    start, cuda = time.monotonic(), sizes.device == "cuda"
    kind = "varlen" if cuda else "sdpa"
    every = [
        Case(
            preset,
            Variant(method, attention=kind, checkpointing=again, device=sizes.device, fused=True),  # type: ignore[arg-type]
            max(1, count // sizes.length),
            min(count, sizes.length),
        )
        for preset in PRESETS
        for method in ("lora", "qlora")
        for again in (True, False)
        for count in ((2048, 8192, 32768) if cuda else (64, 128))
    ]
    case = next(c for c in every if c.preset == LLAMA and c.variant.method == "qlora")
    known = coefficients(gpu_plan.shape(case), variants=[case.variant])
    dry = gpu_plan.estimate(replace(case, rows=1, length=128), known).total
    budget = SMALL_CARD if cuda else dry
    long = longest(case, known, budget)
    write(path, {"kind": "longest", "budget": budget, "tokens": long.length})
    print(f"longest row of {budget / 2**30:.3g} GiB: {long.length:,} tokens", flush=True)
    print(json.dumps(gpu_plan.run((long, *every), path, seconds=seconds - 80)))
    if time.monotonic() - start < seconds - 80:
        gpu_start.first_steps(sizes, path)


def longest(case: Case, known: Coefficients, budget: int) -> Case:
    """The case with one row, as long as the memory estimate lets a card of `budget` bytes have."""
    found = replace(case, rows=1, length=64)
    for step in (64 << n for n in range(12, -1, -1)):  # the estimate grows with the length
        longer = replace(found, length=found.length + step)
        if gpu_plan.estimate(longer, known).total <= budget:
            found = longer
    return found


PARTS = {"ceilings": ceilings, "steps": steps, "memory": memory}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--dry", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--out", type=Path, help="JSON lines to append to")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="start nothing after these")
    parser.add_argument("--peer", action="append", default=[], help="NAME=its Python")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if not given.dry and not torch.cuda.is_available():
        print("no GPU here: --dry runs on a CPU", file=sys.stderr)
        return 2
    sizes = DRY if given.dry else CARD
    path = given.out or (DRY_RESULTS if given.dry else RESULTS)
    PARTS[given.part](sizes, path, given.seconds, given.peer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
