"""A run's progress over HTTP: `GET /progress` (JSON), `/metrics` (Prometheus), `/` (a page).

Read-only, from `metrics.jsonl`. On in a Job (the operator polls it), off locally without --port.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuning import files
from tuning.errors import SpecError
from tuning.network import own_host
from tuning.pipeline import outcome, report, tracking

CONNECTIONS = 16
SECONDS = 10.0  # that a connection may last
GAUGES = {
    "step": "optimizer steps done",
    "steps": "optimizer steps planned",
    "loss": "training loss of the last logged step",
    "tokens_per_second": "real tokens trained a second",
    "eta_seconds": "seconds until the last step",
    "memory_bytes": "peak memory of the training process",
    "planned_memory_bytes": "peak memory that was planned for it",
}


@contextmanager
def served(run: Path, *, name: str, port: int | None, host: str = "127.0.0.1") -> Iterator[int]:
    """Serve the run directory's progress on `host` while the block runs; yields the port.

    `port` None serves nothing, 0 takes any free one. Raises SpecError for one that is taken.
    """
    if port is None:
        yield 0
        return
    handler = type("Handler", (_Handler,), {"run_folder": run, "run_name": name})
    try:
        server = _Server((host, port), handler)
    except OSError as error:
        what = f"port {port} cannot be used ({error.strerror})"
        raise SpecError.at("RUN-141", "--port", what, "name another port") from None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


class _Server(http.server.ThreadingHTTPServer):
    """At most CONNECTIONS at a time: each has a thread and a file descriptor of the run."""

    def __init__(self, address: tuple[str, int], handler: type[_Handler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.free = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread, or close the connection if there are too many."""
        if self.free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer the one request of a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that has gone is no fault of the run."""


class _Handler(http.server.BaseHTTPRequestHandler):
    run_folder: Path
    run_name: str

    def setup(self) -> None:
        """Close the connection after SECONDS even if it trickles."""
        super().setup()
        self._end = threading.Timer(SECONDS, self._close)
        self._end.daemon = True
        self._end.start()

    def finish(self) -> None:
        """End the timer with the connection."""
        self._end.cancel()
        super().finish()

    def _close(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self) -> None:
        """Answer one of the three paths."""
        if not own_host.is_own(self.headers.get("Host")):
            self.send_error(421)
            return
        now = outcome.progress(self.run_folder)
        match self.path.partition("?")[0]:
            case "/progress":
                links = tracking.links(self.run_folder)
                shown = (now or {}) | ({"trackers": links} if links else {})
                self._send(json.dumps(shown), "application/json")
            case "/metrics":
                values = (now or {}) | planned(self.run_folder)
                self._send(metrics(values), "text/plain; version=0.0.4")
            case "/":
                page = report.served(self.run_folder, name=self.run_name)
                self._send(page, "text/html; charset=utf-8")
            case _:
                self.send_error(404)

    def _send(self, text: str, kind: str) -> None:
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing: it is polled every few seconds."""


def planned(run: Path) -> dict[str, Any]:
    """What the run directory's plan says of the values in GAUGES; empty before there is one."""
    with contextlib.suppress(OSError, ValueError):
        memory = files.read_json(run / "plan.json").get("memory") or {}
        return {"planned_memory_bytes": memory.get("allocated")}
    return {}


def metrics(now: dict[str, Any]) -> str:
    """A progress record, and what was planned, in Prometheus' text format."""
    lines = []
    for name, meaning in GAUGES.items():
        if isinstance(value := now.get(name), int | float):
            lines += [
                f"# HELP tuning_{name} {meaning}",
                f"# TYPE tuning_{name} gauge",
                f"tuning_{name} {value}",
            ]
    return "\n".join([*lines, ""])
