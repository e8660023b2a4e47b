"""A small MLflow server: the part of its REST interface that a tracker needs, kept in memory.

    with Mlflow() as server:
        server.curve("loss")     # [(step, value), ...] of the only run, in the order they came
        server.fault = "silent"  # or "refuse", "cut": the request is obeyed, its answer is lost

It answers as MLflow 3 does (errors, the latest metrics of a run); what it was asked is in `asked`.
"""

from __future__ import annotations

import json
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit


class Refused(Exception):
    """An answer with an error code."""


@dataclass
class Run:
    id: str
    experiment: str
    name: str
    tags: dict[str, str]
    status: str = "RUNNING"
    stage: str = "active"
    params: dict[str, str] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)

    def shown(self) -> dict[str, Any]:
        """As runs/get shows it: of each metric the one with the highest step."""
        last: dict[str, Any] = {}
        for each in self.metrics:
            if each["step"] >= last.get(each["key"], each)["step"]:
                last[each["key"]] = each
        info = {"run_id": self.id, "status": self.status, "lifecycle_stage": self.stage}
        tags = [{"key": k, "value": v} for k, v in self.tags.items()]
        return {"info": info, "data": {"metrics": list(last.values()), "tags": tags}}


class Mlflow:
    """The server; a context manager."""

    def __init__(self) -> None:
        self.experiments: dict[str, str] = {}  # name -> id
        self.runs: list[Run] = []
        self.asked: list[tuple[str, dict[str, str]]] = []  # path and headers
        self.fault = ""
        self.faults: list[str] = []  # of the next requests, in order
        self.released = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        poll = {"poll_interval": 0.02}
        threading.Thread(target=self._server.serve_forever, kwargs=poll, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def curve(self, name: str) -> list[tuple[int, float]]:
        (run,) = self.runs
        return [(m["step"], m["value"]) for m in run.metrics if m["key"] == name]

    def _run(self, id: str) -> Run:
        for run in self.runs:
            if run.id == id:
                return run
        raise Refused("RESOURCE_DOES_NOT_EXIST")

    def answer(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request, which is obeyed."""
        match name:
            case "experiments/get-by-name":
                if (found := self.experiments.get(given["experiment_name"])) is None:
                    raise Refused("RESOURCE_DOES_NOT_EXIST")
                return {"experiment": {"experiment_id": found, "lifecycle_stage": "active"}}
            case "experiments/create":
                if given["name"] in self.experiments:
                    raise Refused("RESOURCE_ALREADY_EXISTS")
                self.experiments[given["name"]] = made = str(len(self.experiments) + 1)
                return {"experiment_id": made}
            case "runs/create":
                tags = {tag["key"]: tag["value"] for tag in given["tags"]}
                number = f"{len(self.runs):032x}"
                run = Run(number, given["experiment_id"], given["run_name"], tags)
                self.runs.append(run)
                return {"run": run.shown()}
            case "runs/get":
                return {"run": self._run(given["run_id"]).shown()}
            case "runs/search":
                key, _, value = given["filter"].removeprefix("tags.").partition(" = ")
                found = [
                    run.shown()
                    for run in self.runs
                    if run.tags.get(key.strip("`")) == value.strip("'") and run.stage == "active"
                ]
                return {"runs": found} if found else {}
            case "runs/log-batch":
                run = self._run(given["run_id"])
                if run.stage != "active" or len(given.get("metrics", [])) > 1000:
                    raise Refused("INVALID_PARAMETER_VALUE")
                run.metrics += given.get("metrics", [])
                run.params |= {each["key"]: each["value"] for each in given.get("params", [])}
                run.tags |= {each["key"]: each["value"] for each in given.get("tags", [])}
                return {}
            case "runs/update":
                self._run(given["run_id"]).status = given["status"]
                return {"run_info": {}}
        raise Refused("ENDPOINT_NOT_FOUND")

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._serve(dict(parse_qsl(urlsplit(self.path).query)))

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                self._serve(json.loads(self.rfile.read(length)))

            def _serve(self, given: dict[str, Any]) -> None:
                path = urlsplit(self.path).path
                headers = {name.lower(): value for name, value in self.headers.items()}
                server.asked.append((path, headers))
                fault = server.faults.pop(0) if server.faults else server.fault
                if fault == "silent":
                    server.released.wait(60)
                    return
                if fault == "refuse":
                    return self._send(503, b"<html>Service Unavailable</html>")
                try:
                    body = server.answer(path.removeprefix("/api/2.0/mlflow/"), given)
                except Refused as refused:
                    document = {"error_code": f"{refused}", "message": f"{given}"}
                    return self._send(404, json.dumps(document).encode())
                if fault == "cut":
                    return self.connection.shutdown(socket.SHUT_RDWR)
                self._send(200, json.dumps(body).encode())

            def _send(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        return Handler
