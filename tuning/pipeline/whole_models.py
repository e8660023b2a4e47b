"""Whole models: the stories of `merge` and `package-model`, from names to where a model goes."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from tuning import pipeline, presets
from tuning.console import Console
from tuning.errors import SpecError, UsageError
from tuning.oci import delivery, model_image
from tuning.oci.delivery import Access
from tuning.sources import base
from tuning.spec import Destination, reference


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
    """The base model `model` as an image where `output` says; gives what to name it by.

    Raises SpecError, RefusedError or TransientError.
    """
    where = _destination(output, overwrite=overwrite)
    if where.folder is not None:
        raise UsageError.at("USE-103", output, "is no image", "write oci:DIR or an image")
    token = pipeline.read_token(token_file)
    preset = None if Path(model).is_dir() else presets.find(model)
    hub_id = preset.hub_id if preset else model
    wanted = revision or (preset.revision if preset else None)
    found = base.resolve(hub_id, revision=wanted, token=token)
    with console.work(f"Fetching {found.name}", unit="bytes") as report:
        folder = base.fetch(found, token=token, progress=report)
    notes = {"tuning.kaito.sh/base-revision": found.revision}
    if found.hub_id:
        notes["tuning.kaito.sh/base-model"] = found.hub_id
        notes["org.opencontainers.image.title"] = found.hub_id
    if licence := found.licence or (preset.licence if preset else None):
        notes["org.opencontainers.image.licenses"] = licence
    if preset:
        notes["sh.kaito.model.name"] = preset.name
    return _sent(folder, where, output, found.revision, notes, access, console)


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
    """Base `model` and `adapter` as one model where `output` says; gives what to name it by.

    Raises SpecError, RefusedError or TransientError.
    """
    where = _destination(output, overwrite=False)
    delivery.check(where, access)
    if where.layout and (where.layout / "index.json").exists():
        raise SpecError.at("MODEL-301", output, "already exists", "name a new folder")
    wanted = None if any_base else model
    with (
        delivery.at_hand(adapter, access=access, console=console, base=wanted) as folder,
        tempfile.TemporaryDirectory(prefix="tuning-merged-") as scratch,
    ):
        assert folder is not None
        weights = pipeline.base_folder(model, token_file=token_file, console=console, access=access)
        from tuning.models import merge  # seconds: torch

        target = where.folder or Path(scratch) / "merged"
        console.say("Merging ...")
        done = merge.merge(weights, folder, target, method=method)
        if where.folder is not None:
            return f"dir:{target}"
        found = base.resolve(str(target), revision=None, token=None)
        notes = {
            "org.opencontainers.image.title": f"{done['base_model']}, tuned",
            "org.opencontainers.image.description": f"a {done['method']} adapter merged into it",
            "tuning.kaito.sh/base-model": str(done["base_model"]),
        }
        return _sent(target, where, output, found.revision, notes, access, console)


def _destination(output: str, *, overwrite: bool) -> Destination:
    kind, _, rest = output.partition(":")
    if kind in ("oci", "dir") and rest:
        folder = Path(rest)
        found = Destination(layout=folder) if kind == "oci" else Destination(folder=folder)
    else:
        try:
            reference.parse(output)
        except ValueError as error:
            change = f"write dir:{output} for a folder, oci:{output} for an image layout"
            raise UsageError.at("USE-103", output, f"is no image: {error}", change) from None
        found = Destination(image=output)
    return replace(found, on_tag_exists="overwrite" if overwrite else "refuse")


def _sent(
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
