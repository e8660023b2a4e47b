"""Where an adapter goes and where it comes from: a registry, a layout folder, a plain folder.

An adapter is named in one of three ways: an image reference, `oci:DIR` (an OCI image layout), or a
folder with `adapter_config.json`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tuning import adapter as adapters
from tuning import credentials, files, image, reference, registry
from tuning.console import Console, Report
from tuning.errors import SpecError, UsageError
from tuning.registry import Patience, Remote
from tuning.spec import Destination

QUICK = Patience(total=10.0)  # for a look that a person waits for


@dataclass(frozen=True)
class Access:
    """How registries are reached from this machine."""

    push_secret: Path | None = None  # dockerconfigjson; docker's own configuration if None
    pull_secret: Path | None = None
    ca: Path | None = None
    insecure: bool = False

    def remote(self, name: str, *, secret: Path | None, patience: Patience | None = None) -> Remote:
        """The repository that `name` names, with the login for it. Raises SpecError."""
        try:
            parsed = reference.parse(name)
        except ValueError as error:
            change = "write REGISTRY/REPOSITORY:TAG"
            raise SpecError.at("REG-101", name, f"is no image reference: {error}", change) from None
        login = credentials.login(parsed.registry, secret=secret, repository=parsed.repository)
        return Remote(parsed, login, self.ca, self.insecure, patience or Patience())

    def pull_data(self, name: str, folder: Path) -> None:
        """Lay the files under /data of a data image down in the empty `folder`."""
        registry.pull(self.remote(name, secret=self.pull_secret), folder, wanted=lambda _: True)


def check(destination: Destination, access: Access) -> None:
    """Whether the adapter may go where it should, in seconds; leaves nothing behind.

    Raises SpecError, RefusedError or TransientError.
    """
    for folder in (destination.folder, destination.layout):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise SpecError.at("REG-102", str(folder), "is no folder", "name another one")
    if destination.image:
        remote = access.remote(destination.image, secret=access.push_secret, patience=QUICK)
        registry.check_push(remote)


def claim(
    destination: Destination, access: Access, *, run_id: str | None, own: Collection[str]
) -> str | None:
    """The digest that this very run left under the tag already, or None.

    `own`: digests that this run directory put out before; with those that the Workspace did, they
    may be replaced. `run_id` None: not known yet, so an image of any run passes for now. Raises
    RefusedError for a tag that holds somebody else's image.
    """
    if destination.image is None:
        return None
    remote = access.remote(destination.image, secret=access.push_secret, patience=QUICK)
    policy = destination.on_tag_exists
    ours = {*own, *destination.earlier}
    found = registry.claim(remote, run_id=run_id, own=ours, on_tag_exists=policy)
    return found.digest if found else None


def deliver(
    destination: Destination,
    access: Access,
    *,
    layout: Path,
    adapter: Path,
    run_id: str,
    own: Collection[str],
    progress: Report,
) -> list[str]:
    """Put the finished adapter everywhere it should be; gives where the image can be had."""
    references = []
    if destination.image:
        remote = access.remote(destination.image, secret=access.push_secret)
        registry.push(
            remote,
            layout,
            run_id=run_id,
            own={*own, *destination.earlier},
            on_tag_exists=destination.on_tag_exists,
            progress=progress,
        )
        references.append(destination.image)
    if destination.layout:
        copy(layout, destination.layout, ours="oci-layout")
        references.append(f"oci:{destination.layout}")
    if destination.folder:
        copy(adapter, destination.folder, ours="adapter_config.json")
    return references


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


def pull(name: str, target: Path, *, access: Access, console: Console) -> str:
    """Lay the adapter that `name` names down in the new folder `target`; gives its digest.

    What came is read as strictly as an adapter is before it is used. Raises SpecError, RefusedError
    or TransientError; then there is no `target`.
    """
    if name.startswith("oci:"):
        layout = Path(name.removeprefix("oci:"))
        found = image.read(layout)
        image.unpack(found, layout, target)
        digest = found.digest
    else:
        remote = access.remote(name, secret=access.pull_secret)
        with console.work(f"Pulling {name}", unit="bytes") as report:
            digest = registry.pull(remote, target, progress=report).digest
    try:
        adapters.inspect(target)
    except Exception:
        shutil.rmtree(target)
        raise
    return digest


@contextmanager
def at_hand(name: str | None, *, access: Access, console: Console) -> Iterator[Path | None]:
    """The adapter that `name` names as a folder, for as long as the block runs."""
    if name is None or (folder := Path(name)).is_dir():
        yield None if name is None else _adapter_folder(folder)
        return
    scratch = Path(tempfile.mkdtemp(prefix="tuning-"))
    try:
        pull(name, scratch / "adapter", access=access, console=console)
        yield scratch / "adapter"
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _adapter_folder(folder: Path) -> Path:
    if (folder / "adapter_config.json").is_file():
        return folder
    hint = f"write oci:{folder}" if (folder / "oci-layout").is_file() else "name another folder"
    raise UsageError.at("REG-104", str(folder), "holds no adapter_config.json", hint)
