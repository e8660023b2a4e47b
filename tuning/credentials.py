"""Docker configs -> a login for one registry.

Every valid form of a `dockerconfigjson` (and of docker's own config.json): `auths` entries with
`auth`, with `username` and `password`, or with `identitytoken`, under a bare host, a host with port
or path, a URL, or one of Docker Hub's old names. The most specific entry wins. Messages name the
file and the key, never a value.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuning.errors import Problem, SpecError

LARGEST = 1 << 20  # bytes; a Secret cannot hold more
SECRET_KEYS = (".dockerconfigjson", "config.json", ".dockercfg")
DOCKER_HUB = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})


@dataclass(frozen=True)
class Login:
    """How to say who we are: a user and a password, or an identity token. Never shown."""

    origin: str  # the file and key it comes from
    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)

    @property
    def basic(self) -> str:
        """The value of a Basic Authorization header."""
        pair = f"{self.username}:{self.password}".encode()
        return "Basic " + base64.b64encode(pair).decode()


def login(
    registry: str, *, secret: Path | None = None, repository: str = "", docker: Path | None = None
) -> Login | None:
    """The login for `registry` (host, or host:port), or None where there is none.

    `secret` is a dockerconfigjson file, or the folder where a Secret of that type is mounted; then
    an entry for the registry must be in it. Otherwise docker's own configuration is asked: the
    folder `docker`, DOCKER_CONFIG or ~/.docker. Raises SpecError for an unusable file.
    """
    if secret is not None:
        path = _file_of(secret)
        found = _find(_auths(path), registry, repository, path)
        if found is None:
            hosts = ", ".join(sorted(map(_host, _auths(path)))) or "nothing"
            raise _refusal(
                path, f"has no entry for {registry}, only for {hosts}", f"add {registry} to auths"
            )
        return found
    folder = docker or Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker")
    path = folder / "config.json"
    return _find(_auths(path), registry, repository, path) if path.is_file() else None


def _file_of(secret: Path) -> Path:
    if secret.is_dir():
        for name in SECRET_KEYS:
            if (secret / name).is_file():
                return secret / name
        change = "use a Secret of type kubernetes.io/dockerconfigjson"
        raise _refusal(secret, f"holds no key {SECRET_KEYS[0]}", change)
    if not secret.exists():
        raise _refusal(secret, "there is no such file", "name a dockerconfigjson file")
    return secret


def _auths(path: Path) -> dict[str, Any]:
    """The `auths` mapping of a docker config, or the whole of the older .dockercfg form."""
    try:
        size = path.stat().st_size
        text = path.read_text(encoding="utf-8") if size <= LARGEST else None
    except (OSError, UnicodeDecodeError) as error:
        what = f"cannot be read ({type(error).__name__})"
        raise _refusal(path, what, "name a dockerconfigjson file") from None
    if text is None:
        raise _refusal(path, f"has {size:,} bytes", f"keep it under {LARGEST:,}")
    if not text.strip():
        raise _refusal(path, "is empty", 'write {"auths": {"HOST": {"auth": "..."}}} into it')
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        hint = "; it looks like base64: decode it first" if _is_base64(text) else ""
        raise _refusal(path, f"is no JSON{hint}", "write a docker config into it") from None
    if not isinstance(config, dict):
        raise _refusal(path, "is no JSON object", "write a docker config into it")
    auths = config.get("auths", config if path.name == ".dockercfg" else {})
    if not isinstance(auths, dict):
        raise _refusal(path, "auths is no object", 'write {"auths": {"HOST": {...}}}')
    return auths


def _find(auths: dict[str, Any], registry: str, repository: str, path: Path) -> Login | None:
    """The entry whose key matches the longest part of registry/repository."""
    wanted = _host(registry)
    best: tuple[int, str] | None = None
    for key in auths:
        host, _, scope = _bare(key).partition("/")
        if scope in ("v1", "v2"):
            scope = ""
        fits = _host(host) == wanted and (not scope or f"{repository}/".startswith(f"{scope}/"))
        if fits and (best is None or len(scope) > best[0]):
            best = len(scope), key
    return _read(auths[best[1]], f"{path}: auths[{_bare(best[1])}]") if best else None


def _read(entry: Any, origin: str) -> Login | None:
    if not isinstance(entry, dict):
        raise _refusal(origin, "is no object", 'write {"auth": base64 of user:password}')
    for key in ("auth", "username", "password", "identitytoken"):
        if not isinstance(entry.get(key, ""), str):
            raise _refusal(f"{origin}.{key}", "is no text", "write it in quotes")
    username, password = entry.get("username", ""), entry.get("password", "")
    if token := entry.get("identitytoken"):
        return Login(origin, username or "<token>", identity_token=token)
    if packed := entry.get("auth"):
        try:
            pair = base64.b64decode(packed.strip(), validate=True).decode()
        except (binascii.Error, UnicodeDecodeError, ValueError):
            raise _refusal(
                f"{origin}.auth", "is no base64 of text", "write base64 of user:password"
            ) from None
        username, colon, password = pair.strip("\0\r\n").partition(":")
        if not colon:
            raise _refusal(f"{origin}.auth", "has no colon", "write base64 of user:password")
    if not username and not password:
        if not entry:
            return None  # docker writes {} where a credential helper has the login
        raise _refusal(origin, "has neither user nor password", "fill in auth, or both")
    if not username or not password:
        missing = "password" if username else "username"
        raise _refusal(origin, f"has no {missing}", f"add the {missing}")
    return Login(origin, username, password)


def _bare(key: str) -> str:
    return key.strip().removeprefix("https://").removeprefix("http://").rstrip("/")


def _host(key: str) -> str:
    host = _bare(key).partition("/")[0].lower().removesuffix(":443")
    return "docker.io" if host in DOCKER_HUB else host


def _is_base64(text: str) -> bool:
    try:
        return base64.b64decode(text, validate=False)[:1] == b"{"
    except (binascii.Error, ValueError):
        return False


def _refusal(where: Path | str, what: str, change: str) -> SpecError:
    return SpecError([Problem("REG-110", str(where), what, change)])
