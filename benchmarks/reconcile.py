"""Speed, CPU and memory of the operator on a real API server (no pods run): `--help` says how.

    .venv/bin/python benchmarks/reconcile.py --rate 20 --latency 200 --converge 1000 --memory 10000

It starts its own control plane, so that all share this machine's cores with etcd and the API
server: what is measured is an upper bound. `--prefer` (root) gives these processes precedence over
whatever else the machine does; "others" is the share of its time that the rest took all the same.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from cluster import bed  # noqa: E402
from cluster.world import NAMESPACE, wait, workspace  # noqa: E402

from jobs.api import client, crd  # noqa: E402
from jobs.api.client import ApiError, Cluster  # noqa: E402
from jobs.api.kinds import CRD, JOB, WORKSPACE  # noqa: E402
from jobs.controller import watch  # noqa: E402

TICKS = os.sysconf("SC_CLK_TCK")


def used(pid: int) -> tuple[float, int]:
    """(seconds of CPU, bytes of memory) of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return (int(fields[11]) + int(fields[12])) / TICKS, pages * os.sysconf("SC_PAGE_SIZE")


def machine() -> tuple[int, int]:
    """(ticks that the processors worked, ticks in all) since the start of the machine."""
    fields = [int(each) for each in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return sum(fields) - fields[3] - fields[4], sum(fields)


class Share:
    """The share of the machine's time that was not idle and not ours, since the last question."""

    def __init__(self, pids: list[int]) -> None:
        self.pids = pids
        self.before = self._now()

    def _now(self) -> tuple[int, int, float]:
        return (*machine(), sum(used(pid)[0] for pid in self.pids) * TICKS)

    def others(self) -> float:
        """Between 0 and 1."""
        was, self.before = self.before, self._now()
        busy, whole, ours = (now - then for now, then in zip(self.before, was, strict=True))
        return round(max(0.0, busy - ours) / max(1, whole), 2)


def prefer(pid: int) -> None:
    """Let a process and its scheduling group go before all others."""
    os.setpriority(os.PRIO_PROCESS, pid, -15)
    group = Path(f"/proc/{pid}/autogroup")
    if group.exists():
        group.write_text("-15")


def latency(api: Cluster, count: int, rate: float) -> dict[str, Any]:
    """Seconds from a Workspace's creation to its Job, as a watch sees it."""
    seen: dict[str, float] = {}
    made: dict[str, float] = {}
    stop = threading.Event()

    def look() -> None:
        *_, (_, version) = api.pages(JOB, "speed")
        for job in api.watch(JOB, "speed", labels="", version=version, seconds=600):
            key = watch.key_of_owned(job)
            if key:
                seen.setdefault(key[1], time.perf_counter())
            if stop.is_set() or len(seen) == count:
                return

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    start = time.perf_counter()
    for i in range(count):
        time.sleep(max(0.0, start + i / rate - time.perf_counter()))
        made[f"l{i}"] = time.perf_counter()
        api.create(WORKSPACE, workspace(f"l{i}", "speed"))
    watcher.join(120)
    times = sorted(1000 * (seen[name] - made[name]) for name in made)
    return {
        "count": count,
        "rate": rate,
        "p50_ms": round(statistics.median(times), 1),
        "p99_ms": round(times[int(0.99 * (len(times) - 1))], 1),
        "max_ms": round(times[-1], 1),
    }


def create(api: Cluster, prefix: str, count: int, namespace: str) -> None:
    """Many Workspaces, from several threads."""
    numbers = iter(range(count))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            api.create(WORKSPACE, workspace(f"{prefix}{number}", namespace))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rate", type=float, default=20)
    parser.add_argument("--latency", type=int, default=200, help="Workspaces for latency")
    parser.add_argument("--converge", type=int, default=1000, help="Workspaces at once")
    parser.add_argument("--memory", type=int, default=0, help="Workspaces for memory, in all")
    parser.add_argument("--prefer", action="store_true", help="before all else on this machine")
    parser.add_argument("--write", action="store_true", help="append to benchmarks/results")
    asked = parser.parse_args()
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, with the API server on it",
        "versions": {"python": platform.python_version(), "kubernetes": "1.20.2"},
        "preferred": asked.prefer,
    }
    with tempfile.TemporaryDirectory() as folder, bed.up(Path(folder) / "bed") as server:
        api = client.connect(str(server.kubeconfig), threads=8)
        api.create(CRD, crd.definition())
        wait(lambda: _served(api))
        for name in ("speed", "many", "tuning-system"):
            meta = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
            api.create(NAMESPACE, meta)
        command = [sys.executable, "-m", "jobs", "run", "--kubeconfig", str(server.kubeconfig)]
        log = Path(folder) / "operator.log"
        with log.open("wb") as file:
            operator = subprocess.Popen([*command, "--port", "0"], cwd=ROOT, stderr=file)
            try:
                wait(lambda: b"leading" in log.read_bytes())
                notes = (server.folder / "run").glob("*.pid")
                pids = [operator.pid, os.getpid(), *(int(note.read_text()) for note in notes)]
                for pid in pids if asked.prefer else ():
                    prefer(pid)
                found["start"] = dict(zip(("cpu_s", "bytes"), used(operator.pid), strict=True))
                share = Share(pids)
                found["latency"] = latency(api, asked.latency, asked.rate)
                found["latency"]["others"] = share.others()
                found["converge"] = converge(api, operator.pid, "c", asked.converge)
                found["converge"]["others"] = share.others()
                if (more := asked.memory - asked.converge - asked.latency) > 0:
                    found["memory"] = converge(api, operator.pid, "m", more)
                    found["memory"]["count"] = asked.memory
            finally:
                operator.terminate()
                operator.wait(60)
    assert operator.returncode == 0
    print(json.dumps(found, indent=2))
    if asked.write:
        with (ROOT / "benchmarks" / "results" / "reconcile.jsonl").open("a") as results:
            results.write(json.dumps(found) + "\n")


def converge(api: Cluster, pid: int, prefix: str, count: int) -> dict[str, Any]:
    """CPU until each of `count` Workspaces that come at once has its Job and a status."""
    before, start = used(pid)[0], time.perf_counter()
    create(api, prefix, count, "many")

    def done() -> bool:
        items = api.find(WORKSPACE, "many")
        return all("job" in (item.get("status") or {}) for item in items)

    while not done():
        time.sleep(0.5)
    cpu, memory = used(pid)
    return {
        "count": count,
        "cpu_s": round(cpu - before, 2),
        "wall_s": round(time.perf_counter() - start, 1),
        "bytes": memory,
    }


def _served(api: Cluster) -> bool:
    try:
        return api.find(WORKSPACE) == []
    except ApiError:
        return False


if __name__ == "__main__":
    main()
