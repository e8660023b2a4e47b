"""A run's progress over HTTP while it lasts."""

import contextlib
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tuning.errors import SpecError
from tuning.pipeline import progress_server

STEP = {"step": 3, "steps": 12, "loss": 1.5, "tokens_per_second": 1234.5, "eta_seconds": 60}


@pytest.fixture
def get(tmp_path):
    with progress_server.served(tmp_path, name="<demo>", port=0, host="127.0.0.1") as port:
        yield lambda path: urllib.request.urlopen(f"http://127.0.0.1:{port}{path}").read().decode()


def test_before_the_first_step_there_is_an_answer(get):
    """A poll that comes early gets an empty object, not an error."""
    assert {} == json.loads(get("/progress"))
    assert "not training yet" in get("/")


def test_the_last_step_is_served_for_programs_and_for_people(get, tmp_path):
    """JSON, Prometheus text and page tell the same step; names are escaped."""
    (tmp_path / "metrics.jsonl").write_text(json.dumps(STEP | {"loss": 2.5}) + "\n")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(STEP) + "\n")

    assert STEP == json.loads(get("/progress"))
    assert "# TYPE tuning_loss gauge\ntuning_loss 1.5\n" in get("/metrics")
    page = get("/")
    assert "step 3 of 12" in page
    assert "&lt;demo&gt;" in page
    assert 'http-equiv="refresh"' in page


def test_other_paths_are_not_found(get):
    """Nothing of the run directory is served as a file."""
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get("/../metrics.jsonl")


def test_only_this_machine_is_served_unless_asked(tmp_path):
    """The default address is loopback; another page's name is answered 421."""
    with progress_server.served(tmp_path, name="a", port=0) as port:
        with socket.create_connection(("127.0.0.1", port)) as own:
            own.sendall(b"GET /progress HTTP/1.1\r\nHost: rebind.example\r\n\r\n")
            assert b" 421 " in own.makefile("rb").readline()
        listening = subprocess.run(
            ["cat", "/proc/net/tcp"], check=True, capture_output=True, text=True
        ).stdout
        (address,) = [
            line.split()[1]
            for line in listening.splitlines()
            if line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A"
        ]

    assert f"0100007F:{port:04X}" == address


@pytest.mark.parametrize(
    "sent", [b"", pytest.param(b"GET /progress HTTP/1.1\r\nHost: x\r\n", marks=pytest.mark.slow)]
)
def test_idle_clients_take_nothing_of_the_run(sent, tmp_path, monkeypatch):
    """Of 300 connections that ask nothing few are kept, none for long; then others are answered."""
    monkeypatch.setattr(progress_server, "SECONDS", 1.0)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with progress_server.served(tmp_path, name="a", port=0) as port:
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(300)]
        for each in idle:
            with contextlib.suppress(OSError):  # refused by now
                each.sendall(sent)
        deadline, answer = time.monotonic() + 30, b""
        while not answer and time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # all places are taken
                answer = urllib.request.urlopen(f"http://127.0.0.1:{port}/progress").read()
        held = len(list(Path("/proc/self/fd").iterdir())) - before - len(idle)
        for each in idle:
            each.close()

    assert b"{}" == answer
    assert held <= progress_server.CONNECTIONS + 4


def test_a_taken_port_is_said_so(tmp_path):
    """Two runs on one port: the second is told to choose another."""
    with (
        progress_server.served(tmp_path, name="a", port=0, host="127.0.0.1") as port,
        pytest.raises(SpecError, match=f"port {port} cannot be used"),
        progress_server.served(tmp_path, name="b", port=port, host="127.0.0.1"),
    ):
        pass
