"""The operator's /healthz, /readyz, /metrics, and its log in JSON lines."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tuning.errors import REASONS, SpecError, redact

if TYPE_CHECKING:  # they load the client of Kubernetes, which `render` does not need
    from jobs.controller.reconcile import Result
    from jobs.controller.watch import Key
    from jobs.observed.nodes import Nodes

RESULTS = ("done", "not leading", "conflict", "api error", "error")  # of a reconcile
_SECONDS = (0.005, 0.02, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300)  # that a Workspace waits


class Metrics:
    """The operator's metrics, in a registry of their own: a process may run two operators."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.reconciles = Counter(
            "tuning_operator_reconciles", "Reconciles by result", ["result"], registry=self.registry
        )
        for result in RESULTS:  # so that the first error is an increase, too
            self.reconciles.labels(result)
        self.seconds = Histogram(
            "tuning_operator_reconcile_seconds", "Time of a reconcile", registry=self.registry
        )
        self.queued = Gauge(
            "tuning_operator_queue_length", "Workspaces to reconcile", registry=self.registry
        )
        self.waited = Histogram(
            "tuning_operator_queue_seconds",
            "Time from when a Workspace is due until a worker takes it",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._states: dict[Key, str] = {}
        self._nodes: dict[Key, Nodes] = {}
        self._lock = threading.Lock()
        self.workspaces = Gauge(
            "tuning_operator_workspaces", "Workspaces by state", ["state"], registry=self.registry
        )
        self.failures = Counter(
            "tuning_operator_workspace_failures",
            "Workspaces that failed, by the reason in their status",
            ["reason"],
            registry=self.registry,
        )
        self.nodes = Gauge(
            "tuning_operator_nodes",
            "Provisioned nodes by use: works, waits, or kept (by keep-node)",
            ["namespace", "workspace", "instance_type", "use"],
            registry=self.registry,
        )
        self.node_seconds = Counter(
            "tuning_operator_node_seconds",
            "Time of provisioned nodes since their launch",
            ["instance_type"],
            registry=self.registry,
        )
        self.leading = Gauge(
            "tuning_operator_leading", "1 for the replica that writes", registry=self.registry
        )

    def count(self, key: Key, result: Result) -> None:
        """Count what a reconcile has found."""
        if result.failure:
            self.failures.labels(known_reason(result.failure, result.exit_code)).inc()
        self._count_state(key, result.state)
        self._count_nodes(key, result.nodes)

    def _count_nodes(self, key: Key, nodes: Nodes | None) -> None:
        """The time since the last reconcile of the same nodes; this replica saw no earlier one."""
        with self._lock:
            before = self._nodes.pop(key, None)
            if nodes:
                self._nodes[key] = nodes
                self.node_seconds.labels(nodes.instance_type).inc(
                    nodes.seconds(before.now if before else nodes.now)
                )
            if before and (nodes is None or nodes.use != before.use):
                self.nodes.remove(*key, before.instance_type, before.use)
            if nodes:
                labels = (*key, nodes.instance_type, nodes.use)
                self.nodes.labels(*labels).set(len(nodes.launched))

    def _count_state(self, key: Key, state: str | None) -> None:
        """Count a Workspace under its state; None: it is gone."""
        with self._lock:
            before = self._states.pop(key, None)
            if state:
                self._states[key] = state
        if before != state:
            for each, step in ((before, -1), (state, 1)):
                if each:
                    self.workspaces.labels(each).inc(step)

    def reset(self) -> None:
        """Forget all Workspaces: another replica counts them now."""
        with self._lock:
            self._states.clear()
            self._nodes.clear()
        self.workspaces.clear()
        self.nodes.clear()


def known_reason(reason: str, exit_code: int | None) -> str:
    """`reason`, or that of the exit code: what a pod reports may be any text, and each would be a
    time series of its own."""
    if exit_code is None or reason in ("PodEvicted", *REASONS.values()):
        return reason
    return REASONS.get(exit_code, "Killed")


@contextmanager
def serving(
    port: int, *, healthy: Callable[[], bool], ready: Callable[[], bool], metrics: Metrics
) -> Iterator[int]:
    """Serve on `port` (0: any) until the block ends; yields the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            match self.path:
                case "/healthz":
                    self._answer(healthy())
                case "/readyz":
                    self._answer(ready())
                case "/metrics":
                    self._send(200, generate_latest(metrics.registry))
                case _:
                    self._send(404, b"not found\n")

        def _answer(self, good: bool) -> None:
            self._send(200 if good else 503, b"ok\n" if good else b"not ok\n")

        def _send(self, code: int, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Probes come every few seconds: nothing to log."""

    try:
        server = ThreadingHTTPServer(("", port), Handler)
    except (OSError, OverflowError) as error:
        what = f"port {port} cannot be used ({getattr(error, 'strerror', None) or error})"
        raise SpecError.at("JOB-119", "--port", what, "name another port") from None
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class JsonLines(logging.Formatter):
    """One JSON object per line, with `workspace` and `namespace` if a record has them."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON, with secrets in URLs redacted."""
        fields = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redact(record.getMessage()),
        }
        for name in ("namespace", "workspace"):
            if hasattr(record, name):
                fields[name] = getattr(record, name)
        if record.exc_info:
            fields["exception"] = redact(self.formatException(record.exc_info))
        return json.dumps(fields, ensure_ascii=False)
