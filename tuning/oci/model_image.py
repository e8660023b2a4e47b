"""Whole models as OCI images: packaged, pushed, and pulled into a folder that a run can start from.

`oci://REGISTRY/REPOSITORY:TAG` (or `@DIGEST`) and `oci:DIR`, an image layout, name such a model
wherever a base model is named. Its files are in `/data`, hard-linked under `/models`, each weights
file in its own layer. A pulled model is untrusted like any folder: no pickles, no code, complete
weights.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuning import files
from tuning.console import Console
from tuning.errors import SpecError
from tuning.oci import delivery, registry
from tuning.oci.delivery import Access
from tuning.oci.layout.extract import unpack
from tuning.oci.layout.layer import peek_layer
from tuning.oci.layout.manifest import (
    RUN_ID,
    Image,
    blob_path,
    layout_of,
    parse_json,
    read_layout,
)
from tuning.oci.layout.package import MODEL_DOCUMENTS, build_model
from tuning.oci.registry import Remote
from tuning.sources import verify
from tuning.spec import Destination

PREFIX = "oci:"
PEEK = 4 << 20  # bytes of a layer that are searched for config.json
LARGEST = 1 << 43  # bytes of a model: 8 TiB
ROOM = 2.05  # free disk over the image's size: its layers, then its files
LARGER = "name a larger disk"
Value = dict[str, Any]


def is_image(name: str) -> bool:
    """Whether a base model's name names an image."""
    return name.startswith(PREFIX)


def wanted(name: str) -> bool:
    """Whether a file of a model image is extracted."""
    known = name in verify.COMPANIONS or name in MODEL_DOCUMENTS
    return known or (name.endswith(".safetensors") and "/" not in name)


def local(name: str, *, access: Access, console: Console, cache: Path | None = None) -> str:
    """The folder with the model if `name` names an image, pulled once; else `name` itself.

    `cache` (None: the user's own) keeps it under the image's digest. Raises SpecError,
    RefusedError or TransientError.
    """
    if not is_image(name):
        return name
    home = cache or files.cache_folder()
    digest, image, place = _open(name, access)
    folder = home / "models" / digest.replace(":", "-")
    if folder.is_dir():
        if isinstance(place, Remote):
            access.approve(place)(digest)  # the policy may be newer than the copy
        return str(folder)
    _check_room(image, home, name)
    if isinstance(place, Path):
        unpack(image, place, folder, wanted=wanted, largest=LARGEST)
        return str(folder)
    with console.work(f"Pulling {name}", unit="bytes") as report:
        registry.pull(
            place,
            folder,
            wanted=wanted,
            approve=access.approve(place),
            largest=LARGEST,
            progress=report,
        )
    return str(folder)


def config(name: str, *, access: Access) -> Value:
    """The config.json of a model image, from the first megabytes of a layer.

    Raises SpecError, RefusedError or TransientError.
    """
    digest, image, place = _open(name, access)
    if isinstance(place, Remote):
        access.approve(place)(digest)
    for blob in image.layers:
        if isinstance(place, Remote):
            data = registry.beginning(place, blob, PEEK)
        else:
            with blob_path(place, blob).open("rb") as file:
                data = file.read(PEEK)
        peeked = peek_layer(io.BytesIO(data), blob, name, ("config.json",))
        if "config.json" in peeked:
            return parse_json(peeked["config.json"], where=f"{name} config.json")
    what = "has no config.json under /data"
    change = "name an image that `python -m tuning package-model` made"
    raise SpecError.at("BASE-103", name, what, change)


def _open(name: str, access: Access) -> tuple[str, Image, Path | Remote]:
    """Digest and manifest of a model image, and its layout or repository."""
    if not name.startswith("oci://"):
        access.approve_folder(name)
        layout, title = layout_of(name)
        image = read_layout(layout, title)
        return image.digest, image, layout
    remote = access.remote(name.removeprefix("oci://"), secret=access.pull_secret)
    return *remote.persist(lambda: registry.resolve(remote)), remote


def _check_room(image: Image, home: Path, name: str) -> None:
    need = int(sum(blob.size for blob in image.blobs) * ROOM)
    files.require_space(home, need, code="MODEL-310", where=name, instead=LARGER)


def package(
    model: Path,
    output: Destination,
    *,
    identity: str,
    annotations: Mapping[str, str],
    access: Access,
    console: Console,
) -> str:
    """Package the model in the folder `model` as an image at `output`; returns its digest.

    `identity` identifies the model, as the run id does an adapter: a tag of another one is refused.
    Raises SpecError, RefusedError or TransientError.
    """
    verify.verify(model)
    notes = {**annotations, RUN_ID: identity}
    size = sum(path.stat().st_size for path in model.iterdir() if wanted(path.name))
    delivery.check(output, access)
    delivery.claim(output, access, run_id=identity, own=())
    with tempfile.TemporaryDirectory(prefix="tuning-model-") as scratch:
        layout = output.layout or Path(scratch) / "image"
        files.require_space(layout, size, code="MODEL-310", where=str(model), instead=LARGER)
        layout.mkdir(parents=True, exist_ok=True)
        console.say("Building the image ...")
        built = build_model(model, layout, annotations=notes)
        if output.image:
            remote = access.remote(output.image, secret=access.push_secret, push=True)
            with console.work("Pushing", unit="bytes") as report:
                registry.push(
                    remote,
                    layout,
                    run_id=identity,
                    on_tag_exists=output.on_tag_exists,
                    progress=report,
                )
    return built.digest
