"""Writes docs/speed.md from the newest results of the benchmarks: part of `make docs`.

python -m benchmarks.speed_page
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import gpu_table, longest_rows

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu_compare.jsonl"
KERNELS = ROOT / "tests" / "fake_cuda" / "kernels.json"
PAGE = ROOT / "docs" / "speed.md"
TEMPLATE = ROOT / "benchmarks" / "speed.template.md"
TABLE = """
**{model}** ({shape}), {date}, {machine}; load of the machine {load}:

| | CPU-ms a real token | first step after | peak memory | ratio of CPU | of first step | of peak |
|---|---|---|---|---|---|---|
{rows}
{precision}
{laps}
"""
NO_BF16 = """
This processor has no instructions for bfloat16, which trl's script uses unasked, and slowly:
*float32* is the same with `bf16=False`. Ours takes float32 here of itself.
"""
SHAPES = {"tiny": "4 layers of 256, vocabulary 4,096", "small": "8 layers of 512, vocabulary 8,192"}


def newest(results: list[dict[str, Any]], **wanted: str) -> dict[str, Any] | None:
    """The last record with these values."""
    found = [r for r in results if all(r.get(key) == value for key, value in wanted.items())]
    return found[-1] if found else None


def table(record: dict[str, Any]) -> str:
    """The part of one model."""
    rows, laps = [], []
    for contender, middle in record["medians"].items():
        ratios = record["ratios"].get(contender)
        cells = [
            f"{1e3 * middle['cpu_per_token']:.2f}",
            f"{middle['first_step']:.1f} s",
            f"{middle['peak'] / 2**20:.0f} MiB",
            span(ratios["cpu_per_token"]) if ratios else "",
            span(ratios["first_step"]) if ratios else "",
            span(ratios["peak"]) if ratios else "",
        ]
        rows.append(f"| {contender} | {' | '.join(cells)} |")
        split = ", ".join(f"{lap} {seconds:.1f}" for lap, seconds in middle["laps"].items())
        laps.append(f"*{contender}* to its first step, in seconds: {split}.")
    loads = record["loads"]
    return TABLE.format(
        model=record["model"],
        shape=SHAPES[record["model"]],
        date=record["date"],
        machine=record["machine"],
        load=f"{min(loads):.0f} to {max(loads):.0f}",
        rows="\n".join(rows),
        precision=NO_BF16 if record.get("bf16") is False else "",
        laps="\n".join(laps),
    )


def span(ratio: list[float]) -> str:
    """Median, lowest and highest."""
    middle, lowest, highest = ratio
    return f"**{middle:.2f}** ({lowest:.2f} to {highest:.2f})"


def kernels(family: str) -> str:
    """Kernels of a layer of its usual plan: the mean of the two that are counted."""
    counts = json.loads(KERNELS.read_text())["counts"]
    way = counts[f"{family} qlora H100 bfloat16 planned checkpointing fused"]
    return f"{sum(way['layers'].values()) / 2:.1f}"


def markdown() -> str:
    """The page."""
    lines = RESULTS.read_text().splitlines() if RESULTS.is_file() else []
    results = [json.loads(line) for line in lines]
    found = [newest(results, kind="compare", model=model) for model in SHAPES]
    compared = [record for record in found if record is not None]
    same = newest(results, kind="equal")
    equal = ""
    if same is not None:
        equal = (
            f"Unpacked and in float32 the losses of ours and of trl's script differ by at most "
            f"{same['first_five']:.1e} over the first five steps and {same['all']:.1e} over all "
            f"{same['steps']} ({same['date']}).\n"
        )
    found_on_gpu = gpu_table.records(RESULTS.with_name("gpu_ladder.jsonl"))
    return TEMPLATE.read_text().format(
        steps=compared[0]["steps"] if compared else 30,
        pairs=len(compared[0]["loads"]) // len(compared[0]["medians"]) if compared else 5,
        compare="".join(map(table, compared)),
        equal=equal,
        gpu=gpu_table.table(found_on_gpu) if found_on_gpu else "Not measured yet.\n",
        llama_kernels=kernels("llama"),
        phi3_kernels=kernels("phi3"),
        longest=longest_rows.table(json.loads(longest_rows.RESULTS.read_text().splitlines()[-1])),
    )


if __name__ == "__main__":
    PAGE.write_text(markdown())
