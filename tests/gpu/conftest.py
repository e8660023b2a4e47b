"""The record of a GPU's run of this suite: one JSON file."""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "TUNING_GPU_RESULTS"  # where the record goes
DEFAULT = ROOT / "benchmarks" / "results" / "gpu_suite.json"
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "triton")


@pytest.fixture(scope="session")
def records() -> Iterator[dict[str, Any]]:
    """What each check measured; written at the end, whatever failed."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here, or torch is a CPU build: make test-gpu needs one")
    began, found = time.monotonic(), {}
    yield found
    major, minor = torch.cuda.get_device_capability()
    record = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.monotonic() - began),
        "device": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "memory_bytes": torch.cuda.mem_get_info()[1],
        "cuda": torch.version.cuda,
        "versions": _versions(),
        "checks": found,
    }
    path = Path(os.environ.get(RESULTS) or DEFAULT)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {path}")


def _versions() -> dict[str, str]:
    there = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {name: there[name] for name in PACKAGES if name in there}


@pytest.fixture
def recorded(
    records: dict[str, Any], request: pytest.FixtureRequest
) -> Callable[[Callable[[], dict[str, Any]]], None]:
    """`recorded(check)`: run it, and keep what it measured or why it failed."""

    def run(check: Callable[[], dict[str, Any]]) -> None:
        name = request.node.name.removeprefix("test_")
        began = time.monotonic()
        try:
            found = {"passed": True} | check()
        except BaseException as error:
            found = {"passed": False, "error": f"{type(error).__name__}: {error}"[:4000]}
            raise
        finally:
            records[name] = found | {"seconds": round(time.monotonic() - began, 1)}

    return run
