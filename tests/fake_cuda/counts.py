"""The kernels of a step, by the way to train: kernels.json.

    make kernel-counts     count again and write the file

The tests compare. A change that adds casts or copies shows as a difference, to be explained or
taken back; a change that saves some is written down. Counted in the two layers of a tiny model,
forward and backward; `rest` is what one micro-batch runs outside its layers.
"""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fake_cuda import ways
from fake_cuda.worker import Worker

FILE = Path(__file__).with_name("kernels.json")
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")


def versions() -> dict[str, str]:
    """The libraries that decide the counts."""
    return {package: importlib.metadata.version(package) for package in PACKAGES}


def of(record: dict[str, Any]) -> dict[str, Any]:
    """The counts of a step that `steps.step` recorded."""
    kernels = record["kernels"]
    return {"layers": kernels["layers"], "rest": sum(kernels["rest"].values())}


def read() -> dict[str, Any]:
    """Versions, and counts by the name of the way."""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def write(counts: dict[str, Any]) -> None:
    """One line a way."""
    lines = [f"  {json.dumps(name)}: {json.dumps(counts[name])}" for name in sorted(counts)]
    head = f'{{"versions": {json.dumps(versions())},\n "counts": {{\n'
    FILE.write_text(head + ",\n".join(lines) + "\n}}\n", encoding="utf-8")


def main() -> None:
    """Count and write."""
    worker = Worker()
    chosen = ways.covering(ways.every())
    write({way.name: of(worker.call("steps.step", **asdict(way))) for way in chosen})
    worker.close()


if __name__ == "__main__":
    main()
