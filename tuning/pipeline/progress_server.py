"""A run's progress over HTTP: `GET /progress` (JSON), `/metrics` (Prometheus), `/` (a page).

Read-only, from `metrics.jsonl`. On in a Job (the operator polls it), off locally without --port.
"""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuning.errors import SpecError
from tuning.pipeline import outcome, report

GAUGES = {
    "step": "optimizer steps done",
    "steps": "optimizer steps planned",
    "loss": "training loss of the last logged step",
    "tokens_per_second": "real tokens trained a second",
    "eta_seconds": "seconds until the last step",
    "memory_bytes": "peak memory of the training process",
}


@contextmanager
def served(run: Path, *, name: str, port: int | None, host: str = "0.0.0.0") -> Iterator[int]:  # noqa: S104
    """Serve the run directory's progress while the block runs; yields the port.

    `port` None serves nothing, 0 takes any free one. Raises SpecError for one that is taken.
    """
    if port is None:
        yield 0
        return
    handler = type("Handler", (_Handler,), {"run_folder": run, "run_name": name})
    try:
        server = http.server.ThreadingHTTPServer((host, port), handler)
    except OSError as error:
        what = f"port {port} cannot be used ({error.strerror})"
        raise SpecError.at("RUN-141", "--port", what, "name another port") from None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    run_folder: Path
    run_name: str

    def do_GET(self) -> None:
        """Answer one of the three paths."""
        now = outcome.progress(self.run_folder)
        match self.path.partition("?")[0]:
            case "/progress":
                self._send(json.dumps(now or {}), "application/json")
            case "/metrics":
                self._send(metrics(now or {}), "text/plain; version=0.0.4")
            case "/":
                shown = report.page(self.run_folder, name=self.run_name, reload=True)
                self._send(shown, "text/html; charset=utf-8")
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


def metrics(now: dict[str, Any]) -> str:
    """One progress record in Prometheus' text format."""
    lines = []
    for name, meaning in GAUGES.items():
        if isinstance(value := now.get(name), int | float):
            lines += [
                f"# HELP tuning_{name} {meaning}",
                f"# TYPE tuning_{name} gauge",
                f"tuning_{name} {value}",
            ]
    return "\n".join([*lines, ""])
