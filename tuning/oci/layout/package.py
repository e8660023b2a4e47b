"""An adapter folder as one image in an OCI layout folder: the same files, the same digest.

Uncompressed USTAR layers without clock, owner or mode of this machine, and canonical JSON.
Compression would cost time (weights hardly shrink) and make the digest depend on the compressor.
Files are in `/data`, hard-linked under `/models` for readers that expect them there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tuning import files
from tuning.errors import Problem, SpecError
from tuning.oci.layout.manifest import (
    INDEX,
    MANIFEST,
    MODEL_NAME,
    MOST_LAYERS,
    REF_NAME_KEY,
    RUN_ID,
    Blob,
)
from tuning.oci.layout.platforms import Base, Writer
from tuning.oci.layout.write import NOTHING, write_layer

REF_NAME = "latest"  # readers of layouts that choose an image by its name find this one
MOST_WEIGHTS_LAYERS = MOST_LAYERS - 2  # the others are for config and documents
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
MODEL_DOCUMENTS = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "README.md")
MODEL_FILES = frozenset(
    {*TOKENIZER, "config.json", "generation_config.json", "model.safetensors.index.json"}
    | {"chat_template.json", "tekken.json", "preprocessor_config.json", "processor_config.json"}
)


@dataclass(frozen=True)
class Built:
    """An image in a layout folder."""

    digest: str  # of its manifest, or of its index
    size: int  # bytes of all blobs and manifests
    blobs: tuple[Blob, ...]  # configs and layers


def build_adapter(
    adapter: Path,
    layout: Path,
    *,
    preset: str,
    run_id: str,
    annotations: Mapping[str, str],
    index: bool = False,
    base: Base | None = None,
    replaced: Mapping[str, Path] = NOTHING,
) -> Built:
    """Write the files of `adapter` as one image into the layout folder `layout`.

    An image that `layout` held before is replaced. Its
    creation time is SOURCE_DATE_EPOCH, or 1970. With `index` the image is an index: the same
    layers for amd64, for arm64, and as a model of CNCF ModelPack. With `base` that image's layers
    come first, for readers that need a shell. A file in `replaced` stands for the folder's. Raises
    SpecError for an unknown file in the folder, or a missing one.
    """
    _check_files(adapter)
    notes = {**annotations, MODEL_NAME: preset, RUN_ID: run_id}
    groups = {
        title: tuple(name for name in names if (adapter / name).is_file())
        for title, names in LAYERS.items()
    }
    return _write(adapter, layout, groups, notes, index=index, base=base, replaced=replaced)


def build_model(model: Path, layout: Path, *, annotations: Mapping[str, str]) -> Built:
    """Write a whole model, safetensors and companions, as one image into `layout`.

    Each weights file is a layer of its own, up to as many as container runtimes take; of more files
    several share a layer. Other files are left out. Raises SpecError.
    """
    present = sorted(path.name for path in model.iterdir() if path.is_file())
    weights = [name for name in present if name.endswith(".safetensors")]
    each = max(1, math.ceil(len(weights) / MOST_WEIGHTS_LAYERS))
    shared = [tuple(weights[i : i + each]) for i in range(0, len(weights), each)]
    groups = {
        "config": tuple(name for name in present if name in MODEL_FILES),
        **{names[0]: names for names in shared},
        "documents": tuple(name for name in present if name in MODEL_DOCUMENTS),
    }
    return _write(model, layout, groups, annotations)


def _write(
    source: Path,
    layout: Path,
    groups: Mapping[str, tuple[str, ...]],
    annotations: Mapping[str, str],
    *,
    index: bool = False,
    base: Base | None = None,
    replaced: Mapping[str, Path] = NOTHING,
) -> Built:
    """Write each group of files as a layer, and an image of them."""
    created = _created()
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    notes = {**annotations, "org.opencontainers.image.created": created}
    if base:
        base.copy_layers(blobs)
        notes |= base.annotations
    layers = {
        title: write_layer(source, names, blobs, replaced)
        for title, names in groups.items()
        if names
    }
    writer = Writer(blobs, layers, created, notes)
    if index:
        top, parts = writer.index()
    else:
        top, config = writer.image("amd64", base)
        parts = (config, *(base.layers if base else ()), *layers.values(), top)
    _point(layout, top)
    _sweep(blobs, {part.digest for part in parts})
    kept = tuple(part for part in parts if part.media_type not in (MANIFEST, INDEX))
    return Built(top.digest, sum(part.size for part in dict.fromkeys(parts)), kept)


def _created() -> str:
    """The image's creation time: not the clock's, so that the digest is reproducible."""
    text = os.environ.get("SOURCE_DATE_EPOCH") or "0"
    try:
        moment = datetime.fromtimestamp(int(text), UTC)
    except (ValueError, OverflowError, OSError):
        what, change = "is not a time in seconds since 1970", "unset it"
        raise SpecError.at("IMAGE-106", "SOURCE_DATE_EPOCH", what, change) from None
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _check_files(adapter: Path) -> None:
    problems = [
        Problem("IMAGE-101", str(adapter / name), "is missing", "train the adapter again")
        for name in WEIGHTS
        if not (adapter / name).is_file()
    ]
    problems += [
        Problem(
            "IMAGE-102",
            str(path),
            "is not a file of an adapter",
            "remove it from the folder",
        )
        for path in sorted(adapter.iterdir())
        if path.name not in ADAPTER_FILES or path.is_symlink() or not path.is_file()
    ]
    if problems:
        raise SpecError(problems)


def _point(layout: Path, top: Blob) -> None:
    """Make `top` the layout's image."""
    files.write(layout / "oci-layout", files.canonical({"imageLayoutVersion": "1.0.0"}))
    entry = top.to_json() | {"annotations": {REF_NAME_KEY: REF_NAME}}
    if top.media_type == MANIFEST:
        entry["platform"] = {"architecture": "amd64", "os": "linux"}
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]}
    files.write(layout / "index.json", files.canonical(index))


def _sweep(blobs: Path, kept: set[str]) -> None:
    """Remove the blobs of images that the layout no longer points at."""
    names = {digest.removeprefix("sha256:") for digest in kept}
    for path in blobs.iterdir():
        if path.name not in names:
            path.unlink()
