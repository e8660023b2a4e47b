"""What checkpoints cost: one training with them and without, side by side, several times.

    python benchmarks/checkpoints.py [PAIRS]

A small Llama (hidden size 512, 8 layers) is trained for some 60 steps by the training child itself,
in a process of its own: once with a checkpoint every 10 seconds, 60 times as often as a run takes
them, and once without any. The ratio of the pair is what such saving costs; a run's own share is a
60th of it. Besides, the time of one save of an adapter of 84 MB with AdamW's two moments, and what
share of the ten minutes between two checkpoints that is. Results go to
benchmarks/results/checkpoints.jsonl.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
OFTEN, USUAL = 10.0, 600.0  # seconds between two checkpoints
ADAPTER = 84 * 10**6  # bytes in bf16


def train(folder: Path, seconds: float) -> dict[str, Any]:
    """One training in this process; its time without start and end."""
    import tiny_models
    import tiny_runs

    from tuning.training import train as training

    base = folder / "base"
    if not base.exists():
        tiny_models.build("llama", base, hidden_size=512, num_hidden_layers=8)
    recipe = tiny_runs.recipe(packing=True, steps=60, dropout=0.0, epochs=60.0)
    with tempfile.TemporaryDirectory(dir=folder) as run:
        asked = tiny_runs.request(
            Path(run), base, recipe, tiny_runs.placement(), count=48, save_seconds=seconds
        )
        before = time.process_time()
        done = training.work(asked)
        cpu = time.process_time() - before
    return {"seconds": done["seconds"], "cpu": cpu}


def one_save(folder: Path) -> float:
    """Seconds of one save of a large adapter and its optimizer."""
    import torch

    from tuning.training import checkpoint

    weights = {
        f"layer.{n}": torch.randn(ADAPTER // 2 // 40, dtype=torch.float32) for n in range(40)
    }
    moments = {f"{n}.{kind}": w for n, w in enumerate(weights.values()) for kind in ("m", "v")}
    begin = time.monotonic()
    contents = (
        (name, checkpoint.pack_tensors(tensors))
        for name, tensors in (("weights.safetensors", weights), ("optimizer.safetensors", moments))
    )
    checkpoint.save(folder / "saves", run_id="0" * 64, step=1, contents=contents)
    return time.monotonic() - begin


def child(folder: Path, seconds: float) -> dict[str, Any]:
    """`train` in a fresh process."""
    command = [sys.executable, __file__, str(folder), str(seconds)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure, print and keep."""
    if len(sys.argv) == 3:
        print(json.dumps(train(Path(sys.argv[1]), float(sys.argv[2]))))
        return
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    ratios, walls = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        child(folder, 1e9)  # builds the base, warms the caches
        for number in range(pairs):
            first = OFTEN if number % 2 else 1e9
            found = {s: child(folder, s) for s in (first, OFTEN + 1e9 - first)}
            ratios.append(found[OFTEN]["cpu"] / found[1e9]["cpu"])
            walls.append(found[OFTEN]["seconds"] / found[1e9]["seconds"])
        save = one_save(folder)
    cpu, wall = statistics.median(ratios), statistics.median(walls)
    print(
        f"with a checkpoint every {OFTEN:.0f} s: {cpu:.3f} times the CPU-seconds, {wall:.3f} wall"
    )
    print(f"pairs, CPU: {', '.join(f'{ratio:.3f}' for ratio in ratios)}")
    print(f"one save of an 84 MB adapter: {save:.2f} s, {100 * save / USUAL:.2f} % of ten minutes")
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "versions": {n: importlib.metadata.version(n) for n in ("torch", "trl", "transformers")},
        "every_seconds": OFTEN,
        "cpu_ratio": round(cpu, 4),
        "cpu_ratios": [round(ratio, 4) for ratio in ratios],
        "wall_ratio": round(wall, 4),
        "save_84_mb_seconds": round(save, 3),
        "share_of_usual_interval": round(save / USUAL, 5),
    }
    with (HERE / "results" / "checkpoints.jsonl").open("a") as file:
        file.write(json.dumps(result, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
