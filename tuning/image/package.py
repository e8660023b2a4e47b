"""An adapter folder as one image in an OCI layout folder: the same files, the same digest.

Uncompressed USTAR layers without clock, owner or mode of this machine, and canonical JSON.
Compression would only cost time (weights hardly shrink) and put a compressor's version into the
digest. Files lie in `/data`, and hard-linked under `/models` for the readers that look there.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from tuning import files
from tuning.errors import Problem, SpecError
from tuning.image.manifest import CONFIG, INDEX, LAYER, MANIFEST, MODEL_NAME, RUN_ID, Blob

WEIGHTS = ("adapter_config.json", "adapter_model.safetensors")
TOKENIZER = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
DOCUMENTS = ("LICENSE", "NOTICE", "README.md", "tuning.json")
LAYERS = {"weights": WEIGHTS, "tokenizer": TOKENIZER, "documents": DOCUMENTS}
ADAPTER_FILES = frozenset(name for names in LAYERS.values() for name in names)
LARGEST_FILE = 8**11 - 1  # bytes that a USTAR header can count


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
    name: str | None = None,
) -> Built:
    """Write the files of `adapter` as one image into the layout folder `layout`.

    An image that `layout` held before is replaced. `name` is what the layout's index calls it. The
    time of its making is SOURCE_DATE_EPOCH, or 1970. Raises SpecError when the folder holds a file
    that no adapter image may carry, or lacks one that each must.
    """
    _refuse_strangers(adapter)
    created = _created()
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    layers, history = [], []
    for title, names in LAYERS.items():
        present = sorted(name for name in names if (adapter / name).is_file())
        if present:
            layers.append(_write_layer(adapter, present, blobs))
            history.append({"created": created, "created_by": f"tuning: {title}"})
    notes = {
        **annotations,
        MODEL_NAME: preset,
        RUN_ID: run_id,
        "org.opencontainers.image.created": created,
    }
    config = {
        "architecture": "amd64",
        "os": "linux",
        "created": created,
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
    _point(layout, top, name)
    _sweep(blobs, {top.digest, config_blob.digest, *(layer.digest for layer in layers)})
    parts = (config_blob, *layers)
    return Built(top.digest, top.size + sum(blob.size for blob in parts), parts)


def _created() -> str:
    """The time that the image gives as its own: no clock, so that its digest repeats."""
    text = os.environ.get("SOURCE_DATE_EPOCH") or "0"
    try:
        moment = datetime.fromtimestamp(int(text), UTC)
    except (ValueError, OverflowError, OSError):
        what, change = "is no time in seconds since 1970", "unset it"
        raise SpecError.at("IMAGE-106", "SOURCE_DATE_EPOCH", what, change) from None
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


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


class _Layer:
    """A tar on its way to the disk, hashed as it is written: the bytes are read once."""

    def __init__(self, out: BinaryIO) -> None:
        self._out, self._hash, self.size = out, hashlib.sha256(), 0

    def put(self, data: bytes | memoryview) -> None:
        """Write the next bytes."""
        self._hash.update(data)
        self._out.write(data)
        self.size += len(data)

    def entry(self, name: str, kind: bytes, *, size: int = 0, target: str = "") -> None:
        """Write a header; time and owner are 0 and the owner's name is empty by default."""
        entry = tarfile.TarInfo(name)
        entry.type, entry.size, entry.linkname = kind, size, target
        entry.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
        self.put(entry.tobuf(tarfile.USTAR_FORMAT))

    def file(self, name: str, path: Path) -> None:
        """Write a file's header and content."""
        with path.open("rb", buffering=0) as content:
            left = os.fstat(content.fileno()).st_size
            if left > LARGEST_FILE:
                what, change = "is larger than a tar can hold (8 GiB)", "train with a lower rank"
                raise SpecError.at("IMAGE-107", str(path), what, change)
            self.entry(name, tarfile.REGTYPE, size=left)
            padding, piece = -left % tarfile.BLOCKSIZE, memoryview(bytearray(files.CHUNK))
            while left:
                count = content.readinto(piece[:left])
                if not count:
                    raise OSError(f"{path} became shorter while it was read")
                self.put(piece[:count])
                left -= count
            self.put(bytes(padding))

    def end(self) -> str:
        """Write the end, padded as tar programs do; gives the digest."""
        self.put(bytes(2 * tarfile.BLOCKSIZE))
        self.put(bytes(-self.size % tarfile.RECORDSIZE))
        return f"sha256:{self._hash.hexdigest()}"


def _write_layer(adapter: Path, names: list[str], blobs: Path) -> Blob:
    """One tar of `names` under data/, and of hard links to them under models/."""
    scratch = blobs / f".{os.getpid()}.tmp"
    with scratch.open("wb") as out:
        layer = _Layer(out)
        layer.entry("data", tarfile.DIRTYPE)
        for name in names:
            layer.file(f"data/{name}", adapter / name)
        layer.entry("models", tarfile.DIRTYPE)
        for name in names:
            layer.entry(f"models/{name}", tarfile.LNKTYPE, target=f"data/{name}")
        blob = Blob(LAYER, layer.end(), layer.size)
        out.flush()
        os.fsync(out.fileno())
    scratch.replace(blobs / blob.digest.removeprefix("sha256:"))
    files.sync_folder(blobs)
    return blob


def _write_json(value: Any, media_type: str, blobs: Path) -> Blob:
    data = files.canonical(value)
    blob = Blob(media_type, f"sha256:{files.digest(data)}", len(data))
    files.write(blobs / files.digest(data), data)
    return blob


def _point(layout: Path, top: Blob, name: str | None) -> None:
    """Make `top` the image of the layout."""
    files.write(layout / "oci-layout", files.canonical({"imageLayoutVersion": "1.0.0"}))
    entry = top.to_json() | {"platform": {"architecture": "amd64", "os": "linux"}}
    if name:
        entry["annotations"] = {"org.opencontainers.image.ref.name": name}
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]}
    files.write(layout / "index.json", files.canonical(index))


def _sweep(blobs: Path, kept: set[str]) -> None:
    """Remove the blobs of images that the layout no longer points at."""
    names = {digest.removeprefix("sha256:") for digest in kept}
    for path in blobs.iterdir():
        if path.name not in names:
            path.unlink()
