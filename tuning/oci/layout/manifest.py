"""Manifests, indexes and descriptors, parsed strictly."""

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
REF_NAME_KEY = "org.opencontainers.image.ref.name"  # an image's name in a layout

MOST_DOCUMENTS = 256  # manifests and indexes of one image
LARGEST_JSON = 4 << 20  # bytes of a manifest, index or config
MOST_LAYERS = 127  # limit of container runtimes
DEEPEST_INDEX = 3
Value = dict[str, Any]
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
    """A parsed manifest; `where` names the image in messages."""

    where: str
    digest: str
    config: Blob
    layers: tuple[Blob, ...]
    annotations: Mapping[str, str]

    @property
    def run_id(self) -> str | None:
        """The run that made it, if any of ours did."""
        return self.annotations.get(RUN_ID)

    @property
    def blobs(self) -> tuple[Blob, ...]:
        """The config and each layer once."""
        return tuple(dict.fromkeys((self.config, *self.layers)))


def refused(where: str, what: str, change: str = "build or push the image again") -> RefusedError:
    """The error of an invalid image."""
    return RefusedError.at("IMAGE-110", where, what, change)


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
    """Whether a manifest's JSON is an index, by its content and not by the server's header."""
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


def index_entries(index: Mapping[str, Any], *, where: str) -> tuple[Blob, ...]:
    """Every manifest in an index, of any kind."""
    try:
        return tuple(_blob(entry) for entry in index["manifests"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise refused(where, "has an index with an invalid entry") from None


def choose_manifest(index: Mapping[str, Any], *, where: str) -> Blob:
    """The manifest of an index to use: linux/amd64, else the first image."""
    images = []
    blobs = index_entries(index, where=where)
    for entry, blob in zip(index["manifests"], blobs, strict=True):
        platform = entry.get("platform")
        platform = platform if isinstance(platform, dict) else {}
        if platform.get("os") != "unknown":  # attestations and the like
            amd64 = (platform.get("os"), platform.get("architecture")) == ("linux", "amd64")
            images.append((not amd64, blob))
    if not images:
        raise refused(where, "has an index without an image")
    return min(images, key=lambda pair: pair[0])[1]


def _blob(value: Mapping[str, Any]) -> Blob:
    media_type, digest, size = value["mediaType"], value["digest"], value["size"]
    if type(size) is not int or size < 0 or not isinstance(media_type, str):
        raise ValueError(size)
    if not _DIGEST.fullmatch(digest):
        raise ValueError(digest)
    return Blob(media_type, digest, size)


def layout_of(name: str) -> tuple[Path, str | None]:
    """The folder that `oci:DIR` or `oci:DIR:NAME` names, and the image's name in it, if any."""
    path = name.removeprefix("oci:")
    folder, colon, image = path.rpartition(":")
    if colon and image and Path(folder).is_dir() and not Path(path).is_dir():
        return Path(folder), image
    return Path(path), None


def _index(layout: Path, name: str | None, where: str) -> Value:
    """The layout's index, of several images with the entries of `name` alone.

    Raises RefusedError.
    """
    record = parse_json(_content(layout / "index.json", where), where=where)
    entries = record.get("manifests")
    by_name: dict[str, list[Value]] = {}
    for entry in entries if isinstance(entries, list) else ():
        notes = entry.get("annotations") if isinstance(entry, dict) else None
        if isinstance(notes, dict) and isinstance(title := notes.get(REF_NAME_KEY), str):
            by_name.setdefault(title, []).append(entry)
    if name is None and len(by_name) < 2:
        return record
    if name in by_name:
        return record | {"manifests": by_name[name]}
    names = ", ".join(sorted(by_name))[:300] or "unnamed ones"
    what = f"holds several images ({names})" if name is None else f"has no {name}, only {names}"
    change = f"name one of them: oci:{layout}:NAME"
    raise RefusedError.at("IMAGE-111", where, what, change)


def read_layout(layout: Path, name: str | None = None) -> Image:
    """The image of a layout folder, its manifest's digest checked. Raises RefusedError.

    `name` is the image's in a layout of several.
    """
    where = f"oci:{layout}"
    record = _index(layout, name, where)
    for _ in range(DEEPEST_INDEX):
        top = choose_manifest(record, where=where)
        data = _checked(layout, top, where)
        record = parse_json(data, where=where)
        if not is_index(record):
            return parse_manifest(data, where=where)
    raise refused(where, "has too deeply nested indexes")


@dataclass(frozen=True)
class Document:
    """A manifest or an index: its descriptor and its bytes, checked."""

    blob: Blob
    data: bytes


def read_documents(layout: Path, name: str | None = None) -> tuple[Document, ...]:
    """The manifests of a layout's image; an index comes after its entries, the top one last.

    Raises RefusedError.
    """
    where = f"oci:{layout}"
    record = _index(layout, name, where)
    documents: dict[str, Document] = {}

    def take(blob: Blob, depth: int) -> None:
        if blob.digest in documents:
            return
        if depth == DEEPEST_INDEX:
            raise refused(where, "has too deeply nested indexes")
        if len(documents) == MOST_DOCUMENTS:
            raise refused(where, f"has more than {MOST_DOCUMENTS} manifests")
        data = _checked(layout, blob, where)
        inner = parse_json(data, where=where)
        for entry in index_entries(inner, where=where) if is_index(inner) else ():
            take(entry, depth + 1)
        documents[blob.digest] = Document(blob, data)

    take(choose_manifest(record, where=where), 0)
    return tuple(documents.values())


def blobs_of(documents: Iterable[Document], *, where: str) -> tuple[Blob, ...]:
    """Config and layers of all images among the documents, each once, smallest first."""
    blobs: dict[str, Blob] = {}
    for document in documents:
        if not is_index(parse_json(document.data, where=where)):
            for blob in parse_manifest(document.data, where=where).blobs:
                blobs.setdefault(blob.digest, blob)
    return tuple(sorted(blobs.values(), key=lambda blob: (blob.size, blob.digest)))


def _checked(layout: Path, blob: Blob, where: str) -> bytes:
    data = _content(blob_path(layout, blob), where)
    if f"sha256:{files.digest(data)}" != blob.digest:
        raise refused(where, f"has a manifest that is not {blob.digest}")
    return data


def _content(path: Path, where: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(LARGEST_JSON + 1)
    except OSError:
        if not path.parent.exists():
            raise refused(where, "does not exist", "correct the path") from None
        raise refused(where, f"is not an OCI image layout: it lacks {path.name}") from None


def blob_path(layout: Path, blob: Blob | str) -> Path:
    """The path of a blob, or of a digest, in a layout."""
    digest = blob if isinstance(blob, str) else blob.digest
    return layout / "blobs" / "sha256" / digest.removeprefix("sha256:")
