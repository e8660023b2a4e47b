"""`python -m tuning serve` as a process, and what it takes to look at it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

ROOT = Path(__file__).parents[1]
JSON = {"Content-Type": "application/json"}
START = 300.0  # seconds


@dataclass
class Server:
    """A server that runs."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self,
        path: str,
        body: Any = None,
        *,
        headers: dict[str, str] | None = None,
        seconds: float = 60,
    ) -> tuple[int, Any, http.client.HTTPResponse]:
        """One request: POST with a body, else GET. Status, answer (parsed if JSON), reply."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        with contextlib.closing(connection):
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            method = "GET" if data is None else "POST"
            connection.request(method, path, data, JSON | (headers or {}))
            reply = connection.getresponse()
            text = reply.read()
        parsed = json.loads(text) if "json" in (reply.headers["Content-Type"] or "") else text
        return reply.status, parsed, reply

    def metric(self, name: str, headers: dict[str, str] | None = None) -> float:
        """The sum of all samples of a metric."""
        _, text, _ = self.ask("/metrics", headers=headers)
        found = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text.decode(), re.MULTILINE)
        return sum(map(float, found))

    def idle(self, seconds: float = 20.0) -> bool:
        """Whether nothing is answered or waits any more, within `seconds`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not self.metric("tuning_serve_running") + self.metric("tuning_serve_waiting"):
                return True
            time.sleep(0.05)
        return False

    @property
    def memory(self) -> int:
        """Resident bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=120)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@contextlib.contextmanager
def serving(folder: Path, *arguments: str, ready: bool = True) -> Iterator[Server]:
    """A server with these arguments, ready to answer; killed at the end if it still runs."""
    log = folder / "serve.log"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tuning", "serve", "--port", "0", *arguments]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stderr=out, stdout=out, cwd=ROOT, env=environment)
    try:
        port = int(waited(process, log, r"Listening on http://\S+:(\d+)"))
        if ready:
            waited(process, log, r"Ready: (.*)")
        yield Server(process, port, log)
    finally:
        process.kill()
        process.wait()


def client(running: Server, key: str = "none") -> openai.OpenAI:
    """The official client, without retries."""
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0)


def waited(process: subprocess.Popen[bytes], log: Path, pattern: str) -> str:
    """The first group of `pattern`, once the log has it."""
    end = time.monotonic() + START
    while time.monotonic() < end:
        if found := re.search(pattern, log.read_text()):
            return found[1]
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(log.read_text())
