"""A real docker-registry on a free loopback port, and a token server in front of one.

    with Registry(tmp_path, users={"me": "secret"}) as registry:
        ... registry.host ...                       # 127.0.0.1:40123

What the tests need from the system is checked here: nothing is skipped in silence.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import shutil
import signal
import ssl
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from faults.proxy import Proxy, Reply, Turn

PACKAGES = {
    "docker-registry": "docker-registry",
    "htpasswd": "apache2-utils",
    "skopeo": "skopeo",
    "openssl": "openssl",
    "tar": "tar",
}


def tool(name: str) -> str:
    """The path of a program that the tests need."""
    path = shutil.which(name)
    if path is None:
        raise RuntimeError(f"{name} is missing: sudo apt-get install {PACKAGES[name]}")
    return path


class Registry:
    """Debian's docker-registry with its own folder; `users` by htpasswd, `tls` as a Certificate."""

    def __init__(
        self,
        folder: Path,
        *,
        users: Mapping[str, str] | None = None,
        tls: Certificate | None = None,
    ) -> None:
        self.folder = folder / f"registry-{secrets.token_hex(4)}"
        self.folder.mkdir(parents=True)
        self.log = self.folder / "log"
        self._tls, self.port = tls, 0
        self._process: subprocess.Popen[bytes] | None = None
        if users:
            lines = [_htpasswd(name, password) for name, password in users.items()]
            (self.folder / "htpasswd").write_text("".join(lines))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    def start(self) -> None:
        """Start, or start again on the same port and data."""
        config = self.folder / "config.json"  # JSON is YAML
        config.write_text(json.dumps(self._config()))
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [tool("docker-registry"), "serve", str(config)],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={"PATH": "/usr/bin:/bin"},
            )
        deadline = time.monotonic() + 30
        while not (found := re.search(r"listening on 127\.0\.0\.1:(\d+)", self.log.read_text())):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"docker-registry did not start: {self.log.read_text()[-2000:]}")
            time.sleep(0.01)
        self.port = int(found[1])

    def kill(self) -> None:
        """SIGKILL: nothing is tidied up."""
        if self._process:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def blobs(self) -> set[str]:
        """Digests of all blobs that are stored."""
        root = self.folder / "data" / "docker" / "registry" / "v2" / "blobs" / "sha256"
        return {f"sha256:{path.parent.name}" for path in root.glob("*/*/data")}

    def _config(self) -> dict[str, Any]:
        web: dict[str, Any] = {"addr": f"127.0.0.1:{self.port}", "secret": "fixed for restarts"}
        if self._tls:
            web["tls"] = {"certificate": str(self._tls.chain), "key": str(self._tls.key)}
        config: dict[str, Any] = {
            "version": "0.1",
            "log": {"level": "info", "accesslog": {"disabled": True}},
            "storage": {
                "filesystem": {"rootdirectory": str(self.folder / "data")},
                "delete": {"enabled": True},
                "maintenance": {"uploadpurging": {"enabled": False}},
            },
            "http": web,
        }
        if (self.folder / "htpasswd").exists():
            config["auth"] = {"htpasswd": {"realm": "test", "path": str(self.folder / "htpasswd")}}
        return config


def _htpasswd(name: str, password: str) -> str:
    command = [tool("htpasswd"), "-inB", "-C", "4", name]
    done = subprocess.run(command, input=password, capture_output=True, text=True, check=True)
    return done.stdout.strip() + "\n"


class Certificate:
    """A certificate for `host`, signed by a CA of its own; made by openssl."""

    def __init__(self, folder: Path, *, host: str = "IP:127.0.0.1", days: int = 2) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.ca, self.chain, self.key = folder / "ca.pem", folder / "cert.pem", folder / "key.pem"
        ca_key, request = folder / "ca-key.pem", folder / "request.pem"
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc"]
        _openssl("req", "-x509", *curve, "-subj", "/CN=Test CA", "-days", "2",
                 "-keyout", ca_key, "-out", self.ca)  # fmt: skip
        _openssl("req", *curve, "-subj", "/CN=registry", "-keyout", self.key, "-out", request)
        extensions = folder / "extensions"
        extensions.write_text(f"subjectAltName={host}\n")
        _openssl("x509", "-req", "-in", request, "-CA", self.ca, "-CAkey", ca_key,
                 "-CAcreateserial", "-days", days, "-extfile", extensions,
                 "-out", self.chain)  # fmt: skip

    def context(self) -> ssl.SSLContext:
        """For a server that shows this certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.chain, self.key)
        return context


def _openssl(*arguments: str | int | Path) -> None:
    command = [tool("openssl"), *map(str, arguments)]
    subprocess.run(command, capture_output=True, check=True)


class TokenFront(Proxy):
    """Bearer authentication in front of a registry without any.

    As hosted registries do it: GET wants pull, anything else wants push, and a token for less than
    that gets 401 (or `too_little`). `uses` is how many requests a token lives.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        user: str = "me",
        password: str = "secret",
        uses: int | None = None,
        too_little: int = 401,
        expires_in: int | None = None,
    ) -> None:
        super().__init__(registry.address)
        self.user, self.password, self.identity_token = user, password, "identity"
        self.too_little, self.uses, self.expires_in = too_little, uses, expires_in
        self.tokens: dict[str, tuple[set[str], int]] = {}  # scopes, requests made
        self.token_status = 200
        self.realm = ""

    def pass_on(self, turn: Turn) -> None:
        """Ask for a token, give one, or let the request through."""
        path = urlsplit(turn.seen.path)
        if path.path == "/token":
            return turn.answer(self._token(turn, path.query))
        repository = re.match(r"/v2/(.+?)/(?:blobs|manifests|tags)/", path.path)
        action = "pull" if turn.seen.method in ("GET", "HEAD") else "push"
        wanted = f"repository:{repository[1]}:{action}" if repository else ""
        scopes, made = self.tokens.get(self._bearer(turn), (None, 0))
        if scopes is None or (self.uses is not None and made >= self.uses):
            return self._challenge(turn, 401, wanted)
        if wanted and wanted not in scopes:
            return self._challenge(turn, self.too_little, wanted)
        self.tokens[self._bearer(turn)] = scopes, made + 1
        return super().pass_on(turn)

    def _bearer(self, turn: Turn) -> str:
        return turn.seen.headers.get("authorization", "").removeprefix("Bearer ")

    def _challenge(self, turn: Turn, code: int, wanted: str) -> None:
        realm = self.realm or f"http://{self.host}/token"
        scope = f',scope="{wanted}"' if wanted else ""
        challenge = f'Bearer realm="{realm}",service="registry, test"{scope}'
        _ = turn.body
        turn.answer(Reply(code, [("WWW-Authenticate", challenge)], b'{"errors":[]}'))

    def _token(self, turn: Turn, query: str) -> Reply:
        if self.token_status != 200:
            return Reply(self.token_status)
        asked = parse_qs(turn.body.decode() if turn.seen.method == "POST" else query)
        basic = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        given = turn.seen.headers.get("authorization")
        if turn.seen.method == "POST":
            known = asked.get("refresh_token") == [self.identity_token]
        else:
            known = given == f"Basic {basic}"
        if not known and given:
            return Reply(401)
        scopes = set()
        for scope in " ".join(asked.get("scope", [])).split():
            kind, name, actions = scope.split(":")
            allowed = [a for a in actions.split(",") if known or a == "pull"]
            scopes |= {f"{kind}:{name}:{action}" for action in allowed}
        token = secrets.token_urlsafe(16)
        self.tokens[token] = scopes, 0
        answer: dict[str, Any] = {"access_token" if turn.seen.method == "POST" else "token": token}
        if self.expires_in is not None:
            answer["expires_in"] = self.expires_in
        return Reply(200, [("Content-Type", "application/json")], json.dumps(answer).encode())


class ReferrersFront(Proxy):
    """The referrers API in front of a registry that has none: what each manifest's subject says."""

    def __init__(self, registry: Registry) -> None:
        super().__init__(registry.address)
        self.listed: dict[str, dict[str, dict[str, Any]]] = {}  # subject -> digest -> descriptor

    def pass_on(self, turn: Turn) -> None:
        """Answer for the referrers, and take note of manifests that name a subject."""
        if asked := re.search(r"/referrers/(sha256:[0-9a-f]{64})$", turn.seen.path):
            entries = list(self.listed.get(asked[1], {}).values())
            kind = "application/vnd.oci.image.index.v1+json"
            index = {"schemaVersion": 2, "mediaType": kind, "manifests": entries}
            return turn.answer(Reply(200, [("Content-Type", kind)], json.dumps(index).encode()))
        reply = turn.forward()
        if turn.seen.method == "PUT" and "/manifests/" in turn.seen.path and reply.status == 201:
            record = json.loads(turn.body)
            if subject := record.get("subject"):
                digest = f"sha256:{hashlib.sha256(turn.body).hexdigest()}"
                entry = {"mediaType": record["mediaType"], "digest": digest}
                entry |= {"size": len(turn.body), "artifactType": record.get("artifactType", "")}
                entry["annotations"] = record.get("annotations", {})
                self.listed.setdefault(subject["digest"], {})[digest] = entry
                reply.headers.append(("OCI-Subject", subject["digest"]))
        return turn.answer(reply)


class Signer:
    """A key pair, and signatures as `cosign sign --key` leaves them; made by openssl."""

    def __init__(self, folder: Path, *, kind: str = "ec") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.key, self.public = folder / "cosign.key", folder / "cosign.pub"
        self.folder, self.kind = folder, kind
        options = {
            "ec": ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"],
            "rsa": ["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"],
            "ed25519": ["-algorithm", "ED25519"],
        }
        _openssl("genpkey", *options[kind], "-out", self.key)
        _openssl("pkey", "-in", self.key, "-pubout", "-out", self.public)

    def sign(self, data: bytes) -> bytes:
        source, target = self.folder / "data", self.folder / "signature"
        source.write_bytes(data)
        if self.kind == "ed25519":
            _openssl(
                "pkeyutl", "-sign", "-rawin", "-inkey", self.key, "-in", source, "-out", target
            )
        else:
            _openssl("dgst", "-sha256", "-sign", self.key, "-out", target, source)
        return target.read_bytes()

    def simple(self, digest: str, **changes: Any) -> tuple[bytes, str]:
        """A "simple signing" document for an image, and its signature in base64."""
        critical = {
            "identity": {"docker-reference": "registry.example.com/team/adapter"},
            "image": {"docker-manifest-digest": digest},
            "type": "cosign container image signature",
        }
        payload = json.dumps({"critical": critical | changes, "optional": None}).encode()
        return payload, base64.b64encode(self.sign(payload)).decode()

    def bundle(self, digest: str, **changes: Any) -> bytes:
        """A Sigstore bundle around a statement that signs an image."""
        kind = "application/vnd.in-toto+json"
        statement = {
            "_type": "https://in-toto.io/Statement/v1",
            "subject": [{"digest": {"sha256": digest.removeprefix("sha256:")}}],
            "predicateType": "https://sigstore.dev/cosign/sign/v1",
            "predicate": {},
        }
        payload = json.dumps(statement | changes).encode()
        signature = self.sign(
            b"DSSEv1 %d %b %d %b" % (len(kind), kind.encode(), len(payload), payload)
        )
        envelope = {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": kind,
            "signatures": [{"sig": base64.b64encode(signature).decode()}],
        }
        bundle = {
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": {"publicKey": {"hint": "x"}, "tlogEntries": []},
            "dsseEnvelope": envelope,
        }
        return json.dumps(bundle).encode()
