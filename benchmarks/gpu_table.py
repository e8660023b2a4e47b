"""The GPU ladder as a table: each step's gain, and the part of the card's limit that it reaches.

Reads the lines of `gpu_ladder steps` and loads no torch. The limit is what the frozen weights, the
adapters and attention cannot do without, at the rate of a large product on the same card.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
HEAD = """| model, rows | way | tokens/s | gain | of the limit | plan's error | GB |
|---|---|---|---|---|---|---|
"""


def records(path: Path) -> list[Record]:
    """The newest record of each rung and peer, in the order of the first."""
    found: dict[str, Record] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        record = json.loads(line)
        if record["kind"] in ("step", "peer"):
            found[json.dumps([record["preset"], record["long"], record["rung"]])] = record
    return list(found.values())


def table(found: Sequence[Record]) -> str:
    """Markdown: of each model and kind of rows the ways in order, the gain over the one before.

    A way of another method or on other rows begins anew; what failed has its error.
    """
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows(found))


def rows(found: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    """The cells of the table."""
    before: dict[tuple[str, bool, str], float] = {}
    for record in sorted(
        found, key=lambda r: (r["preset"], r["long"], r["kind"] == "peer", r["place"])
    ):
        rung = record["rung"]
        what = f"{record['preset']}, {'one document' if record['long'] else 'chats'}"
        name = rung["name"] + (", NF4" if rung["method"] == "qlora" else "")
        if "error" in record:
            yield what, name, record["error"].replace("|", "/"), "", "", "", ""
            continue
        speed, planned = record["tokens_per_second"], record.get("planned")
        key = (record["preset"], record["long"], rung["method"])
        last = before.get(key) if record["kind"] == "step" else None
        before[key] = speed
        peak = record.get("allocated")
        yield (
            what,
            name,
            f"{speed:,.0f}",
            f"{speed / last:.2f}x" if last else "",
            f"{record['limit_share']:.3f}",
            f"{planned / speed - 1:+.0%}" if planned else "",
            f"{peak / 1e9:.1f}" if peak else "",
        )
