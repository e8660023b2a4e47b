"""An adapter folder as one image in an OCI layout folder: the same files, the same digest.

Uncompressed USTAR layers without clock, owner or mode of this machine, and canonical JSON.
Compression would only cost time (weights hardly shrink) and put a compressor's version into the
digest. Files lie in `/data`, and hard-linked under `/models` for the readers that look there.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, cast

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
