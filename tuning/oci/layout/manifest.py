"""Manifests, indexes and descriptors: what an image says of itself, read strictly."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuning import files
from tuning.errors import RefusedError

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
RUN_ID = "tuning.kaito.sh/run-id"
MODEL_NAME = "sh.kaito.model.name"

LARGEST_JSON = 4 << 20  # bytes of a manifest, index or config
MOST_LAYERS = 127  # what container runtimes take
DEEPEST_INDEX = 3
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Blob:
    """An OCI descriptor: media type, digest and size in bytes."""

    media_type: str
    digest: str
    size: int

    def to_json(self) -> dict[str, Any]:
        """The descriptor as manifests hold it."""
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size}


@dataclass(frozen=True)
class Image:
    """A manifest and what it points at; `where` names the image in messages."""

    where: str
    digest: str
    config: Blob
    layers: tuple[Blob, ...]
    annotations: Mapping[str, str]

    @property
    def run_id(self) -> str | None:
        """The run that made it, if it is one of ours."""
        return self.annotations.get(RUN_ID)

    @property
    def blobs(self) -> tuple[Blob, ...]:
        """What the manifest points at: the config and each layer once."""
        return tuple(dict.fromkeys((self.config, *self.layers)))


def refused(where: str, what: str) -> RefusedError:
    """The error for an image that is not what an image must be."""
    return RefusedError.at("IMAGE-110", where, what, "build or push the image again")


def parse_json(data: bytes, *, where: str) -> dict[str, Any]:
    """A JSON object of a manifest's size. Raises RefusedError."""
    try:
        value = files.parse_json(data) if len(data) <= LARGEST_JSON else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise refused(where, "has no valid JSON manifest")
    return value


def is_index(record: Mapping[str, Any]) -> bool:
    """Whether a manifest's JSON is that of an index; its own word counts, not the server's."""
    return record.get("mediaType") in (INDEX, DOCKER_INDEX) or "manifests" in record


def parse_manifest(data: bytes, *, where: str) -> Image:
    """An image manifest from its bytes. Raises RefusedError for anything else."""
    value = parse_json(data, where=where)
    try:
        config = _blob(value["config"])
        layers = tuple(_blob(layer) for layer in value["layers"])
        annotations = {str(k): str(v) for k, v in (value.get("annotations") or {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise refused(where, "has no valid image manifest") from None
    if len(layers) > MOST_LAYERS:
        raise refused(where, f"has more than {MOST_LAYERS} layers")
    return Image(where, f"sha256:{files.digest(data)}", config, layers, annotations)


def entries(index: Mapping[str, Any], *, where: str) -> tuple[Blob, ...]:
    """Every manifest that an index names, of whatever kind."""
    try:
        return tuple(_blob(entry) for entry in index["manifests"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise refused(where, "has an index with an invalid entry") from None


def choose(index: Mapping[str, Any], *, where: str) -> Blob:
    """The manifest of an index that is meant here: linux/amd64, else the first image."""
    found = []
    try:
        for entry in index["manifests"]:
            platform = entry.get("platform") or {}
            if platform.get("os") == "unknown":  # attestations and the like
                continue
            amd64 = (platform.get("os"), platform.get("architecture")) == ("linux", "amd64")
            found.append((not amd64, _blob(entry)))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise refused(where, "has an index with an invalid entry") from None
    if not found:
        raise refused(where, "has an index without an image")
    return min(found, key=lambda pair: pair[0])[1]


def _blob(value: Mapping[str, Any]) -> Blob:
    media_type, digest, size = value["mediaType"], value["digest"], value["size"]
    if type(size) is not int or size < 0 or not isinstance(media_type, str):
        raise ValueError(size)
    if not _DIGEST.fullmatch(digest):
        raise ValueError(digest)
    return Blob(media_type, digest, size)


def read(layout: Path) -> Image:
    """The image of a layout folder, its manifest's digest checked. Raises RefusedError."""
    where = f"oci:{layout}"
    record = parse_json(_content(layout / "index.json", where), where=where)
    for _ in range(DEEPEST_INDEX):
        top = choose(record, where=where)
        data = _content(blob_path(layout, top), where)
        if f"sha256:{files.digest(data)}" != top.digest:
            raise refused(where, f"has a manifest that is not {top.digest}")
        record = parse_json(data, where=where)
        if not is_index(record):
            return parse_manifest(data, where=where)
    raise refused(where, "has indexes within indexes")


@dataclass(frozen=True)
class Document:
    """A manifest or an index: its descriptor and its bytes, which fit each other."""

    blob: Blob
    data: bytes


def documents(layout: Path) -> tuple[Document, ...]:
    """The manifests of a layout's image, each after what it names; the last one is the top.

    An image of one platform has one. Raises RefusedError.
    """
    where = f"oci:{layout}"
    record = parse_json(_content(layout / "index.json", where), where=where)
    found: dict[str, Document] = {}

    def take(blob: Blob, depth: int) -> None:
        if depth == DEEPEST_INDEX:
            raise refused(where, "has indexes within indexes")
        data = _content(blob_path(layout, blob), where)
        if f"sha256:{files.digest(data)}" != blob.digest:
            raise refused(where, f"has a manifest that is not {blob.digest}")
        inner = parse_json(data, where=where)
        for entry in entries(inner, where=where) if is_index(inner) else ():
            take(entry, depth + 1)
        found.setdefault(blob.digest, Document(blob, data))

    take(choose(record, where=where), 0)
    return tuple(found.values())


def blobs_of(found: Iterable[Document], *, where: str) -> tuple[Blob, ...]:
    """Config and layers of every image among the documents, each once; the smallest first."""
    blobs: dict[str, Blob] = {}
    for document in found:
        if not is_index(parse_json(document.data, where=where)):
            for blob in parse_manifest(document.data, where=where).blobs:
                blobs.setdefault(blob.digest, blob)
    return tuple(sorted(blobs.values(), key=lambda blob: (blob.size, blob.digest)))


def _content(path: Path, where: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(LARGEST_JSON + 1)
    except OSError:
        if not path.parent.exists():
            raise refused(where, "does not exist") from None
        raise refused(where, f"is no OCI image layout: it lacks {path.name}") from None


def blob_path(layout: Path, blob: Blob | str) -> Path:
    """Where a layout keeps a blob, which may be given by its digest."""
    digest = blob if isinstance(blob, str) else blob.digest
    return layout / "blobs" / "sha256" / digest.removeprefix("sha256:")
