"""Image references: `registry/repository:tag@digest`, parsed strictly.

The grammar is the one of the distribution project's `reference` package, which `docker`, `skopeo`
and Kubernetes share: a kubelet can pull what passes here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

DOCKER_HUB = "docker.io"
_HUB_NAMES = (DOCKER_HUB, "index.docker.io", "registry-1.docker.io")

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:]+\])(?::[0-9]{{1,5}})?", re.A)
_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*", re.A)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.A)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}", re.A)
_LONGEST_NAME = 255  # registry and repository together, as the distribution project has it


@dataclass(frozen=True)
class Reference:
    """One image in one registry. `tag` and `digest` are as written, without defaults."""

    registry: str  # "docker.io" for every name of Docker Hub
    repository: str  # "library/busybox" where the author wrote "busybox"
    tag: str | None = None
    digest: str | None = None  # "sha256:..."

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.registry}/{self.repository}{tag}{digest}"


def parse(text: str) -> Reference:
    """The reference that `text` spells.

    Raises ValueError with a message for users.
    """
    if not text:
        raise ValueError("it is empty")
    if re.search(r"\s", text) or not text.isprintable():
        raise ValueError("it contains a space or a control character")
    if "://" in text:
        raise ValueError("it starts with a URL scheme; an image reference has none")
    rest, tag, digest = _split_tag_and_digest(text)
    registry, repository = _split_registry(rest)
    _check_registry(registry)
    _check_repository(repository)
    if len(registry) + 1 + len(repository) > _LONGEST_NAME:
        raise ValueError(f"its name is longer than {_LONGEST_NAME} characters")
    if registry in _HUB_NAMES:
        registry = DOCKER_HUB
        repository = repository if "/" in repository else f"library/{repository}"
    return Reference(registry, repository, tag, digest)


def is_digest(text: str) -> bool:
    """Whether `text` is a sha256 or sha512 digest."""
    return _DIGEST.fullmatch(text) is not None


def _split_tag_and_digest(text: str) -> tuple[str, str | None, str | None]:
    rest, at, digest = text.partition("@")
    if at and not is_digest(digest):
        raise ValueError("after the @ must come a digest like sha256:<64 hexadecimal digits>")
    name, colon, tag = rest.rpartition(":")
    if not colon or "/" in tag:  # the colon of a port
        return rest, None, digest or None
    if not _TAG.fullmatch(tag):
        raise ValueError(
            f'"{tag}" is not a valid tag: letters, digits, "_", "." and "-", 128 at most'
            if tag
            else "nothing follows the last colon, where a tag belongs"
        )
    return name, tag, digest or None


def _split_registry(name: str) -> tuple[str, str]:
    """The first part is a registry if it looks like a host; otherwise the image is Docker Hub's."""
    first, slash, rest = name.partition("/")
    if slash and (any(c in first for c in ".:[") or first == "localhost" or first != first.lower()):
        return first, rest
    return DOCKER_HUB, name


def _check_registry(registry: str) -> None:
    if not _HOST.fullmatch(registry):
        raise ValueError(
            f'"{registry}" is not a registry host: letters, digits, "-" and ".", perhaps a :port'
        )
    port = registry.rpartition(":")[2] if not registry.endswith("]") else ""
    if ":" in registry and port.isdigit() and not 0 < int(port) < 65536:
        raise ValueError(f"{port} is not a valid port")


def _check_repository(repository: str) -> None:
    if not repository:
        raise ValueError("the name of the repository is missing")
    for part in repository.split("/"):
        if _COMPONENT.fullmatch(part):
            continue
        if not part:
            raise ValueError("it contains an empty part between two slashes")
        if part != part.lower():
            raise ValueError(f'"{part}" holds upper-case letters; a repository is all lower case')
        raise ValueError(
            f'"{part}" is not a valid part of a repository: lower-case letters and digits, '
            'joined by "-", "." or "_"'
        )
