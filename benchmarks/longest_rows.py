"""The longest row that the plan accepts on a card, beside the lengths that Unsloth publishes.

    python -m benchmarks.longest_rows [--write]    print them; add them to benchmarks/results/

Llama-3.1-8B, QLoRA of rank 32 on all projections, one row a micro-batch; an estimate by
`tuning.plan`, not measured on a GPU. Unsloth's are from its README (unslothai/unsloth).
"""

from __future__ import annotations

import argparse
import datetime
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tuning import presets
from tuning.plan import sizing
from tuning.plan.sizing import Demand

PRESET, RANK, MOST = "llama-3.1-8b-instruct", 32, 1 << 20
UNSLOTH = {8: 2_972, 12: 21_848, 16: 40_724, 24: 78_475, 80: 342_733}  # GB of a card -> tokens
RESULTS = Path(__file__).with_name("results") / "longest_rows.jsonl"
DEMAND = Demand(
    method="qlora",
    precision="bfloat16",
    rank=RANK,
    dropout=0.0,
    optimizer="adamw_torch_fused",
    attention="varlen",
    double_quant=True,
    targets=None,
    length=MOST,
    rows=1,
    packed=True,
    device="cuda",
    span=float(MOST),
    fused=True,
)


def longest(gib: int, demand: Demand = DEMAND) -> tuple[int, sizing.Fit | None]:
    """Tokens of the longest row on a card of `gib`, and the placement of it."""
    facts = next(preset.facts for preset in presets.all() if preset.name == PRESET)
    model = sizing.model(facts)
    assert model is not None
    free = gib << 30
    row = sizing.longest(model, demand, None, free_bytes=free)
    at = replace(demand, length=row, span=float(row))
    return row, sizing.best(model, at, None, free_bytes=free) if row else None


def measure() -> dict[str, Any]:
    """One record of all cards."""
    cards = {}
    for gib, theirs in UNSLOTH.items():
        row, fit = longest(gib)
        assert fit is not None
        cards[str(gib)] = {
            "unsloth": theirs,
            "tokens": row,
            "adamw_8bit": longest(gib, replace(DEMAND, optimizer="adamw_8bit"))[0],
            "on_the_card": longest(gib, replace(DEMAND, offloads=False))[0],
            "host_gib": fit.host_bytes / 2**30,
        }
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return {"kind": "longest", "date": today, "preset": PRESET, "rank": RANK, "cards": cards}


def table(record: dict[str, Any]) -> str:
    """The rows of docs/speed.md."""
    return "\n".join(
        f"| {gib} | {card['unsloth']:,} | **{card['tokens']:,}** | {card['adamw_8bit']:,} | "
        f"{card['on_the_card']:,} | {card['host_gib']:.0f} |"
        for gib, card in record["cards"].items()
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    record = measure()
    print(table(record))
    if parser.parse_args().write:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
