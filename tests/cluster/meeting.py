"""Stands in for the engine in a Job of several pods: it does what the operator relies on.

Run in each pod with the operator's own arguments. Index 0 takes a step whenever all others are
connected, keeps the number in the run directory, and tells the others when the work is done; they
connect to --meet until they hear that. Standard library only.
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

STEPS, PAUSE = 30, 0.2


def argument(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


class Progress(http.server.BaseHTTPRequestHandler):
    """GET /progress; another pod than index 0 would say what is not so."""

    step = 0

    def do_GET(self) -> None:
        body = json.dumps({"step": self.step, "steps": STEPS}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def lead(nodes: int, port: int) -> None:
    folder = Path(argument("--run-dir"))
    log = folder / "steps"
    Progress.step = len(log.read_text().splitlines()) if log.exists() else 0
    with socket.create_server(("", port)) as door:
        peers: dict[bytes, socket.socket] = {}
        door.settimeout(PAUSE)
        while Progress.step < STEPS:
            while len(peers) < nodes - 1:
                try:
                    peer, _ = door.accept()
                    peers[peer.recv(16)] = peer
                except OSError:
                    pass
            try:
                for peer in peers.values():
                    peer.sendall(b"step\n")
                    assert peer.recv(16)
            except (OSError, AssertionError):
                peers = {}  # as collective communication does: all begin anew
                continue
            Progress.step += 1
            with log.open("a") as file:
                file.write(f"{Progress.step} {socket.gethostname()}\n")
            time.sleep(PAUSE)
        for peer in peers.values():
            peer.sendall(b"done\n")
    message = {"digest": "sha256:" + "ab" * 32, "phase": "finish", "step": STEPS, "steps": STEPS}
    Path("/dev/termination-log").write_text(json.dumps(message))


def follow(index: int, host: str, port: int) -> None:
    Progress.step = 1000
    while True:
        try:
            with socket.create_connection((host, port), timeout=5) as peer:
                peer.sendall(str(index).encode())
                for line in peer.makefile():
                    if line == "done\n":
                        return
                    peer.sendall(b"ok")
        except OSError as error:
            print(f"{host}:{port}: {error}", flush=True)
        time.sleep(PAUSE)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))  # nobody else does it for process 1
    host, _, port = argument("--meet").rpartition(":")
    server = http.server.ThreadingHTTPServer(("", int(argument("--port"))), Progress)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    index = int(os.environ["JOB_COMPLETION_INDEX"])
    if index:
        follow(index, host, int(port))
    else:
        lead(int(argument("--nodes")), int(port))


if __name__ == "__main__":
    main()
