"""The adapter image beside the recipe "tar, gzip -9, sha256, copy", and the push beside its link.

    python benchmarks/image.py [--runs 5] [--rate 25] [--write]

Needs docker-registry (Debian). All numbers of one run are from one machine, interleaved, medians;
`--write` appends to benchmarks/results/image.jsonl.

* CPU of packaging: an 84 MB adapter into an OCI layout, against the programs of the recipe. "ours"
  is the step as a run takes it, in a process that is up; "whole process" has Python's start in it.
* Push: seconds over a link of --rate MB/s (a relay with one bucket for all connections), over bytes
  by rate; and straight to the registry on loopback, which is as fast as the registry hashes.
* Unchanged push: bytes of request bodies that reach the registry.
* Memory: peak of a process that packages and pushes 1 GB of weights, over the same process idle.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import multiprocessing
import os
import platform
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import adapters  # noqa: E402
import numpy as np  # noqa: E402
from faults.proxy import Proxy  # noqa: E402
from registries import Registry  # noqa: E402

MB, GB = 10**6, 10**9
PIECE = 1 << 16
PACK = "import sys, adapters; adapters.build(__import__('pathlib').Path(sys.argv[1]))"
# Loads what a run has loaded by then, tells its memory, works, tells the peak.
MEMORY = """
import sys
from pathlib import Path
import adapters
from tuning.oci import registry
from tuning.spec import reference
def kib(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
idle = kib("VmRSS:")
folder, host = Path(sys.argv[1]), sys.argv[2]
adapters.build(folder)
packaged = kib("VmHWM:")
to = registry.Remote(reference.parse(f"{host}/bench/memory:1"))
registry.push(to, folder / "image", run_id="run-1")
print(idle, packaged, kib("VmHWM:"))
"""


def weights(folder: Path, size: int) -> Path:
    """An adapter folder with `size` bytes of bf16 weights, as training leaves them: normal."""
    adapters.adapter(folder, size=0)
    chance, tensors, left = np.random.default_rng(0), {}, size // 32 * 32
    for part, shape, span in (
        ("lora_A", [8, left // 16], [0, left]),
        ("lora_B", [0, 8], [left, left]),
    ):
        name = f"base_model.model.model.layers.0.self_attn.q_proj.{part}.weight"
        tensors[name] = {"dtype": "BF16", "shape": shape, "data_offsets": span}
    header = json.dumps(tensors).encode()
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        while left:
            count = min(left, 32 * MB)
            normal = chance.normal(scale=0.02, size=count // 2).astype("<f4")
            file.write((normal.view("<u4") >> 16).astype("<u2").tobytes())
            left -= count
    return folder


def cpu(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of `work`, its children's included."""

    def spent() -> float:
        uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(use.ru_utime + use.ru_stime for use in uses)

    before, start = spent(), time.perf_counter()
    work()
    return time.perf_counter() - start, spent() - before


def packaging(folder: Path, runs: int) -> dict[str, Any]:
    """CPU seconds of each way to package the adapter in `folder`/adapter."""
    tar, copied = folder / "recipe.tar", folder / "copied"

    def recipe() -> None:
        names = ["adapter_config.json", "adapter_model.safetensors"]
        command = ["tar", "-cf", tar, "-C", folder / "adapter", *names]
        subprocess.run(command, check=True)
        subprocess.run(["gzip", "-9", "-f", tar], check=True)
        packed = tar.with_name(f"{tar.name}.gz")
        subprocess.run(["sha256sum", packed], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["cp", packed, copied], check=True)

    def whole() -> None:
        subprocess.run([sys.executable, "-c", PACK, folder], check=True, env=environment())

    def ours() -> None:
        adapters.build(folder)

    ways = {"recipe": recipe, "ours": ours, "whole process": whole}
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, way in ways.items():
            shutil.rmtree(folder / "image", ignore_errors=True)
            seen[name].append(cpu(way))
    found = {
        name: {
            "wall_seconds": round(statistics.median(wall for wall, _ in pairs), 3),
            "cpu_seconds": round(statistics.median(spent for _, spent in pairs), 3),
        }
        for name, pairs in seen.items()
    }
    base = found["recipe"]["cpu_seconds"]
    found["ratio_of_cpu"] = {
        name: round(found[name]["cpu_seconds"] / base, 4) for name in ("ours", "whole process")
    }
    return found


def environment() -> dict[str, str]:
    """For a child that imports this checkout and its tests' rooms."""
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}


def relay(upstream: tuple[str, int], rate: float, told: Any) -> None:
    """A link of `rate` bytes a second towards `upstream`, all connections together; for ever."""
    lock, free_at = threading.Lock(), [0.0]

    def pass_on(source: socket.socket, sink: socket.socket, *, limited: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(PIECE):
                if limited:
                    with lock:
                        now = time.monotonic()
                        free_at[0] = max(free_at[0], now) + len(piece) / rate
                        pause = free_at[0] - now
                    time.sleep(max(0.0, pause))
                sink.sendall(piece)
            sink.shutdown(socket.SHUT_WR)

    server = socket.create_server(("127.0.0.1", 0), backlog=64)
    told.send(server.getsockname()[1])
    while True:
        near, _ = server.accept()
        far = socket.create_connection(upstream)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, PIECE)
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for source, sink, limited in ((near, far, True), (far, near, False)):
            threading.Thread(
                target=pass_on, args=(source, sink), kwargs={"limited": limited}, daemon=True
            ).start()


@contextlib.contextmanager
def link(upstream: tuple[str, int], rate: float) -> Iterator[str]:
    """The host of a relay with this rate, in a process of its own."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=relay, args=(upstream, rate, theirs), daemon=True)
    process.start()
    try:
        yield f"127.0.0.1:{ours.recv()}"
    finally:
        process.kill()
        process.join()


def push(host: str, layout: Path, repository: str) -> float:
    """Seconds that a push of `layout` takes."""
    from tuning.oci import registry
    from tuning.spec import reference

    to = registry.Remote(reference.parse(f"{host}/bench/{repository}:1"))
    start = time.perf_counter()
    registry.push(to, layout, run_id="run-1")
    return time.perf_counter() - start


def pushing(folder: Path, runs: int, rate: float) -> dict[str, Any]:
    """Seconds of a push, straight and over a link; what an unchanged one sends."""
    size = sum(path.stat().st_size for path in (folder / "image").rglob("*") if path.is_file())
    straight, limited, unchanged = [], [], []
    with Registry(folder) as registry, link(registry.address, rate * MB) as slow:
        push(registry.host, folder / "image", "warm")  # imports
        for _ in range(runs):
            # Each to a registry without the blobs: the data go, the process stays.
            shutil.rmtree(registry.folder / "data")
            straight.append(push(registry.host, folder / "image", "straight"))
            shutil.rmtree(registry.folder / "data")
            limited.append(push(slow, folder / "image", "limited"))
            unchanged.append(push(slow, folder / "image", "limited"))
        with Proxy(registry.address) as counting:
            push(counting.host, folder / "image", "limited")
            bodies = {
                kind: sum(s.received for s in counting.seen if f"/{kind}/" in s.path)
                for kind in ("blobs", "manifests")
            }
            requests = len(counting.seen)
    bare = size / (rate * MB)
    took = statistics.median(limited)
    return {
        "bytes": size,
        "straight_seconds": round(statistics.median(straight), 3),
        "straight_mb_per_second": round(size / MB / statistics.median(straight), 1),
        "link_mb_per_second": rate,
        "link_seconds": round(took, 3),
        "bytes_over_rate_seconds": round(bare, 3),
        "ratio_after_half_a_second": round((took - 0.5) / bare, 3),
        "unchanged_seconds": round(statistics.median(unchanged), 3),
        "unchanged_requests": requests,
        "unchanged_blob_bytes": bodies["blobs"],
        "unchanged_manifest_bytes": bodies["manifests"],
    }


def memory(folder: Path) -> dict[str, Any]:
    """Peak bytes over idle of packaging and pushing 1 GB."""
    weights(folder / "adapter", GB)
    with Registry(folder) as registry:
        command = [sys.executable, "-c", MEMORY, folder, registry.host]
        done = subprocess.run(command, check=True, env=environment(), capture_output=True)
    idle, packaged, pushed = (int(word) * 1024 for word in done.stdout.split())
    return {
        "idle_mb": round(idle / MB, 1),
        "packaging_over_idle_mb": round((packaged - idle) / MB, 1),
        "pushing_over_idle_mb": round((pushed - idle) / MB, 1),
    }


def main() -> None:
    """Measure, print, and keep if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rate", type=float, default=25.0, help="MB/s of the link")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "84"
        weights(folder / "adapter", 84 * MB)
        record: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
            f"Python {platform.python_version()}",
            "load_average": round(os.getloadavg()[0], 1),  # what else the machine did
            "runs": given.runs,
            "packaging": packaging(folder, given.runs),
            "push": pushing(folder, given.runs, given.rate),
            "memory_1_gb": memory(Path(scratch) / "1000"),
        }
    print(json.dumps(record, indent=2))
    if given.write:
        with (ROOT / "benchmarks" / "results" / "image.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
