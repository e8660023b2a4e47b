"""A Hugging Face hub on loopback, as far as huggingface_hub asks it for models and datasets.

    with FakeHub() as hub:
        commit = hub.add("org/model", {"config.json": b"...", "model.safetensors": b"..."})
        hub.add("datasets/org/name", {"README.md": b"...", "data/train.jsonl": b"..."})
        os.environ["HF_ENDPOINT"] = hub.url

Speaks model info, tree, resolve (commit and ETag headers, git LFS files through a redirect to
`/cdn/`), Range, gated and private repositories, and commits (with git LFS; no Xet, so set
HF_HUB_DISABLE_XET). `hub.requests` lists what was asked, in order.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

LFS_ENDINGS = (".safetensors", ".bin", ".model", ".parquet", ".arrow")


@dataclass
class Repository:
    """One model or dataset at one commit."""

    hub_id: str
    files: dict[str, bytes]
    commit: str
    gated: bool = False
    private: bool = False
    licence: str | None = None
    card: dict[str, Any] = field(default_factory=dict)  # further metadata of the model card
    branch: str = "main"
    history: list[str] = field(default_factory=list)  # messages of its commits


@dataclass
class FakeHub:
    """The server; a context manager."""

    token: str = "hf_good"  # may read everything
    outsider: str = "hf_outsider"  # valid, but on no list; may write nothing
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # verb, path, token
    # Called for each request with its path and how often it came; a number answers it.
    broken: Callable[[str, int], int | None] = lambda path, count: None
    stored: dict[str, bytes] = field(default_factory=dict)  # git LFS objects, before a commit
    loses: bytes = b""  # appended to each LFS object that comes
    sent: int = 0  # bytes of files that were asked for
    cut_at: int | None = None  # each file on the CDN breaks off here the first time

    def __post_init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        self.cdn_url = f"http://localhost:{port}"  # another host, as in the world

    def __enter__(self) -> Self:
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def add(self, hub_id: str, files: dict[str, bytes] | Path, **options: Any) -> str:
        """A model (or datasets/ORG/NAME) with `files`, or those of a folder; its commit."""
        if isinstance(files, Path):
            paths = [path for path in files.rglob("*") if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        whole = hashlib.sha1()
        for name, data in sorted(files.items()):
            whole.update(name.encode() + b"\0" + data)
        commit = whole.hexdigest()
        self.repositories[hub_id] = Repository(hub_id, files, commit, **options)
        return commit

    def downloads(self) -> list[str]:
        """The files whose bytes were asked for."""
        return [path for verb, path, _ in self.requests if verb == "GET" and "/api/" not in path]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                _Exchange(hub, self).answer()

            do_HEAD = do_POST = do_PUT = do_GET

            def log_message(self, *_: object) -> None:
                pass

        return Handler


class _Exchange:
    """One request and its answer."""

    def __init__(self, hub: FakeHub, handler: BaseHTTPRequestHandler) -> None:
        self.hub, self.handler = hub, handler
        self.path = unquote(urlsplit(handler.path).path)
        self.body = handler.rfile.read(int(handler.headers.get("content-length") or 0))
        if "chunked" in (handler.headers.get("transfer-encoding") or ""):
            self.body = _chunked(handler.rfile)
        self.token = (handler.headers.get("authorization") or "").removeprefix("Bearer ") or None
        with hub._lock:
            hub.requests.append((handler.command, self.path, self.token))
            key = f"{handler.command} {self.path}"
            self.count = hub._counts[key] = hub._counts.get(key, 0) + 1

    def answer(self) -> None:
        if status := self.hub.broken(self.path, self.count):
            self.send(status, b"broken on purpose")
        elif self.path == "/api/whoami-v2":
            role = {self.hub.token: "write", self.hub.outsider: "read"}.get(self.token or "")
            if role is None:
                self.send(401)
            else:
                self.json({"name": "someone", "auth": {"accessToken": {"role": role}}})
        elif self.handler.command in ("POST", "PUT"):
            self.write()
        elif match := re.fullmatch(r"/cdn/([0-9a-f]{64})", self.path):
            self.cdn(match[1])
        elif match := re.fullmatch(
            r"/api/(?:models/|(datasets/))([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", self.path
        ):
            self.api((match[1] or "") + match[2], match[3], match[4])
        elif match := re.fullmatch(
            r"/((?:datasets/)?[^/]+/[^/]+)/resolve/(refs/\w+/\w+|[^/]+)/(.+)", self.path
        ):
            self.resolve(match[1], match[2], match[3])
        else:
            self.send(404)

    def repository(self, hub_id: str, revision: str | None) -> Repository | None:
        """The repository, or None after the refusal was sent."""
        found = self.hub.repositories.get(hub_id)
        if self.token not in (None, self.hub.token, self.hub.outsider):
            message = "Invalid credentials in Authorization header"
            self.send(401, X_Error_Message=message)
        elif found is None or (found.private and self.token != self.hub.token):
            self.send(404 if self.token else 401, X_Error_Code="RepoNotFound")
        elif revision not in (None, found.branch, found.commit):
            self.send(404, X_Error_Code="RevisionNotFound")
        else:
            return found
        return None

    def api(self, hub_id: str, what: str | None, revision: str | None) -> None:
        found = self.repository(hub_id, revision)
        if found is None:
            return
        if what == "tree":
            self.json([{"type": "file", "path": n} | d for n, d in self.listing(found).items()])
            return
        self.json(
            {
                "id": hub_id.removeprefix("datasets/"),
                "sha": found.commit,
                "private": found.private,
                "gated": "manual" if found.gated else False,
                "cardData": found.card | ({"license": found.licence} if found.licence else {}),
                "tags": [],
                "siblings": [
                    {"rfilename": n, "size": d["size"], "blobId": d["oid"], "lfs": d.get("lfs")}
                    for n, d in self.listing(found).items()
                ],
            }
        )

    def write(self) -> None:
        """A request that changes something; the outsider may not."""
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})", self.path):  # signed: no token
            self.hub.stored[match[1]] = self.body + self.hub.loses
            self.send(200)
        elif self.token != self.hub.token:
            self.send(403 if self.token else 401)
        elif self.path == "/api/validate-yaml":
            self.json({"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            asked = json.loads(self.body)
            hub_id = f"{asked['organization']}/{asked['name']}"
            if hub_id in self.hub.repositories:
                self.send(409, json.dumps({"error": "exists"}).encode())
                return
            private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.add(hub_id, {".gitattributes": b"*.safetensors lfs"}, private=private)
            self.json({"url": f"{self.hub.url}/{hub_id}"})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.path):
            objects = json.loads(self.body)["objects"]
            upload = {"upload": {"href": f"{self.hub.url}/lfs/OID"}}
            text = json.dumps([each | {"actions": upload} for each in objects])
            for each in objects:
                text = text.replace("OID", each["oid"], 1)
            self.json({"objects": json.loads(text)})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/(.+)", self.path):
            found = self.hub.repositories.get(match[1])
            if found is None:
                self.send(404, X_Error_Code="RepoNotFound")
            elif match[2] == "branch":
                found.branch = match[3]
                self.json({})
            elif match[2] == "preupload":
                self.json(
                    {"files": [self.upload_mode(each) for each in json.loads(self.body)["files"]]}
                )
            else:
                self.commit(found)
        else:
            self.send(404)

    def upload_mode(self, asked: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if asked["path"].endswith(LFS_ENDINGS) else "regular"
        return {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False}

    def commit(self, found: Repository) -> None:
        """Apply the operations of a commit, all or none."""
        changed = dict(found.files)
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header":
                    if value.get("parentCommit") not in (None, found.commit):
                        self.send(412, b'{"error": "the branch has moved"}')
                        return
                    message = value["summary"]
                case "file":
                    changed[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    changed[value["path"]] = self.hub.stored[value["oid"]]
                case "deletedFile":
                    del changed[value["path"]]
        options = {"private": found.private, "branch": found.branch}
        commit = self.hub.add(found.hub_id, changed, history=[*found.history, message], **options)
        page = f"{self.hub.url}/{found.hub_id}/commit/{commit}"
        self.json({"commitOid": commit, "commitUrl": page})

    def listing(self, found: Repository) -> dict[str, dict[str, Any]]:
        listed: dict[str, dict[str, Any]] = {}
        for name, data in found.files.items():
            listed[name] = {"size": len(data), "oid": _git_id(data)}
            if name.endswith(LFS_ENDINGS):
                sha256 = hashlib.sha256(data).hexdigest()
                listed[name]["lfs"] = {
                    "sha256": sha256, "oid": sha256, "size": len(data), "pointerSize": 130,
                }  # fmt: skip
        return listed

    def resolve(self, hub_id: str, revision: str, name: str) -> None:
        found = self.repository(hub_id, revision)
        if found is None:
            return
        if found.gated and self.token != self.hub.token:
            kind = "dataset" if hub_id.startswith("datasets/") else "model"
            message = f"Access to {kind} {hub_id} is restricted."
            self.send(403 if self.token else 401, X_Error_Code="GatedRepo", X_Error_Message=message)
            return
        if name not in found.files:
            self.send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=found.commit)
            return
        data = found.files[name]
        if not name.endswith(LFS_ENDINGS):
            self.file(data, X_Repo_Commit=found.commit, ETag=f'"{_git_id(data)}"')
            return
        sha256 = hashlib.sha256(data).hexdigest()
        self.send(
            302,
            Location=f"{self.hub.cdn_url}/cdn/{sha256}?Signature=s3cr3t-canary",
            X_Repo_Commit=found.commit,
            X_Linked_ETag=f'"{sha256}"',
            X_Linked_Size=len(data),
        )

    def cdn(self, sha256: str) -> None:
        for found in self.hub.repositories.values():
            for data in found.files.values():
                if hashlib.sha256(data).hexdigest() == sha256:
                    self.file(data, cut_at=self.hub.cut_at if self.count == 1 else None)
                    return
        self.send(404)

    def file(self, data: bytes, cut_at: int | None = None, **headers: Any) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.handler.headers.get("range") or "")
        start = int(match[1]) if match else 0
        end = min(len(data), int(match[2]) + 1) if match and match[2] else len(data)
        if match:
            headers["Content_Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        headers["Accept_Ranges"] = "bytes"
        self.hub.sent += end - start
        self.send(206 if match else 200, data[start:end], cut_at=cut_at, **headers)

    def json(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode(), Content_Type="application/json")

    def send(
        self, status: int, body: bytes = b"", *, cut_at: int | None = None, **headers: Any
    ) -> None:
        self.handler.send_response(status)
        for name, value in headers.items():
            self.handler.send_header(name.replace("_", "-"), str(value))
        self.handler.send_header("Content-Length", str(len(body)))
        self.handler.end_headers()
        if self.handler.command != "HEAD":
            self.handler.wfile.write(body[:cut_at])
            if cut_at is not None and cut_at < len(body):
                self.handler.close_connection = True


def _chunked(stream: Any) -> bytes:
    """A body in chunks."""
    whole = b""
    while size := int(stream.readline(), 16):
        whole += stream.read(size)
        stream.readline()
    stream.readline()
    return whole


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def tensors(
    named: dict[str, tuple[str, list[int], bytes]], *, size: int | None = None, text: bytes = b""
) -> bytes:
    """A safetensors file; `size` and `text` lie about the header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (kind, shape, data) in named.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = text or json.dumps(header).encode()
    body = b"".join(data for _, _, data in named.values())
    return struct.pack("<Q", len(text) if size is None else size) + text + body


WEIGHTS = tensors({"a": ("BF16", [2, 3], bytes(12)), "b": ("F32", [4], bytes(range(16)))})
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
MODEL = {
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "model.safetensors": WEIGHTS,
}
CLUTTER = {
    "README.md": b"# Model",
    "pytorch_model.bin": b"pickle" * 1000,
    "consolidated.safetensors": WEIGHTS,
    "original/model.safetensors": WEIGHTS,
    "modeling_custom.py": b"raise SystemExit",
    "model.gguf": b"GGUF",
}
FIRST = tensors({"a": ("BF16", [2, 3], bytes(12))})
SECOND = tensors({"b": ("F32", [4], bytes(16))})
INDEX = {
    "metadata": {"total_size": 28},
    "weight_map": {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
    },
}
SHARDED = {
    **{name: data for name, data in MODEL.items() if name != "model.safetensors"},
    "model-00001-of-00002.safetensors": FIRST,
    "model-00002-of-00002.safetensors": SECOND,
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
}
