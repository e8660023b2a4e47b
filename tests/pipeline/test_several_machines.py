"""Several machines train one model, by the command line; one that is gone is waited for."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import architectures
import pytest
import safetensors.torch
import tiny_models
from commands import tuning, workspace

from tuning.pipeline.outcome import progress

SETTINGS = {"per_device_train_batch_size": 1, "max_length": 128, "save_steps": 2}
PATIENCE = 600.0


@dataclass
class Machines:
    """Two machines of one job, and what they were started with."""

    folder: Path
    port: int
    running: dict[int, subprocess.Popen[str]] = field(default_factory=dict)

    def run(self, node: int) -> Path:
        """The run directory of a machine."""
        return self.folder / f"run{node}"

    def start(self, *nodes: int) -> None:
        """Start these machines, or start them again."""
        for node in nodes:
            with (self.folder / f"out{node}").open("ab") as out:
                command = [sys.executable, "-m", "tuning", "run", *self.arguments(node)]
                self.running[node] = subprocess.Popen(command, stdout=out, stderr=out, text=True)

    def arguments(self, node: int) -> list[str]:
        """Of `run` on a machine."""
        folder, own = self.folder, self.folder / f"base{node}"
        base = own if own.exists() else folder / "base"
        return [
            *("-f", str(folder / "job.yaml"), "--base-model", str(base)),
            *("--data", str(folder / "rows.jsonl"), "--output", f"oci:{folder / 'image'}"),
            *("--run-dir", str(self.run(node)), "--ranks", "1", "--json"),
            *("--nodes", "2", "--node-rank", str(node), "--meet", f"127.0.0.1:{self.port}"),
        ]

    def ended(self, *nodes: int) -> list[int]:
        """The exit codes of these machines."""
        try:
            return [self.running[node].wait(PATIENCE) for node in nodes]
        except subprocess.TimeoutExpired:
            raise AssertionError([self.said(node) for node in (0, 1)]) from None

    def said(self, node: int) -> str:
        """What a machine printed."""
        return (self.folder / f"out{node}").read_text(errors="replace")

    def at_step(self, number: int) -> None:
        """Wait until machine 0 has trained so many steps."""
        end = time.monotonic() + PATIENCE
        while (now := progress(self.run(0))) is None or now["step"] < number:
            assert time.monotonic() < end, self.said(0)
            assert self.running[0].poll() is None, self.said(0)
            time.sleep(0.05)

    def digest(self) -> str:
        """Of the image."""
        index = json.loads((self.folder / "image" / "index.json").read_text())
        return str(index["manifests"][0]["digest"])


@pytest.fixture
def machines(tmp_path: Path) -> Any:
    """Makes two machines in a folder of their own; none is left running."""
    made: list[Machines] = []
    base = architectures.write("llama", tmp_path / "base")

    def make(name: str, **settings: Any) -> Machines:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "base").symlink_to(base)
        rows = "\n".join(json.dumps(row) for row in tiny_models.message_rows(16))
        (folder / "rows.jsonl").write_text(rows + "\n")
        workspace(folder / "job.yaml", method="qlora", settings=SETTINGS | settings)
        with socket.create_server(("127.0.0.1", 0)) as free:
            made.append(Machines(folder, free.getsockname()[1]))
        return made[-1]

    yield make
    for each in made:
        for process in each.running.values():
            process.kill()
            process.wait()


Make = Callable[..., Machines]


def test_two_machines_train_one_shared_model(machines: Make) -> None:
    """Machine 0 alone has rows, checkpoints, adapter and image; the other fetches weights."""
    job = machines("job", max_steps=3, fsdp="full_shard")
    job.start(1, 0)

    assert [0, 0] == job.ended(0, 1), job.said(0) + job.said(1)

    plan = json.loads((job.run(0) / "plan.json").read_text())["placement"]
    assert (2, 2, 2) == (plan["ranks"], plan["nodes"], plan["shards"])
    assert job.digest()
    assert (job.run(0) / "adapter").is_dir()
    assert not (job.run(1) / "adapter").exists() and not (job.run(1) / "checkpoints").exists()
    assert "trains with machine 0" in job.said(1)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", ["full_shard", "no_shard"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_machine_that_is_killed_comes_back(fsdp: str, victim: int, machines: Make) -> None:
    """Either of them: training goes on from the last checkpoint, to the same image."""
    clean = machines("clean", max_steps=12, fsdp=fsdp)
    clean.start(0, 1)
    assert [0, 0] == clean.ended(0, 1)
    job = machines("job", max_steps=12, fsdp=fsdp)
    job.start(0, 1)
    job.at_step(4)
    job.running[victim].kill()
    job.running[victim].wait()

    job.start(victim)

    assert [0, 0] == job.ended(0, 1), job.said(0) + job.said(1)
    assert clean.digest() == job.digest()
    told = "another machine was stopped or lost" in job.said(0)
    assert told or victim == 0


@pytest.mark.slow
def test_what_fails_on_another_machine_ends_the_run(machines: Make) -> None:
    """Weights that are damaged there: machine 0 says so, and does not wait for ever."""
    job = machines("job", max_steps=3)
    own = job.folder / "base1"
    shutil.copytree(job.folder / "base", own)
    weights = own / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    next(iter(tensors.values()))[0] = float("nan")
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})

    job.start(0, 1)

    assert [11] == job.ended(0), job.said(0)
    assert "MODEL-117" in job.said(0)


@pytest.mark.slow
def test_a_stop_of_all_goes_on_later(machines: Make) -> None:
    """SIGTERM on both ends both with 75; the same commands finish."""
    job = machines("job", max_steps=12, fsdp="full_shard")
    job.start(0, 1)
    job.at_step(3)
    for process in job.running.values():
        process.send_signal(signal.SIGTERM)
    assert [75, 75] == job.ended(0, 1), job.said(0) + job.said(1)

    job.start(0, 1)

    assert [0, 0] == job.ended(0, 1), job.said(0) + job.said(1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--nodes", "2"), "USE-104 --meet"),
        (("--nodes", "2", "--meet", "machine-0"), "--meet HOST:29400"),
        (("--nodes", "2", "--meet", "a:99999"), "--meet a:29400"),
        (("--nodes", "2", "--meet", "a:29400", "--node-rank", "2"), "USE-104 --node-rank"),
    ],
)
def test_a_machine_without_its_place_is_refused(options: tuple[str, ...], said: str) -> None:
    """Before anything is read or fetched."""
    done = tuning("run", "-f", "examples/workspace-demo.yaml", *options)

    assert 2 == done.returncode
    assert said in done.stderr


def test_a_job_s_index_is_the_machine_s_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes names it in the environment; without --nodes it means nothing."""
    monkeypatch.setitem(os.environ, "JOB_COMPLETION_INDEX", "3")
    done = tuning(
        *("run", "-f", "examples/workspace-demo.yaml"),
        *("--nodes", "3", "--meet", "a:29400"),
    )

    assert 2 == done.returncode
    assert "--node-rank: is 3" in done.stderr
