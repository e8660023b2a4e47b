"""Layers -> images: for amd64, for arm64, as a ModelPack, on a base image.

The layers are the same files everywhere, so an index costs a few kilobytes. A ModelPack (the model
specification of the CNCF) names the same blobs with media types of its own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuning.oci.layout.manifest import (
    CONFIG,
    INDEX,
    LAYER,
    MANIFEST,
    MODEL_NAME,
    Blob,
    Image,
    blob_path,
    parse_json,
    refused,
)
from tuning.oci.layout.write import write_json

MODELPACK = "application/vnd.cncf.model.manifest.v1+json"
_MODEL = "application/vnd.cncf.model."
_MODEL_LAYERS = {"tokenizer": "weight.config", "config": "weight.config", "documents": "doc"}
_OCI_LAYERS = {
    LAYER: LAYER,
    f"{LAYER}+gzip": f"{LAYER}+gzip",
    f"{LAYER}+zstd": f"{LAYER}+zstd",
    "application/vnd.docker.image.rootfs.diff.tar": LAYER,
    "application/vnd.docker.image.rootfs.diff.tar.gzip": f"{LAYER}+gzip",
}
Value = dict[str, Any]


@dataclass(frozen=True)
class Base:
    """An image whose layers come before ours; its blobs are in `layout`."""

    name: str  # the reference, as the user wrote it
    config: Value
    layers: tuple[Blob, ...]
    digest: str
    layout: Path

    @property
    def annotations(self) -> dict[str, str]:
        """Annotations of an image that is based on it."""
        known = "org.opencontainers.image.base"
        return {f"{known}.name": self.name, f"{known}.digest": self.digest}

    def copy_layers(self, blobs: Path) -> None:
        """Link or copy its layers into the blobs of another layout."""
        for layer in self.layers:
            source, target = blob_path(self.layout, layer), blobs / layer.digest[7:]
            if target.exists():
                continue
            try:
                os.link(source, target)
            except OSError:  # another file system
                shutil.copyfile(source, target)


def base_of(image: Image, layout: Path, name: str) -> Base:
    """The image in `layout`, whose blobs are verified, as a base image.

    Raises RefusedError for an image that no runtime would run.
    """
    config = parse_json(blob_path(layout, image.config).read_bytes(), where=name)
    try:
        layers = tuple(
            Blob(_OCI_LAYERS[layer.media_type], layer.digest, layer.size) for layer in image.layers
        )
        fits = len(config["rootfs"]["diff_ids"]) == len(layers)
        platform = config["os"], config["architecture"]
    except (KeyError, TypeError):
        raise refused(f"base image {name}", "is not a container image") from None
    if not fits or platform != ("linux", "amd64"):
        raise refused(f"base image {name}", f"is an image for {'/'.join(map(str, platform))}")
    return Base(name, config, layers, image.digest, layout)


@dataclass(frozen=True)
class Writer:
    """Writes manifests for `layers` (by title) into `blobs`, all with the same annotations."""

    blobs: Path
    layers: Mapping[str, Blob]
    created: str
    notes: Mapping[str, str]

    def image(self, architecture: str, base: Base | None = None) -> tuple[Blob, Blob]:
        """A container image; returns its manifest and its config."""
        under = base.config if base else {}
        inner = under.get("config") or {}
        history = [*(under.get("history") or ())]
        history += [
            {"created": self.created, "created_by": f"tuning: {title}"} for title in self.layers
        ]
        diff_ids = [*(under["rootfs"]["diff_ids"] if base else ())]
        config = {
            "architecture": architecture,
            "os": "linux",
            "created": self.created,
            "config": {**inner, "Labels": {**(inner.get("Labels") or {}), **self.notes}},
            "rootfs": {
                "type": "layers",
                "diff_ids": diff_ids + [layer.digest for layer in self.layers.values()],
            },
            "history": history,
        }
        blob = write_json(config, CONFIG, self.blobs)
        layers = [*(base.layers if base else ()), *self.layers.values()]
        return self._manifest(blob, [layer.to_json() for layer in layers]), blob

    def modelpack(self) -> tuple[Blob, Blob]:
        """The same layers as a CNCF ModelPack; returns its manifest and its config."""
        texts = {
            "name": self.notes.get(MODEL_NAME, ""),
            "title": self.notes.get("org.opencontainers.image.title", ""),
            "description": self.notes.get("org.opencontainers.image.description", ""),
        }
        licence = self.notes.get("org.opencontainers.image.licenses")
        descriptor: Value = {name: text for name, text in texts.items() if text}
        descriptor |= {"createdAt": self.created} | ({"licenses": [licence]} if licence else {})
        config = {
            "descriptor": descriptor,
            "config": {"format": "safetensors"},
            "modelfs": {
                "type": "layers",
                "diffIds": [layer.digest for layer in self.layers.values()],
            },
        }
        blob = write_json(config, f"{_MODEL}config.v1+json", self.blobs)
        layers = [
            layer.to_json()
            | {
                "mediaType": f"{_MODEL}{_MODEL_LAYERS.get(title, 'weight')}.v1.tar",
                "annotations": {"org.cncf.model.filepath": "data"},
            }
            for title, layer in self.layers.items()
        ]
        return self._manifest(blob, layers, artifactType=MODELPACK), blob

    def index(self) -> tuple[Blob, tuple[Blob, ...]]:
        """An index of both platforms and the ModelPack; returns it and all its blobs."""
        images = {architecture: self.image(architecture) for architecture in ("amd64", "arm64")}
        model, config = self.modelpack()
        entries = [
            manifest.to_json() | {"platform": {"architecture": architecture, "os": "linux"}}
            for architecture, (manifest, _) in images.items()
        ]
        unknown = {"architecture": "unknown", "os": "unknown"}
        entries.append(model.to_json() | {"artifactType": MODELPACK, "platform": unknown})
        value = {
            "schemaVersion": 2,
            "mediaType": INDEX,
            "manifests": entries,
            "annotations": dict(self.notes),
        }
        top = write_json(value, INDEX, self.blobs)
        pairs = [part for pair in images.values() for part in pair]
        return top, (*pairs, model, config, *self.layers.values(), top)

    def _manifest(self, config: Blob, layers: list[Value], **more: str) -> Blob:
        value = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            **more,
            "config": config.to_json(),
            "layers": layers,
            "annotations": dict(self.notes),
        }
        return write_json(value, MANIFEST, self.blobs)
