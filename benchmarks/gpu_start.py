"""`tuning run` on a GPU from the command to the first step, twice: the packed weights are kept."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import gpu_plan
from benchmarks.gpu_peers import save_base
from benchmarks.gpu_plan import PHI, write
from benchmarks.gpu_rungs import Sizes

HERE = Path(__file__).resolve().parent
SECONDS = 120  # a start may take: the part of the ladder has four minutes

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


def first_steps(sizes: Sizes, path: Path) -> None:
    """`tuning run` of a QLoRA job on a local base, from the command to the first step, twice.

    The second start finds the packed weights; both find the libraries in the page cache.
    """
    preset = PHI
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        save_base(preset, sizes, base)
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
            if time.monotonic() - start > SECONDS:
                child.kill()
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
