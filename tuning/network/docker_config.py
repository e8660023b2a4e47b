"""Docker configs -> a login for one registry.

Every valid form of a `dockerconfigjson` (and of docker's own config.json): `auths` entries with
`auth`, with `username` and `password`, or with `identitytoken`, under a bare host, a host with port
or path, a URL, a pattern as kubelets know it (`*.azurecr.io`), or one of Docker Hub's old names.
The most specific entry wins. Messages name the file and the key, never a value.

A credential helper is run for docker's own configuration only: a Secret never decides what runs
here.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuning import files
from tuning.errors import Problem, SpecError, printable

LARGEST = 1 << 20  # bytes; a Secret cannot hold more
SECRET_KEYS = (".dockerconfigjson", "config.json", ".dockercfg")
DOCKER_HUB = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})
DOCKER_HUB_KEY = "https://index.docker.io/v1/"
TOKEN_USER = "<token>"  # noqa: S105 (helpers give it as the user of an identity token)
EARLY = 60.0  # seconds before its expiry in which a login counts as expired
HELPER_SECONDS = 60  # some ask a person, some a cloud
LONGEST_WORDS = 300  # characters of what a helper says
_NOT_FOUND = re.compile(r"credentials? not found|no credentials|not (be )?found in", re.I)
_FORM = 'write {"auths": {"HOST": {"auth": base64 of "user:password"}}}'


class HelperFailed(SpecError):
    """A credential helper gave no login; it may be that none is needed."""


@dataclass(frozen=True)
class Login:
    """A user and a password, or an identity token. Never shown."""

    origin: str  # the file and key it comes from
    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    until: float | None = field(default=None, repr=False)  # on the monotonic clock, if it expires

    @property
    def stale(self) -> bool:
        """Whether it has expired, or is about to."""
        return self.until is not None and time.monotonic() >= self.until - EARLY

    @property
    def basic(self) -> str:
        """The value of a Basic Authorization header."""
        pair = f"{self.username}:{self.password}".encode()
        return "Basic " + base64.b64encode(pair).decode()


def login(
    registry: str, *, secret: Path | None = None, repository: str = "", docker: Path | None = None
) -> Login | None:
    """The login for `registry` (host, or host:port), or None where there is none.

    `secret` is a dockerconfigjson file, or the folder where a Secret of that type is mounted; it
    must have an entry for the registry. Numbered folders in it are further Secrets: the first with
    an entry counts, and none needs one. Without `secret` docker's own configuration is read: the
    folder `docker`, DOCKER_CONFIG or ~/.docker. Raises SpecError for an unusable file, HelperFailed
    with the words of a credential helper that failed.
    """
    if secret is None:
        home = os.path.expanduser("~/.docker")  # noqa: PTH111 (Path needs a known user)
        path = Path(docker or os.environ.get("DOCKER_CONFIG") or home) / "config.json"
        return _from_docker(path, registry, repository) if os.path.isfile(path) else None  # noqa: PTH113 (never raises)
    try:
        return _from_secret(secret, registry, repository)
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise _refusal("REG-110", secret, what, "name a dockerconfigjson file") from None


def _from_secret(secret: Path, registry: str, repository: str) -> Login | None:
    if several := _several(secret):
        return _from_any(several, registry, repository)
    path = _file_of(secret)
    auths = _auths(_config(path), path)
    key = _best(auths, registry, repository)
    if key is None:
        hosts = ", ".join(sorted({_host(key) for key in auths})) or "nothing"
        what = f"has no entry for {registry}, only for {hosts[:300]}"
        raise _refusal("REG-112", path, what, f"add {registry} to auths")
    known = _read(auths[key], _origin(path, key))
    if known is None:
        what = "is empty: the login is in a docker credential helper, not in the file"
        raise _refusal(
            "REG-111", _origin(path, key), what, "fill in auth, or username and password"
        )
    return known


def _several(secret: Path) -> list[Path]:
    """Secrets mounted in one folder, in order: its own, if any, then the numbered ones."""
    inside = secret.iterdir() if secret.is_dir() else ()
    numbered = [each for each in inside if each.name.isdecimal() and each.is_dir()]
    if not numbered:
        return []
    own = [secret] if any((secret / key).is_file() for key in SECRET_KEYS) else []
    return own + sorted(numbered, key=lambda each: int(each.name))


def _from_any(folders: list[Path], registry: str, repository: str) -> Login | None:
    for folder in folders:
        path = _file_of(folder)
        auths = _auths(_config(path), path)
        if key := _best(auths, registry, repository):
            return _read(auths[key], _origin(path, key))
    return None


def _from_docker(path: Path, registry: str, repository: str) -> Login | None:
    """The login that docker itself would use: the host's helper, an entry, the common helper."""
    config = _config(path)
    helpers = config.get("credHelpers") or {}
    key = _best(helpers, registry, "") if isinstance(helpers, dict) else None
    if key and helpers[key]:
        return _from_helper(helpers[key], registry, path)
    auths = _auths(config, path, needed=False)
    key = _best(auths, registry, repository)
    known = _read(auths[key], _origin(path, key)) if key else None
    if known is None and config.get("credsStore"):
        known = _from_helper(config["credsStore"], registry, path)
    return known


def _file_of(secret: Path) -> Path:
    if secret.is_dir():
        for name in SECRET_KEYS:
            if (secret / name).is_file():
                return secret / name
        keys = ", ".join(sorted(p.name for p in secret.iterdir() if not p.name.startswith("..")))
        what = f"has no key {SECRET_KEYS[0]}, only {keys[:300] or 'none'}"
        change = "use a Secret of type kubernetes.io/dockerconfigjson"
        raise _refusal("REG-110", secret, what, change)
    if not secret.exists():
        raise _refusal("REG-110", secret, "there is no such file", "name a dockerconfigjson file")
    return secret


def _config(path: Path) -> dict[str, Any]:
    """The JSON object in the file."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        what = f"cannot be read ({type(error).__name__})"
        raise _refusal("REG-110", path, what, "name a dockerconfigjson file") from None
    if len(data) > LARGEST:
        raise _refusal(
            "REG-110", path, "is larger than a Secret can be", f"keep it under {LARGEST:,}"
        )
    if not text.strip():
        raise _refusal("REG-110", path, "is empty", _FORM)
    try:
        config = files.parse_json(text.encode())
    except (ValueError, RecursionError):
        what, change = "is not JSON", _FORM
        if _is_base64(text):
            what, change = "is base64, as `kubectl get -o yaml` shows it", "decode it: base64 -d"
        elif re.search(r"^kind:\s*Secret", text, re.MULTILINE):
            what, change = (
                "is the Secret's manifest",
                "give the value of its .dockerconfigjson",
            )
        raise _refusal("REG-110", path, what, change) from None
    if not isinstance(config, dict):
        raise _refusal("REG-110", path, "is not a JSON object", _FORM)
    if config.get("kind") == "Secret":
        change = "give the value of its .dockerconfigjson"
        raise _refusal("REG-110", path, "is the Secret's manifest", change)
    return config


def _auths(config: dict[str, Any], path: Path, *, needed: bool = True) -> dict[str, Any]:
    """The `auths` mapping, or the whole of the older .dockercfg form."""
    old = path.name == ".dockercfg" or all(
        isinstance(value, dict) and ("auth" in value or "username" in value)
        for value in config.values()
    )
    auths = config.get("auths", config if old and config else None)
    if auths is None and not needed:
        return {}
    if not isinstance(auths, dict):
        what = "has no auths" if auths is None else "auths is not an object"
        raise _refusal("REG-110", path, what, _FORM)
    return auths


def _best(keys: Mapping[str, Any], registry: str, repository: str) -> str | None:
    """The key that matches most of registry/repository.

    Names come before patterns, entries before empty ones, and the registry's very name before
    another spelling of it (with https://, say), as in docker.
    """
    requested = _host(registry)
    fitting = []
    for key in keys:
        host, (_, _, path) = _host(key), _bare(key).partition("/")
        path = "" if path in ("v1", "v2") else path
        if matches(host, requested) and (not path or f"{repository}/".startswith(f"{path}/")):
            exact = key in (registry, DOCKER_HUB_KEY)
            fitting.append((len(path), host == requested, bool(keys[key]), exact, key))
    return max(fitting)[-1] if fitting else None


def matches(pattern: str, host: str) -> bool:
    """Match as kubelets do: a * is any text between two dots; ports must be equal."""
    if "*" not in pattern:
        return pattern == host
    (name, _, port), (host_name, _, host_port) = pattern.partition(":"), host.partition(":")
    parts, host_parts = name.split("."), host_name.split(".")
    return (
        port == host_port
        and len(parts) == len(host_parts)
        and all(map(fnmatch.fnmatchcase, host_parts, parts))
    )


def _read(entry: Any, origin: str) -> Login | None:
    """The login in an entry of auths; None for an empty one, which docker writes for helpers."""
    if not isinstance(entry, dict | None):
        raise _refusal("REG-111", origin, "is not an object", _FORM)
    entry = {key: value for key, value in (entry or {}).items() if value is not None}
    for key in ("auth", "username", "password", "identitytoken"):
        if not isinstance(entry.get(key, ""), str):
            raise _refusal("REG-111", f"{origin}.{key}", "is not a string", "write it in quotes")
    username, password = entry.get("username", ""), entry.get("password", "")
    if packed := "".join(entry.get("auth", "").split()):  # base64 of coreutils breaks lines
        try:
            pair = base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True).decode()
        except (binascii.Error, UnicodeDecodeError, ValueError):
            change = "write base64 of user:password"
            raise _refusal("REG-111", f"{origin}.auth", "is not base64 of text", change) from None
        username, colon, password = pair.strip("\0\r\n").partition(":")
        if not colon:
            what, change = "has no colon", "write base64 of user:password"
            raise _refusal("REG-111", f"{origin}.auth", what, change)
    if token := entry.get("identitytoken"):
        return Login(origin, username or TOKEN_USER, identity_token=token)
    if not username and not password:
        if not any(entry.get(key) for key in ("auth", "email")) and "username" not in entry:
            return None
        raise _refusal("REG-111", origin, "has neither user nor password", "fill in both")
    if not username or not password:
        missing = "password" if username else "user"
        raise _refusal("REG-111", origin, f"has no {missing}", f"add the {missing}")
    # A password may have lines within: Google's key file is one.
    if re.search(r"[\x00-\x1f\x7f]", username) or re.search(r"\x00|[\r\n]$", password):
        what = "contains a line break or another control character"
        change = "make it without: echo -n, or printf %s"
        raise _refusal("REG-111", origin, what, change)
    return Login(origin, username, password)


def _from_helper(name: Any, registry: str, path: Path) -> Login | None:
    """A credential helper's login for the registry, or None."""
    where = f"{path}: helper {str(name)[:60]!r}"
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
        raise _refusal("REG-113", where, "is not a helper's name", "run `docker login` again")
    program = shutil.which(f"docker-credential-{name}")
    if program is None:
        what, change = "is not installed", "install it, or give the login as a file"
        raise _refusal("REG-113", where, what, change)
    server = DOCKER_HUB_KEY if _host(registry) == "docker.io" else registry
    options: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace"}
    try:
        done = subprocess.run([program, "get"], input=server, timeout=HELPER_SECONDS, **options)
    except (OSError, subprocess.TimeoutExpired) as error:
        what = f"failed ({type(error).__name__})"
        raise _refusal("REG-113", where, what, "give the login as a file") from None
    if done.returncode:
        said = " ".join((done.stderr.strip() or done.stdout).split())
        if not said or _NOT_FOUND.search(said):
            return None
        what = f"failed: {printable(said[:LONGEST_WORDS])}"
        raise HelperFailed.at("REG-113", where, what, "give the login as a file")
    try:
        record = json.loads(done.stdout)
        user, word = str(record["Username"]), str(record["Secret"])
    except (ValueError, KeyError, TypeError, RecursionError):
        what = "gave an invalid answer"
        raise _refusal("REG-113", where, what, "give the login as a file") from None
    if not user and not word:
        return None
    if user == TOKEN_USER:
        return Login(where, user, identity_token=word)
    return Login(where, user, word)


def _origin(path: Path, key: str) -> str:
    return f"{path}: auths[{_bare(key)}]"


def _bare(key: str) -> str:
    return re.sub(r"^[a-z]+://", "", key.strip(), flags=re.IGNORECASE).rstrip("/")


def _host(key: str) -> str:
    host = _bare(key).partition("/")[0].lower().removesuffix(":443")
    return "docker.io" if host in DOCKER_HUB else host


def _is_base64(text: str) -> bool:
    try:
        return base64.b64decode(text, validate=False).lstrip()[:1] == b"{"
    except (binascii.Error, ValueError):
        return False


def _refusal(code: str, where: Path | str, what: str, change: str) -> SpecError:
    return SpecError([Problem(code, str(where), what, change)])
