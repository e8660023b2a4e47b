"""Whole models as OCI images: packaged, pushed, and pulled into a folder that a run can start from.

`oci://REGISTRY/REPOSITORY:TAG` (or `@DIGEST`) and `oci:DIR`, an image layout, name such a model
wherever a base model is named. Its files lie in `/data`, and hard-linked under `/models`, each
weights file in a layer of its own. What comes out is judged like any folder of a stranger's: no
pickles, no code, complete weights.
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
from tuning.oci import layout as image
from tuning.oci.delivery import Access
from tuning.oci.layout import Image
from tuning.oci.registry import Remote
from tuning.sources import verify
from tuning.spec import Destination

PREFIX = "oci:"
PEEK = 4 << 20  # bytes of a layer in which config.json is looked for
LARGEST = 1 << 43  # bytes of a model: 8 TiB
ROOM = 2.05  # free disk over the image's size: its layers, then its files
LARGER = "name a larger disk"
Value = dict[str, Any]


def is_image(name: str) -> bool:
    """Whether a base model's name is that of an image."""
    return name.startswith(PREFIX)


def wanted(name: str) -> bool:
    """Whether a file of a model image comes out of it."""
    known = name in verify.COMPANIONS or name in image.MODEL_DOCUMENTS
    return known or (name.endswith(".safetensors") and "/" not in name)


def local(name: str, *, access: Access, console: Console, cache: Path | None = None) -> str:
    """The folder with the model that `name` names, if it is an image; else `name` as it is.

    What was pulled once is not pulled again: `cache` (None: the user's own) keeps it under the
    image's digest. Raises SpecError, RefusedError or TransientError.
    """
    if not is_image(name):
        return name
    home = cache or files.cache_folder()
    if (layout := _layout(name)) is not None:
        access.approve_folder(name)
        found = image.read(layout)
        folder = _place(home, found.digest)
        if not folder.is_dir():
            _check_room(found, home, name)
            image.unpack(found, layout, folder, wanted=wanted, largest=LARGEST)
        return str(folder)
    remote = _remote(name, access)
    digest, found = remote.persist(lambda: registry.resolve(remote))
    folder = _place(home, digest)
    if folder.is_dir():
        access.approve(remote)(digest)  # the rule may be younger than the copy
        return str(folder)
    _check_room(found, home, name)
    with console.work(f"Pulling {name}", unit="bytes") as report:
        registry.pull(
            remote,
            folder,
            wanted=wanted,
            approve=access.approve(remote),
            largest=LARGEST,
            progress=report,
        )
    return str(folder)


def config(name: str, *, access: Access) -> Value:
    """The config.json of a model image, out of the first megabytes of a layer; no weights move.

    Raises SpecError, RefusedError or TransientError.
    """
    if (layout := _layout(name)) is not None:
        access.approve_folder(name)
        found = image.read(layout)
    else:
        remote = _remote(name, access)
        digest, found = remote.persist(lambda: registry.resolve(remote))
        access.approve(remote)(digest)
    for blob in found.layers:
        if layout is None:
            data = registry.beginning(remote, blob, PEEK)
        else:
            with image.blob_path(layout, blob).open("rb") as file:
                data = file.read(PEEK)
        held = image.peek(io.BytesIO(data), blob, name, ("config.json",))
        if "config.json" in held:
            return image.parse_json(held["config.json"], where=f"{name} config.json")
    what = "holds no config.json under /data"
    change = "name an image that `python -m tuning package-model` made"
    raise SpecError.at("BASE-103", name, what, change)


def _layout(name: str) -> Path | None:
    """The layout folder that `oci:DIR` names; None for `oci://IMAGE`."""
    return None if name.startswith("oci://") else Path(name.removeprefix(PREFIX))


def _remote(name: str, access: Access) -> Remote:
    return access.remote(name.removeprefix("oci://"), secret=access.pull_secret)


def _place(home: Path, digest: str) -> Path:
    return home / "models" / digest.replace(":", "-")


def _check_room(found: Image, home: Path, name: str) -> None:
    need = int(sum(blob.size for blob in found.blobs) * ROOM)
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
    """The model in the folder `model` as an image where `output` says; gives its digest.

    `identity` is what makes it this model: a tag that holds another one is refused, as an adapter's
    is. Raises SpecError, RefusedError or TransientError.
    """
    verify.verify(model)
    notes = {**annotations, image.RUN_ID: identity}
    size = sum(path.stat().st_size for path in model.iterdir() if wanted(path.name))
    delivery.check(output, access)
    delivery.claim(output, access, run_id=identity, own=())
    with tempfile.TemporaryDirectory(prefix="tuning-model-") as scratch:
        layout = output.layout or Path(scratch) / "image"
        files.require_space(layout, size, code="MODEL-310", where=str(model), instead=LARGER)
        layout.mkdir(parents=True, exist_ok=True)
        console.say("Building the image ...")
        built = image.build_model(model, layout, annotations=notes)
        if output.image:
            remote = access.remote(output.image, secret=access.push_secret)
            with console.work("Pushing", unit="bytes") as report:
                registry.push(
                    remote,
                    layout,
                    run_id=identity,
                    on_tag_exists=output.on_tag_exists,
                    progress=report,
                )
    return built.digest
