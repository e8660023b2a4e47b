"""How long the commands that need no model take to start, beside an interpreter that does nothing.

    python benchmarks/startup.py [--runs 7] [--write]

Whole processes, interleaved, medians; `--write` appends to benchmarks/results/startup.jsonl.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
QUICK_START = ROOT / "examples" / "workspace-tuning-phi-3.yaml"
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "tuning --help": ["-m", "tuning", "--help"],
    "tuning presets": ["-m", "tuning", "presets"],
    "tuning plan": [
        *("-m", "tuning", "plan", "-f", str(QUICK_START)),
        *("--output", "oci:unused", "--base-model", "phi-3-mini-128k-instruct"),
    ],
}


def once(arguments: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of one process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for _ in range(given.runs):
        for name, arguments in COMMANDS.items():
            times[name].append(once(arguments))
    medians = {
        name: [round(statistics.median(column), 3) for column in zip(*pairs, strict=True)]
        for name, pairs in times.items()
    }
    for name, (wall, cpu) in medians.items():
        print(f"{name:18s} {wall:6.3f} s wall  {cpu:6.3f} s CPU")
    if given.write:
        record = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, Python {platform.python_version()}",
            "runs": given.runs,
            "median_wall_and_cpu_seconds": medians,
        }
        with (ROOT / "benchmarks" / "results" / "startup.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
