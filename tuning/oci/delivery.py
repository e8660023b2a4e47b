"""Where an adapter is pushed to or pulled from: a registry, a layout folder, a plain folder.

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
from typing import Any

from tuning import adapter as adapters
from tuning import files, presets
from tuning.console import Console, Report
from tuning.errors import RefusedError, SpecError, TransientError, TuningError, UsageError
from tuning.oci import hub_output, provenance, registry
from tuning.oci.access import Access as Access
from tuning.oci.layout.extract import unpack
from tuning.oci.layout.manifest import RUN_ID, layout_of, read_documents, read_layout
from tuning.oci.layout.package import ADAPTER_FILES, Built, build_adapter
from tuning.oci.layout.platforms import Base, base_of
from tuning.oci.policy import Trust
from tuning.oci.registry import Patience, Remote
from tuning.sources import hub
from tuning.spec import Destination, reference

log = logging.getLogger(__name__)

BRIEF = Patience(total=60.0)  # for optional steps
QUICK = Patience(total=10.0)  # while a user waits
# The files of our folders; the first one identifies them.
LAYOUT = ("oci-layout", "index.json", "blobs")
ADAPTER = ("adapter_config.json", *sorted(ADAPTER_FILES))


def check(destination: Destination, access: Access) -> None:
    """Check in seconds that the destination is writable; leaves nothing behind.

    Raises SpecError, RefusedError or TransientError.
    """
    for folder, ours in ((destination.folder, ADAPTER), (destination.layout, LAYOUT)):
        if folder is not None:
            _check_folder(folder, ours)
    if destination.image:
        remote = access.remote(
            destination.image, secret=access.push_secret, push=True, patience=QUICK
        )
        registry.check_push(remote)
    if destination.hub:
        hub_output.check(_repository(destination.hub, access), QUICK)


def _repository(named: tuple[str, str], access: Access) -> hub_output.Repository:
    return hub_output.Repository(*named, token=hub.read_token(access.hub_token_file))


def _check_folder(folder: Path, ours: Collection[str]) -> None:
    """Raise SpecError for a folder that cannot be filled."""
    if folder.exists() and not folder.is_dir():
        raise SpecError.at("REG-102", str(folder), "is not a folder", "name another one")
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        what = f"cannot be written: {nearest} is not a writable folder"
        raise SpecError.at("REG-102", str(folder), what, "name a folder that you may write to")
    here = {path.name for path in folder.iterdir()} - {"lost+found"} if folder.is_dir() else set()
    if here and not here & set(ours):
        what = f"is not empty and has no {next(iter(ours))}"
        raise SpecError.at("REG-103", str(folder), what, "name a new or empty folder")


def claim(
    destination: Destination, access: Access, *, run_id: str | None, own: Collection[str]
) -> str | None:
    """The digest that this very run pushed to the tag already, or None.

    `own`: digests that this run directory pushed before; those and the Workspace's earlier ones may
    be replaced. `run_id` None: not known yet, so an image of any run passes for now. Raises
    RefusedError for a tag, layout or folder with anything else.
    """
    if run_id is not None and destination.on_tag_exists == "refuse":
        _claim_folders(destination, access, run_id, own)
    if destination.hub:
        hub_output.claim(
            _repository(destination.hub, access),
            run_id=run_id,
            own=own,
            on_exists=destination.on_tag_exists,
            patience=QUICK,
        )
    if destination.image is None:
        return None
    remote = access.remote(destination.image, secret=access.push_secret, push=True, patience=QUICK)
    policy = destination.on_tag_exists
    ours = {*own, *destination.earlier}
    held = registry.claim(remote, run_id=run_id, own=ours, on_tag_exists=policy)
    return held.digest if held else None


def _claim_folders(
    destination: Destination, access: Access, run_id: str, own: Collection[str]
) -> None:
    """Raise RefusedError for a layout or folder with an adapter of another run; an unreadable one
    is ignored."""
    held: list[tuple[Path, str, str | None]] = []
    if (layout := destination.layout) and (layout / "index.json").is_file():
        with contextlib.suppress(RefusedError):
            top = read_documents(layout)[-1]
            notes = json.loads(top.data).get("annotations") or {}
            held.append((layout, top.blob.digest, notes.get(RUN_ID)))
    weights = destination.folder / adapters.WEIGHTS if destination.folder else None
    if weights is not None and weights.is_file():
        made_by_run = _made_by(weights.parent)
        held.append((weights.parent, files.digest_file(weights), made_by_run))
    for folder, digest, made_by in held:
        if digest not in own and made_by != run_id:
            what = f"already has the adapter of another run ({made_by or digest})"
            instead = access.replace and f", or {access.replace}"
            change = f"name another folder, or remove this one{instead}"
            raise RefusedError.at("REG-105", str(folder), what, change)


def _made_by(adapter: Path) -> str | None:
    """The run id in an adapter's folder, if any."""
    try:
        run_id = files.read_json(adapter / "tuning.json").get("run_id")
    except (OSError, ValueError, AttributeError):
        return None
    return run_id if isinstance(run_id, str) else None


def package(
    adapter: Path,
    layout: Path,
    *,
    preset: str,
    run_id: str,
    base_model: str,
    annotations: Mapping[str, str],
    destination: Destination,
    access: Access,
) -> Built:
    """Package a finished adapter as an image in `layout`, as `destination` wants it.

    Its config names `base_model` where the folder's may name a path of this machine. A base image
    is pulled from its registry. Raises SpecError, RefusedError or TransientError.
    """
    named = destination.base_image
    with tempfile.TemporaryDirectory(prefix=".base-", dir=layout.parent) as scratch:
        base = fetch_base(named, destination, access, Path(scratch)) if named else None
        config = Path(scratch) / adapters.CONFIG
        adapters.write_config(adapter, config, base_model=base_model)
        return build_adapter(
            adapter,
            layout,
            preset=preset,
            run_id=run_id,
            annotations=annotations,
            index=destination.index,
            base=base,
            replaced={adapters.CONFIG: config},
        )


def fetch_base(name: str, destination: Destination, access: Access, layout: Path) -> Base:
    """The base image `name`, its layers pulled into `layout`."""
    same = destination.image and _registry(name) == _registry(destination.image)
    secret = access.push_secret if same else access.pull_secret
    remote = access.remote(name, secret=secret, push=bool(same))
    digest, image = remote.persist(lambda: registry.resolve(remote))
    access.approve(remote)(digest)
    registry.download(remote, image.blobs, layout)
    return base_of(image, layout, name)


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
    """Put the finished adapter into every destination; returns the references to them.

    With the run directory `run`, a provenance statement is attached to the pushed image; by the
    administrator's policy a failure of that ends the run or is passed to `say`.
    """
    references = []
    if destination.image:
        remote = access.remote(destination.image, secret=access.push_secret, push=True)
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
    if destination.hub:
        with tempfile.TemporaryDirectory(prefix=".hub-", dir=layout.parent) as scratch:
            unpack(read_layout(layout), layout, Path(scratch))
            commit = hub_output.push(
                _repository(destination.hub, access),
                Path(scratch),
                run_id=run_id,
                own=own,
                on_exists=destination.on_tag_exists,
            )
        references.append(commit)
    return references


def _attest(
    remote: Remote, layout: Path, run: Path, trust: Trust, say: Callable[[str], None]
) -> None:
    """Attach the run's provenance to the pushed image, as the policy demands."""
    if trust.provenance == "off":
        return
    if trust.provenance == "warn":
        remote.patience = BRIEF
    digest = read_documents(layout)[-1].blob.digest
    statement = provenance.write(run, digest=digest, name=_repository_of(remote))
    try:
        _attach(remote, layout, statement, provenance.PREDICATE)
    except TuningError as error:
        if trust.provenance == "require":
            raise
        say(f"The image is pushed; its provenance statement is not: {error}")


def deliver_evaluation(
    destination: Destination,
    access: Access,
    *,
    layout: Path,
    adapter: Path,
    run_id: str,
    record: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """Put what was measured (`evaluation.json`) beside the delivered adapter.

    It is attached to a pushed image, unless the policy attaches no statements, and stands in the
    model card of a repository of the hub. A failure is passed to `say`.
    """
    try:
        if destination.image and access.trust.provenance != "off":
            remote = access.remote(destination.image, secret=access.push_secret, push=True)
            remote.patience = BRIEF
            digest = read_documents(layout)[-1].blob.digest
            statement = provenance.evaluation(record, digest=digest, name=_repository_of(remote))
            _attach(remote, layout, statement, provenance.EVALUATION)
        if destination.hub:
            card = (adapter / "README.md").read_text(encoding="utf-8")
            where = _repository(destination.hub, access)
            hub_output.add_results(where, card, record["tasks"], run_id=run_id)
    except (TuningError, OSError, ValueError) as error:
        say(f"The evaluation is in the run directory alone: {error}")


def _repository_of(remote: Remote) -> str:
    return f"{remote.reference.registry}/{remote.reference.repository}"


def _attach(remote: Remote, layout: Path, statement: bytes, predicate: str) -> None:
    registry.attach(
        remote,
        read_documents(layout)[-1].blob,
        statement,
        media_type=provenance.MEDIA_TYPE,
        annotations={provenance.PREDICATE_KEY: predicate},
    )


def copy(source: Path, target: Path, *, ours: str) -> None:
    """Make `target` a copy of the folder `source`, file by file, `ours` last.

    The target may be a mounted volume, so it is filled, not replaced; a reader that sees `ours`
    sees the rest. Each file is read back. Raises SpecError for a folder with other content,
    TransientError for a disk that does not keep what it is given.
    """
    if target.is_dir() and any(target.iterdir()) and not (target / ours).exists():
        others = sorted(p.name for p in target.iterdir() if p.name != "lost+found")
        if others and not set(others) <= {p.name for p in source.iterdir()}:
            what = f"is not empty and has no {ours}"
            raise SpecError.at("REG-103", str(target), what, "name a new or empty folder")
    paths = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    for path in sorted(paths, key=lambda path: path.name in (ours, "index.json")):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        files.copy(source / path, target / path)
        if files.digest_file(target / path, cold=True) != files.digest_file(source / path):
            what = "does not read back as it was written"
            change = "look at the disk, and run the same command again"
            raise TransientError.at("REG-106", str(target / path), what, change)


def pull(
    name: str, target: Path, *, access: Access, console: Console, base: str | None = None
) -> str:
    """Extract the adapter `name` into the new folder `target`; returns its digest.

    It is validated, and must be for the base model `base` (a preset or org/model), if given. Raises
    SpecError, RefusedError or TransientError; then there is no `target`.
    """
    if named_folder(name):
        what, change = "is a folder, which is not pulled", "use it as it is, or name an image"
        raise UsageError.at("REG-107", name, what, change)
    with files.making(target) as folder:
        if name.startswith("oci:"):
            access.approve_folder(name)
            layout, title = layout_of(name)
            image = read_layout(layout, title)
            unpack(image, layout, folder)
            digest = image.digest
        else:
            remote = access.remote(name, secret=access.pull_secret)
            approve = access.approve(remote, partial(console.say, style="yellow"))
            with console.work(f"Pulling {name}", unit="bytes") as report:
                digest = registry.pull(remote, folder, approve=approve, progress=report).digest
        check_base(adapters.inspect(folder, where=name), base)
    return digest


def check_base(adapter: adapters.Adapter, base: str | None) -> None:
    """Raise SpecError for an adapter of another base model than `base` (a preset or org/model).

    A base model that is a folder or an image is not compared by its name: its weights are.
    """
    if base is None or base.startswith("oci:") or Path(base).is_dir():
        return
    preset = presets.find(base)
    if problems := adapters.other_base(adapter, preset.hub_id if preset else base):
        raise SpecError(problems)


@contextmanager
def at_hand(
    name: str | None, *, access: Access, console: Console, base: str | None = None
) -> Iterator[Path | None]:
    """The adapter `name` as a folder while the block runs, checked to be for `base`, if given."""
    if name is None:
        yield None
        return
    if folder := named_folder(name):
        check_base(adapters.inspect(adapter_folder(folder)), base)
        yield folder
        return
    scratch = Path(tempfile.mkdtemp(prefix="tuning-"))
    try:
        pull(name, scratch / "adapter", access=access, console=console, base=base)
        yield scratch / "adapter"
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def named_folder(name: str) -> Path | None:
    """The folder that `name` names, None if it names an image.

    Raises UsageError for a name that is neither: a path, or a word without registry, tag or digest.
    """
    path, (first, slash, _) = Path(name), name.partition("/")
    if os.path.isdir(path):  # noqa: PTH112 (never raises)
        return path
    is_path = first[:1] in ("", ".", "~") or name.endswith("/")
    has_host = slash and ("." in first or first == "localhost")
    if not is_path and (has_host or ":" in name or "@" in name):
        return None
    if is_path or not slash or os.path.isdir(first):  # noqa: PTH112
        what = "is neither a folder here nor an image with a registry or a tag"
        change = "correct the folder's name, or write REGISTRY/REPOSITORY:TAG, or oci:DIR"
        raise UsageError.at("REG-107", name[:200], what, change)
    log.warning("%s is not a folder here; it is taken for an image of Docker Hub.", name)
    return None


def adapter_folder(folder: Path) -> Path:
    """`folder`, if an adapter is in it. Raises UsageError."""
    if (folder / "adapter_config.json").is_file():
        return folder
    hint = f"write oci:{folder}" if (folder / "oci-layout").is_file() else "name another folder"
    raise UsageError.at("REG-104", str(folder), "has no adapter_config.json", hint)
