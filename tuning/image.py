"""Adapter folder -> OCI image layout, and an image layout -> a folder of its files. No network.

The image is a function of the files and the annotations alone: uncompressed USTAR layers without
clock, owner or mode of this machine, and canonical JSON. Compression would only cost time (weights
hardly shrink) and put a compressor's version into the digest. Files lie in `/data`, and hard-linked
under `/models` for the readers that look there.

Formats: OCI image specification 1.1 (layout, manifest, config), POSIX.1-1988 USTAR.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from tuning import files
from tuning.errors import Problem, RefusedError, SpecError

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
RUN_ID = "tuning.kaito.sh/run-id"
MODEL_NAME = "sh.kaito.model.name"
EPOCH = "1970-01-01T00:00:00Z"

WEIGHTS = ("adapter_config.json", "adapter_model.safetensors")
TOKENIZER = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
DOCUMENTS = ("LICENSE", "README.md", "tuning.json")
LAYERS = {"weights": WEIGHTS, "tokenizer": TOKENIZER, "documents": DOCUMENTS}
ADAPTER_FILES = frozenset(name for names in LAYERS.values() for name in names)

MOST_ENTRIES = 10_000
LARGEST_JSON = 4 << 20  # bytes of a manifest, index or config
LARGEST_TOTAL = 64 << 30  # bytes out of one image
HIGHEST_RATIO = 200  # bytes out of a compressed layer for each byte in it


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
class Built:
    """An image in a layout folder."""

    digest: str  # of its manifest
    size: int  # bytes of all blobs
    blobs: tuple[Blob, ...]  # config and layers


def build(
    adapter: Path,
    layout: Path,
    *,
    preset: str,
    run_id: str,
    annotations: Mapping[str, str],
) -> Built:
    """Write the files of `adapter` as one image into the layout folder `layout`.

    An image that `layout` held before is replaced. Raises SpecError when the folder holds a file
    that no adapter image may carry, or lacks one that each must.
    """
    _refuse_strangers(adapter)
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    layers, history = [], []
    for title, names in LAYERS.items():
        present = sorted(name for name in names if (adapter / name).is_file())
        if present:
            layers.append(_write_layer(adapter, present, blobs))
            history.append({"created": EPOCH, "created_by": f"tuning: {title}"})
    notes = {
        **annotations,
        MODEL_NAME: preset,
        RUN_ID: run_id,
        "org.opencontainers.image.created": EPOCH,
    }
    config = {
        "architecture": "amd64",
        "os": "linux",
        "created": EPOCH,
        "config": {"Labels": notes},
        "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
        "history": history,
    }
    config_blob = _write_json(config, CONFIG, blobs)
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config_blob.to_json(),
        "layers": [layer.to_json() for layer in layers],
        "annotations": notes,
    }
    top = _write_json(manifest, MANIFEST, blobs)
    _point(layout, top)
    _sweep(blobs, {top.digest, config_blob.digest, *(layer.digest for layer in layers)})
    parts = (config_blob, *layers)
    return Built(top.digest, top.size + sum(blob.size for blob in parts), parts)


def _refuse_strangers(adapter: Path) -> None:
    problems = [
        Problem("IMAGE-101", str(adapter / name), "is missing", "train the adapter again")
        for name in WEIGHTS
        if not (adapter / name).is_file()
    ]
    problems += [
        Problem(
            "IMAGE-102",
            str(path),
            "is no file of an adapter, so it does not go into the image",
            "remove it from the folder",
        )
        for path in sorted(adapter.iterdir())
        if path.name not in ADAPTER_FILES or path.is_symlink() or not path.is_file()
    ]
    if problems:
        raise SpecError(problems)


class _Hashed(io.RawIOBase):
    """A file that knows the sha256 and the size of what was written to it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self.size += len(data)
        return self._file.write(data)

    @property
    def digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"

    def close(self) -> None:
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        super().close()


def _write_layer(adapter: Path, names: list[str], blobs: Path) -> Blob:
    """One tar of `names` under data/, and of hard links to them under models/; one pass."""
    scratch = blobs / f".{os.getpid()}.tmp"
    with _Hashed(scratch) as out:
        with tarfile.open(
            fileobj=cast(BinaryIO, out), mode="w|", format=tarfile.USTAR_FORMAT
        ) as tar:
            tar.addfile(_entry("data", tarfile.DIRTYPE))
            for name in names:
                with (adapter / name).open("rb") as content:
                    size = os.fstat(content.fileno()).st_size
                    tar.addfile(_entry(f"data/{name}", tarfile.REGTYPE, size=size), content)
            tar.addfile(_entry("models", tarfile.DIRTYPE))
            for name in names:
                tar.addfile(_entry(f"models/{name}", tarfile.LNKTYPE, target=f"data/{name}"))
        out.close()
        blob = Blob(LAYER, out.digest, out.size)
    scratch.replace(blobs / blob.digest.removeprefix("sha256:"))
    files.sync_folder(blobs)
    return blob


def _entry(name: str, kind: bytes, *, size: int = 0, target: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)  # time 0, owner 0 and no owner's name by default
    entry.type, entry.size, entry.linkname = kind, size, target
    entry.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    return entry


def _write_json(value: Any, media_type: str, blobs: Path) -> Blob:
    data = files.canonical(value)
    blob = Blob(media_type, f"sha256:{files.digest(data)}", len(data))
    files.write(blobs / files.digest(data), data)
    return blob


def _point(layout: Path, top: Blob) -> None:
    """Make `top` the image of the layout."""
    files.write(layout / "oci-layout", files.canonical({"imageLayoutVersion": "1.0.0"}))
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [top.to_json()]}
    files.write(layout / "index.json", files.canonical(index))


def _sweep(blobs: Path, kept: set[str]) -> None:
    """Remove the blobs of images that the layout no longer points at."""
    names = {digest.removeprefix("sha256:") for digest in kept}
    for path in blobs.iterdir():
        if path.name not in names:
            path.unlink()


# Reading: nothing of an image is trusted before its digest is checked, nor its names ever.


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


def parse_manifest(data: bytes, *, where: str) -> Image:
    """An image manifest from its bytes. Raises RefusedError for anything else."""
    value = parse_json(data, where=where)
    try:
        config = _blob(value["config"])
        layers = tuple(_blob(layer) for layer in value["layers"])
        annotations = {str(k): str(v) for k, v in (value.get("annotations") or {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise refused(where, "has no valid image manifest") from None
    return Image(where, f"sha256:{files.digest(data)}", config, layers, annotations)


def parse_json(data: bytes, *, where: str) -> dict[str, Any]:
    """A JSON object of a manifest's size. Raises RefusedError."""
    try:
        value = files.parse_json(data) if len(data) <= LARGEST_JSON else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise refused(where, "has no valid JSON manifest")
    return value


def choose(index: Mapping[str, Any], *, where: str) -> Blob:
    """The manifest of an index that is meant here: linux/amd64, else the first image."""
    found = []
    for entry in index.get("manifests") or []:
        platform = entry.get("platform") or {}
        if platform.get("os") == "unknown":  # attestations and the like
            continue
        amd64 = (platform.get("os"), platform.get("architecture")) == ("linux", "amd64")
        found.append((not amd64, entry))
    if not found:
        raise refused(where, "has an index without an image")
    try:
        return _blob(min(found, key=lambda pair: pair[0])[1])
    except (KeyError, TypeError, ValueError):
        raise refused(where, "has an index with an invalid entry") from None


def _blob(value: Mapping[str, Any]) -> Blob:
    digest, size = value["digest"], value["size"]
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest) or not isinstance(size, int) or size < 0:
        raise ValueError(digest)
    return Blob(str(value["mediaType"]), digest, size)


def refused(where: str, what: str) -> RefusedError:
    """The error for an image that is not what an image must be."""
    return RefusedError.at("IMAGE-110", where, what, "build or push the image again")


def read(layout: Path) -> Image:
    """The image of a layout folder, its manifest's digest checked. Raises RefusedError."""
    where = f"oci:{layout}"
    try:
        index = parse_json((layout / "index.json").read_bytes(), where=where)
        top = choose(index, where=where)
        data = blob_path(layout, top).read_bytes()
    except OSError:
        raise refused(where, "is no OCI image layout") from None
    found = parse_manifest(data, where=where)
    if found.digest != top.digest:
        raise refused(where, f"has a manifest that is not {top.digest}")
    return found


def blob_path(layout: Path, blob: Blob) -> Path:
    """Where a layout keeps a blob."""
    return layout / "blobs" / "sha256" / blob.digest.removeprefix("sha256:")


def unpack(
    image: Image,
    layout: Path,
    target: Path,
    *,
    wanted: Callable[[str], bool] = ADAPTER_FILES.__contains__,
) -> tuple[str, ...]:
    """Lay the files under /data of `image` down in the new folder `target`; gives their names.

    Every blob's digest is checked first. Only regular files whose name `wanted` accepts come out;
    a later layer's file replaces an earlier one's. Raises RefusedError for a damaged or hostile
    image, SpecError if `target` is already there with something in it; then nothing is left.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SpecError.at("IMAGE-103", str(target), "already exists", "name a new folder")
    for blob in (image.config, *image.layers):
        _verify(blob_path(layout, blob), blob, image.where)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    scratch.mkdir()
    try:
        budget = _Budget(image.where)
        for blob in image.layers:
            with _opened(blob_path(layout, blob), blob, image.where) as stream:
                _extract(stream, scratch, wanted, budget)
        names = tuple(sorted(str(p.relative_to(scratch)) for p in scratch.rglob("*")))
        if not names:
            raise refused(image.where, "holds no file under /data that is wanted here")
        if target.exists():
            target.rmdir()
        files.replace_folder(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return names


def _verify(path: Path, blob: Blob, where: str) -> None:
    if not path.is_file():
        raise refused(where, f"lacks the blob {blob.digest}")
    if path.stat().st_size != blob.size or f"sha256:{files.digest_file(path)}" != blob.digest:
        raise refused(where, f"has a damaged blob {blob.digest}")


@dataclass
class _Budget:
    """What may still come out of an image."""

    where: str
    entries: int = MOST_ENTRIES
    total: int = LARGEST_TOTAL

    def take(self, size: int) -> None:
        self.entries -= 1
        self.total -= size
        if self.entries < 0:
            raise refused(self.where, f"has more than {MOST_ENTRIES:,} entries")
        if self.total < 0 or size < 0:
            raise refused(self.where, "unpacks to more than it may")


def _extract(
    stream: BinaryIO, folder: Path, wanted: Callable[[str], bool], budget: _Budget
) -> None:
    try:
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for entry in tar:
                budget.take(entry.size if entry.isreg() else 0)
                name = _data_name(entry, budget.where)
                if name is None or not wanted(name):
                    continue
                if not entry.isreg() or entry.issparse():
                    raise refused(budget.where, f"has data/{name} as a link or device")
                content = tar.extractfile(entry)
                if content is None:
                    raise refused(budget.where, f"has no content for data/{name}")
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as out:
                    shutil.copyfileobj(content, out, files.CHUNK)
    except (tarfile.TarError, EOFError, zlib.error, UnicodeError, OverflowError) as error:
        what = f"has a layer that is no valid tar ({type(error).__name__})"
        raise refused(budget.where, what) from None


def _data_name(entry: tarfile.TarInfo, where: str) -> str | None:
    """The entry's name below data/, or None if it lies elsewhere or is a folder."""
    name = entry.name
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise refused(where, "has an entry that points out of the image")
    if len(parts) < 2 or parts[0] != "data" or entry.isdir():
        return None
    if parts[-1].startswith(".wh."):
        raise refused(where, "deletes files of an earlier layer under /data")
    return "/".join(parts[1:])


class _Limited(io.RawIOBase):
    """A decompressed stream that refuses to grow beyond a multiple of what went in."""

    def __init__(self, source: BinaryIO, limit: int, where: str) -> None:
        self._source, self._left, self._where = source, limit, where

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._source.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise refused(self._where, "has a compressed layer that unpacks to far too much")
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def _opened(path: Path, blob: Blob, where: str) -> Iterator[BinaryIO]:
    """The layer's tar stream, decompressed by what its first bytes say."""
    with path.open("rb") as raw:
        head = raw.read(4)
        raw.seek(0)
        if head[:2] == b"\x1f\x8b":
            import gzip

            plain: Any = gzip.GzipFile(fileobj=raw)
        elif head == b"\x28\xb5\x2f\xfd":
            plain = _zstd(raw, where)
        else:
            yield raw
            return
        limit = blob.size * HIGHEST_RATIO + files.CHUNK
        yield cast(BinaryIO, io.BufferedReader(_Limited(plain, limit, where), files.CHUNK))


def _zstd(raw: BinaryIO, where: str) -> Any:
    try:
        import zstandard
    except ImportError:
        what, change = "has a zstd layer", "install the extra: pip install 'tuning[train]'"
        raise SpecError.at("IMAGE-104", where, what, change) from None
    return zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(raw)
