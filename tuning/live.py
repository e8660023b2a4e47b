"""A run's progress over HTTP while it lasts: `GET /progress`, `/metrics`, `/`.

Read-only and small: what `metrics.jsonl` says, as JSON, for Prometheus, and as a page that reloads
itself. On in a Job (the operator polls it), off locally unless asked for.
"""

from __future__ import annotations

import html
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuning import card, result
from tuning.errors import SpecError

GAUGES = {
    "step": "optimizer steps done",
    "steps": "optimizer steps planned",
    "loss": "training loss of the last logged step",
    "tokens_per_second": "real tokens trained a second",
    "eta_seconds": "seconds until the last step",
    "memory_bytes": "peak memory of the training process",
}
EVERY_5_SECONDS = '<meta http-equiv="refresh" content="5">'
PAGE = """<!doctype html><meta charset="utf-8">{reload}
<title>{name}</title><body style="font: 16px/1.5 system-ui; max-width: 46em; margin: 2em auto">
<h1>{name}</h1><p>{state}</p><p style="font-size: 2em; letter-spacing: -1px">{curve}</p>
<table>{rows}</table>
"""


@contextmanager
def served(run: Path, *, name: str, port: int | None, host: str = "0.0.0.0") -> Iterator[int]:  # noqa: S104
    """Serve the run directory's progress for as long as the block runs; gives the port.

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
        raise SpecError.at("RUN-140", "--port", what, "name another port") from None
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
        now = result.progress(self.run_folder)
        match self.path.partition("?")[0]:
            case "/progress":
                self._send(json.dumps(now or {}), "application/json")
            case "/metrics":
                self._send(metrics(now or {}), "text/plain; version=0.0.4")
            case "/":
                self._send(page(self.run_folder, self.run_name, now), "text/html; charset=utf-8")
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
        """Nothing: a poll every few seconds is no news."""


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


def report(run: Path, *, name: str) -> str:
    """The page of a finished run, to keep as `report.html`: one file, nothing loaded."""
    return page(run, name, result.progress(run), reload="")


def page(run: Path, name: str, now: dict[str, Any] | None, *, reload: str = EVERY_5_SECONDS) -> str:
    """A page for a person: how far, how fast, and the loss so far."""
    losses = [record["loss"] for record in _records(run) if isinstance(record.get("loss"), float)]
    state = f"step {now['step']:,} of {now['steps']:,}" if now else "not training yet"
    rows = "".join(
        f"<tr><td>{html.escape(meaning)}</td><td>{html.escape(f'{now[key]:,.4g}')}</td></tr>"
        for key, meaning in GAUGES.items()
        if now and isinstance(now.get(key), int | float)
    )
    return PAGE.format(
        reload=reload, name=html.escape(name), state=state, curve=card.curve(losses), rows=rows
    )


def _records(run: Path) -> list[dict[str, Any]]:
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]
