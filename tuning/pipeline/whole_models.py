"""`tuning merge`, `export` and `package-model`: whole models to a folder, a layout, a registry."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from tuning import files, pipeline, presets
from tuning.console import Console
from tuning.errors import SpecError, UsageError
from tuning.oci import delivery, model_image
from tuning.oci.delivery import Access
from tuning.sources import base
from tuning.spec import Destination, places, reference


def packaged(
    model: str,
    output: str,
    *,
    revision: str | None,
    overwrite: bool,
    token_file: Path | None,
    access: Access,
    console: Console,
) -> str:
    """Store the base model `model` as an image at `output`; returns the image's reference.

    Raises SpecError, RefusedError or TransientError.
    """
    where = _destination(output, overwrite=overwrite, folders=False)
    delivery.check(where, access)
    token = pipeline.read_token(token_file)
    preset = None if Path(model).is_dir() else presets.find(model)
    hub_id = preset.hub_id if preset else model
    pinned = revision or (preset.revision if preset else None)
    source = base.resolve(hub_id, revision=pinned, token=token)
    with console.work(f"Fetching {source.name}", unit="bytes") as report:
        folder = base.fetch(source, token=token, progress=report)
    notes = {"tuning.kaito.sh/base-revision": source.revision}
    if source.hub_id:
        notes["tuning.kaito.sh/base-model"] = source.hub_id
        notes["org.opencontainers.image.title"] = source.hub_id
    if licence := source.licence or (preset.licence if preset else None):
        notes["org.opencontainers.image.licenses"] = licence
    if preset:
        notes["sh.kaito.model.name"] = preset.name
    return _store(folder, where, output, source.revision, notes, access, console)


def merged(
    model: str,
    adapter: str,
    output: str,
    *,
    method: str | None,
    any_base: bool,
    token_file: Path | None,
    access: Access,
    console: Console,
) -> str:
    """Merge base `model` and `adapter` into one model at `output`; returns its reference.

    Raises SpecError, RefusedError or TransientError.
    """
    where = _destination(output)
    delivery.check(where, access)
    if where.layout and (where.layout / "index.json").exists():
        raise SpecError.at("MODEL-301", output, "already exists", "name a new folder")
    if where.folder:
        files.refuse_taken(where.folder)
    expected = None if any_base else model
    with (
        delivery.at_hand(adapter, access=access, console=console, base=expected) as folder,
        tempfile.TemporaryDirectory(prefix="tuning-merged-") as scratch,
    ):
        assert folder is not None
        weights = pipeline.base_folder(model, token_file=token_file, console=console, access=access)
        from tuning.models import merge  # seconds: torch

        target = where.folder or Path(scratch) / "merged"
        console.say("Merging ...")
        result = merge.merge(weights, folder, target, method=method, any_base=any_base)
        if where.folder is not None:
            return f"dir:{target}"
        stored = base.resolve(str(target), revision=None, token=None)
        notes = {
            "org.opencontainers.image.title": f"{result['base_model']}, tuned",
            "org.opencontainers.image.description": f"a {result['method']} adapter merged into it",
            "tuning.kaito.sh/base-model": str(result["base_model"]),
        }
        return _store(target, where, output, stored.revision, notes, access, console)


def exported(
    model: str,
    adapter: str,
    output: Path,
    *,
    merged: bool,
    with_base: bool,
    method: str | None,
    any_base: bool,
    token_file: Path | None,
    access: Access,
    console: Console,
) -> list[Path]:
    """Write GGUF files of `adapter` on base `model` into the new folder `output`; returns them.

    Raises ModuleNotFoundError without the extra gguf, SpecError, RefusedError or TransientError.
    """
    files.refuse_taken(output)  # before anything is fetched
    from tuning.models.gguf_files import export  # seconds: torch

    expected = None if any_base else model
    with delivery.at_hand(adapter, access=access, console=console, base=expected) as folder:
        assert folder is not None
        weights = pipeline.base_folder(model, token_file=token_file, console=console, access=access)
        console.say("Converting ...")
        return export.export(
            weights,
            folder,
            output,
            merged=merged,
            with_base=with_base,
            method=method,
            any_base=any_base,
        )


def _destination(output: str, *, overwrite: bool = False, folders: bool = True) -> Destination:
    where = places.named_destination(output)
    change = f"write oci:{output} for an image layout"
    if folders:
        change += f", dir:{output} for a folder"
    elif where.folder:
        change = "write oci:DIR or an image reference"
        raise UsageError.at("USE-103", output, "is a folder, not an image", change)
    if where.image or output in ("oci:", "dir:"):
        try:
            reference.parse(output)
        except ValueError as error:
            what = f"is not an image reference: {error}"
            raise UsageError.at("USE-103", output, what, change) from None
    return replace(where, on_tag_exists="overwrite" if overwrite else "refuse")


def _store(
    folder: Path,
    where: Destination,
    output: str,
    identity: str,
    notes: dict[str, str],
    access: Access,
    console: Console,
) -> str:
    digest = model_image.package(
        folder, where, identity=identity, annotations=notes, access=access, console=console
    )
    prefix = "oci://" if where.image else ""
    return f"{prefix}{output.partition('@')[0]}@{digest}"
