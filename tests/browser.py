"""Headless Chromium, driven by its own DevTools protocol over a websocket."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import websocket

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
    "--remote-allow-origins=*",
)


class Tab:
    """One page; what it asks for and complains about is kept."""

    def __init__(self, address: str) -> None:
        self._socket = websocket.create_connection(address, timeout=60)
        self._number = 0
        self.events: list[dict[str, Any]] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> Any:
        """One command, and its result."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters}
        self._socket.send(json.dumps(command))
        while True:
            record = json.loads(self._socket.recv())
            if record.get("id") == self._number:
                assert "error" not in record, record
                return record["result"]
            self.events.append(record)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        result = self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, script: str, seconds: float = 60.0) -> Any:
        """The expression's value, once it is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.run(script):
                return value
            time.sleep(0.1)
        raise AssertionError(f"never true: {script}; {self.run('document.body.innerText')}")

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def named(self, event: str) -> list[dict[str, Any]]:
        """The parameters of all events of this name."""
        return [one["params"] for one in self.events if one.get("method") == event]


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Tab]:
    """A fresh browser with an empty page."""
    program = shutil.which("chromium")
    assert program is not None, "make system installs chromium"
    profile = folder / "profile"
    process = subprocess.Popen(
        [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port = profile / "DevToolsActivePort"
        end = time.monotonic() + 60
        while not (port.exists() and port.read_text().count("\n")):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        listing = f"http://127.0.0.1:{port.read_text().split()[0]}/json"
        with urllib.request.urlopen(listing, timeout=60) as reply:
            pages = [one for one in json.load(reply) if one["type"] == "page"]
        with contextlib.closing(Tab(pages[0]["webSocketDebuggerUrl"])) as tab:
            yield tab
    finally:
        process.kill()
        process.wait()
