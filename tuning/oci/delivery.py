"""Where an adapter goes and where it comes from: a registry, a layout folder, a plain folder.

An adapter is named in one of three ways: an image reference, `oci:DIR` (an OCI image layout), or a
folder with `adapter_config.json`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tuning import adapter as adapters
from tuning import files, presets
from tuning.console import Console, Report
from tuning.errors import RefusedError, SpecError, TuningError, UsageError
from tuning.oci import layout as image
from tuning.oci import provenance, registry
from tuning.oci.access import Access as Access
from tuning.oci.policy import Trust
from tuning.oci.registry import Patience, Remote
from tuning.spec import Destination, reference

log = logging.getLogger(__name__)

BRIEF = Patience(total=60.0)  # for what a run can do without
QUICK = Patience(total=10.0)  # for a look that a person waits for
# What a folder of ours holds, the telling one first.
LAYOUT = ("oci-layout", "index.json", "blobs")
ADAPTER = ("adapter_config.json", *sorted(image.ADAPTER_FILES))


def check(destination: Destination, access: Access) -> None:
    """Whether the adapter may go where it should, in seconds; leaves nothing behind.

    Raises SpecError, RefusedError or TransientError.
    """
    for folder, ours in ((destination.folder, ADAPTER), (destination.layout, LAYOUT)):
        if folder is not None:
            _judge_folder(folder, ours)
    if destination.image:
        remote = access.remote(destination.image, secret=access.push_secret, patience=QUICK)
        registry.check_push(remote)


def _judge_folder(folder: Path, ours: Collection[str]) -> None:
    """Raises SpecError for a folder that could not be filled."""
    if folder.exists() and not folder.is_dir():
        raise SpecError.at("REG-102", str(folder), "is no folder", "name another one")
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        what = f"cannot be written: {nearest} is no folder of yours"
        raise SpecError.at("REG-102", str(folder), what, "name a folder that you may write to")
    here = {path.name for path in folder.iterdir()} - {"lost+found"} if folder.is_dir() else set()
    if here and not here & set(ours):
        what = f"is not empty and holds no {next(iter(ours))}"
        raise SpecError.at("REG-103", str(folder), what, "name a new or empty folder")


def claim(
    destination: Destination, access: Access, *, run_id: str | None, own: Collection[str]
) -> str | None:
    """The digest that this very run left under the tag already, or None.

    `own`: digests that this run directory put out before; with those that the Workspace did, they
    may be replaced. `run_id` None: not known yet, so an image of any run passes for now. Raises
    RefusedError for a tag, layout or folder that holds somebody else's.
    """
    if run_id is not None and destination.on_tag_exists == "refuse":
        _claim_folders(destination, run_id, own)
    if destination.image is None:
        return None
    remote = access.remote(destination.image, secret=access.push_secret, patience=QUICK)
    policy = destination.on_tag_exists
    ours = {*own, *destination.earlier}
    found = registry.claim(remote, run_id=run_id, own=ours, on_tag_exists=policy)
    return found.digest if found else None


def _claim_folders(destination: Destination, run_id: str, own: Collection[str]) -> None:
    """Raises RefusedError for a layout or a folder with what neither this run nor its run directory
    made; what nobody can read is no reason."""
    held: list[tuple[Path, str, str | None]] = []
    if (layout := destination.layout) and (layout / "index.json").is_file():
        with contextlib.suppress(RefusedError):
            top = image.documents(layout)[-1]
            notes = json.loads(top.data).get("annotations") or {}
            held.append((layout, top.blob.digest, notes.get(image.RUN_ID)))
    weights = destination.folder / adapters.WEIGHTS if destination.folder else None
    if weights is not None and weights.is_file():
        made = _made_by(weights.parent)
        held.append((weights.parent, files.digest_file(weights), made))
    for folder, digest, made_by in held:
        if digest not in own and made_by != run_id:
            what = f"holds another run's work already ({made_by or digest})"
            change = (
                "name another folder, remove this one, or say that it may be replaced "
                "(annotation tuning.kaito.sh/on-tag-exists: overwrite; package-model --overwrite)"
            )
            raise RefusedError.at("REG-105", str(folder), what, change)


def _made_by(adapter: Path) -> str | None:
    """The run id of an adapter's folder, if it tells one."""
    try:
        found = files.read_json(adapter / "tuning.json").get("run_id")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def package(
    adapter: Path,
    layout: Path,
    *,
    preset: str,
    run_id: str,
    annotations: Mapping[str, str],
    destination: Destination,
    access: Access,
) -> image.Built:
    """The folder of a finished adapter as an image in `layout`, in the form that was asked for.

    A base image comes from its registry. Raises SpecError, RefusedError or TransientError.
    """
    named = destination.base_image
    with tempfile.TemporaryDirectory(prefix=".base-", dir=layout.parent) as scratch:
        base = fetch_base(named, destination, access, Path(scratch)) if named else None
        return image.build(
            adapter,
            layout,
            preset=preset,
            run_id=run_id,
            annotations=annotations,
            index=destination.index,
            base=base,
        )


def fetch_base(name: str, destination: Destination, access: Access, layout: Path) -> image.Base:
    """The image `name`, its layers in `layout`, as one that ours stands on."""
    same = destination.image and _registry(name) == _registry(destination.image)
    remote = access.remote(name, secret=access.push_secret if same else access.pull_secret)
    digest, found = remote.persist(lambda: registry.resolve(remote))
    access.approve(remote)(digest)
    registry.download(remote, found.blobs, layout)
    return image.base_of(found, layout, name)


def _registry(name: str) -> str:
    return reference.parse(name).registry


def deliver(
    destination: Destination,
    access: Access,
    *,
    layout: Path,
    adapter: Path,
    run_id: str,
    own: Collection[str],
    progress: Report,
    run: Path | None = None,
    say: Callable[[str], None] = log.warning,
) -> list[str]:
    """Put the finished adapter everywhere it should be; gives where the image can be had.

    With `run`, its run directory, a provenance statement is attached to what was pushed; the
    administrator's rule says whether trouble with that ends the run, or is told to `say`.
    """
    references = []
    if destination.image:
        remote = access.remote(destination.image, secret=access.push_secret)
        base = destination.base_image
        if base and _registry(base) == _registry(destination.image):
            remote.mount_from = reference.parse(base).repository
        registry.push(
            remote,
            layout,
            run_id=run_id,
            own={*own, *destination.earlier},
            on_tag_exists=destination.on_tag_exists,
            progress=progress,
        )
        references.append(destination.image)
        if run is not None:
            _attest(remote, layout, run, access.trust, say)
    if destination.layout:
        copy(layout, destination.layout, ours="oci-layout")
        references.append(f"oci:{destination.layout}")
    if destination.folder:
        copy(adapter, destination.folder, ours="adapter_config.json")
    return references


def _attest(
    remote: Remote, layout: Path, run: Path, trust: Trust, say: Callable[[str], None]
) -> None:
    """Attach the run's provenance to the pushed image, as far as the rule wants it."""
    if trust.provenance == "off":
        return
    top = image.documents(layout)[-1].blob
    name = f"{remote.reference.registry}/{remote.reference.repository}"
    statement = provenance.write(run, digest=top.digest, name=name)
    if trust.provenance == "warn":
        remote.patience = BRIEF
    try:
        registry.attach(
            remote,
            top,
            statement,
            media_type=provenance.MEDIA_TYPE,
            annotations={provenance.PREDICATE_KEY: provenance.PREDICATE},
        )
    except TuningError as error:
        if trust.provenance == "require":
            raise
        say(f"The image is pushed; its provenance statement is not: {error}")


def copy(source: Path, target: Path, *, ours: str) -> None:
    """Make `target` a copy of the folder `source`, file by file, `ours` last.

    The target may be a mounted volume, so it is filled and not replaced; a reader that sees `ours`
    sees the rest. Raises SpecError for a folder that holds something else.
    """
    if target.is_dir() and any(target.iterdir()) and not (target / ours).exists():
        strangers = sorted(p.name for p in target.iterdir() if p.name != "lost+found")
        if strangers and not set(strangers) <= {p.name for p in source.iterdir()}:
            what = f"is not empty and holds no {ours}"
            raise SpecError.at("REG-103", str(target), what, "name a new or empty folder")
    paths = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    for path in sorted(paths, key=lambda path: path.name in (ours, "index.json")):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        files.copy(source / path, target / path)


def pull(
    name: str, target: Path, *, access: Access, console: Console, base: str | None = None
) -> str:
    """Lay the adapter that `name` names down in the new folder `target`; gives its digest.

    What came is read as strictly as an adapter is before it is used, and must be for the base model
    `base` (a preset or org/model), if that is given. Raises SpecError, RefusedError or
    TransientError; then there is no `target`.
    """
    with files.making(target) as made:
        if name.startswith("oci:"):
            access.approve_folder(name)
            layout = Path(name.removeprefix("oci:"))
            found = image.read(layout)
            image.unpack(found, layout, made)
            digest = found.digest
        else:
            remote = access.remote(name, secret=access.pull_secret)
            approve = access.approve(remote, partial(console.say, style="yellow"))
            with console.work(f"Pulling {name}", unit="bytes") as report:
                digest = registry.pull(remote, made, approve=approve, progress=report).digest
        check_base(adapters.inspect(made), base)
    return digest


def check_base(adapter: adapters.Adapter, base: str | None) -> None:
    """Refuse an adapter that names another base model than `base`: a preset, or org/model.

    Nothing is known of a folder's name. Raises SpecError that names both.
    """
    if base is None or Path(base).is_dir():
        return
    preset = presets.find(base)
    if problems := adapters.other_base(adapter, preset.hub_id if preset else base):
        raise SpecError(problems)


@contextmanager
def at_hand(
    name: str | None, *, access: Access, console: Console, base: str | None = None
) -> Iterator[Path | None]:
    """The adapter that `name` names as a folder, for as long as the block runs.

    It must be for the base model `base`, if that is given and both have names.
    """
    if name is None or (folder := Path(name)).is_dir():
        if name is not None:
            check_base(adapters.inspect(adapter_folder(folder)), base)
        yield None if name is None else folder
        return
    scratch = Path(tempfile.mkdtemp(prefix="tuning-"))
    try:
        pull(name, scratch / "adapter", access=access, console=console, base=base)
        yield scratch / "adapter"
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def adapter_folder(folder: Path) -> Path:
    """`folder`, if an adapter is in it. Raises UsageError."""
    if (folder / "adapter_config.json").is_file():
        return folder
    hint = f"write oci:{folder}" if (folder / "oci-layout").is_file() else "name another folder"
    raise UsageError.at("REG-104", str(folder), "holds no adapter_config.json", hint)
