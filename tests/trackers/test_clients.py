"""The trackers themselves, as they are published, read what a run sent: make test-clients.

They are installed once into ~/.cache (1 GB). Each is fed by the real child, which is killed twice.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3
from trackers.test_feed import lines, request

pytestmark = [pytest.mark.clients, pytest.mark.timeout(1800)]
HERE = Path(__file__).parent / "clients"


@pytest.fixture(scope="module")
def python() -> Path:
    """The Python of an environment with the trackers' packages."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tuning-trackers"
    wanted = (HERE / "requirements.txt").read_text()
    done, python = home / "done", home / "bin" / "python"
    if not done.exists() or done.read_text() != wanted:
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "-r", str(HERE / "requirements.txt")], check=True)
        done.write_text(wanted)
    return python


def environment(folder: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "MLFLOW_"))}
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_MODE": "offline", "HOME": str(folder)}
    return kept | {"PYTHONPATH": str(Path.cwd()), "HF_HUB_OFFLINE": "1"} | quiet


def read(python: Path, folder: Path, tracker: str, place: str) -> dict[str, Any]:
    command = [str(python), str(HERE / "read.py"), tracker, place]
    done = subprocess.run(command, env=environment(folder), capture_output=True, text=True)
    assert 0 == done.returncode, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def feed(python: Path, run: Path, tracker: str, address: str | None) -> None:
    """Fourteen records in three lives: the first two children are killed, steps are done again."""
    everything = lines(10)[:14]
    asked = request(run, tracker, address=address, end=str(run / "end.json"))
    (run / "log").mkdir()
    (run / "log" / "feed.json").write_text(json.dumps(asked))
    state = run / "trackers" / f"{tracker}.json"
    command = [str(python), "-m", "tuning.process", "trackers.feed", str(run / "log" / "feed.json")]
    for written, last in ((4, 3), (9, 6), (14, 0)):
        (run / "metrics.jsonl").write_bytes(b"".join(everything[:written]))
        if not last:
            (run / "end.json").write_text('{"ending": "finished", "facts": {"image": "a@b"}}')
        with (run / "log" / "feed.log").open("ab") as log:
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment(run)
            )
        try:
            deadline = time.monotonic() + 300
            while child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.2)
                sent = json.loads(state.read_text())["sent"][0] if state.exists() else 0
                if last and sent >= last:
                    time.sleep(3)  # what W&B and Trackio pass on by themselves
                    break
        finally:
            child.kill()
            child.wait()
            assert child.stdin
            child.stdin.close()
        (run / "metrics.jsonl").write_bytes(b"".join(everything[: written - 2]))  # a checkpoint
    assert json.loads(state.read_text())["done"], (run / "log" / "feed.log").read_text()


LOSS = [[step, 10.0 - step] for step in range(1, 11)]
EVALUATION = [
    [step, 5.0 - step] for step in (2, 4, 6, 8)
]  # of the 14 records, the last is step 10's


@pytest.fixture(scope="module")
def address(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server on loopback."""
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(python), "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", f"{port}"]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment(folder), cwd=folder
        )
    try:
        for _ in range(300):
            time.sleep(1)
            try:
                found = urllib3.request("GET", f"http://127.0.0.1:{port}/health", retries=False)
            except urllib3.exceptions.HTTPError:
                continue
            if found.status == 200:
                break
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def test_mlflow_shows_one_curve_of_a_run_that_was_killed_twice(
    python: Path, address: str, tmp_path: Path
) -> None:
    """Its own server and client: one finished run, each step once."""
    feed(python, tmp_path, "mlflow", address)

    found = read(python, tmp_path, "mlflow", address)
    assert LOSS == found["loss"]
    assert EVALUATION == found["eval_loss"]
    assert ("FINISHED", {"rank": "8"}) == (found["status"], found["params"])
    assert "a@b" == found["tags"]["image"]


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio", "wandb"])
def test_local_stores_hold_one_curve_of_a_run_that_was_killed_twice(
    python: Path, tracker: str, tmp_path: Path
) -> None:
    """TensorBoard's accumulator, Trackio's store and W&B's last offline file: each step once."""
    feed(python, tmp_path, tracker, None)

    place = {"tensorboard": tmp_path / "tensorboard" / "demo-0123", "wandb": tmp_path / "wandb"}
    found = read(python, tmp_path, tracker, str(place.get(tracker, tmp_path / "trackio")))
    assert LOSS == found["train/loss"]
    assert EVALUATION == found["eval/loss"]
