"""Base weights: resolve, pin, download, cache, verify.

A base model is a repository of the hub, pinned to a commit, or a local folder, pinned to the hash
of its files. Downloads go to the hub's usual cache, which other tools share.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tuning import files
from tuning.console import Report
from tuning.errors import SpecError, TransientError, TuningError
from tuning.network.retry import Patience
from tuning.sources import hub, verify
from tuning.sources.hub_download import Meter, download, stopped
from tuning.sources.local import stored
from tuning.threads import side_by_side

__all__ = [
    "Base",
    "Entry",
    "check",
    "check_room",
    "companion",
    "complete_folder",
    "fetch",
    "fetch_tokenizer",
    "resolve",
    "weights_of",
]

log = logging.getLogger(__name__)

AT_ONCE = 4
ROOM = 1.05  # free disk over what is missing
STALE = 6 * 3600  # seconds after which a partial file belongs to no running download
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """A file of the model that training needs."""

    name: str
    size: int  # bytes
    sha256: str | None = None  # known for a hub's large files and for local ones
    git_id: str | None = None  # of git's blob, known for a hub's small files


@dataclass(frozen=True)
class Base:
    """A pinned base model: the same revision is always the same bytes."""

    name: str  # as the user wrote it
    source: Literal["hub", "folder"]
    hub_id: str | None
    folder: Path | None  # where a local model is, absolute
    revision: str  # a commit of the hub, or "sha256:" and the hash of a folder's names and files
    files: tuple[Entry, ...]
    licence: str | None = None
    gated: bool = False
    total_bytes: int = 0  # of the whole repository
    made_from: str | None = None  # the hub's name of the model that it was quantised from

    @property
    def weights(self) -> str | None:
        """Identity of the weights files whatever lies beside them; None if a hash is not known."""
        return _identity(e.sha256 for e in self.files if e.name.endswith(".safetensors"))

    @property
    def needed_bytes(self) -> int:
        """Bytes of the files that training needs."""
        return sum(entry.size for entry in self.files)

    def to_json(self) -> dict[str, Any]:
        """For the journal; `from_json` reads it."""
        return asdict(self) | {"folder": str(self.folder) if self.folder else None}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Base:
        """The base that `to_json` recorded."""
        entries = tuple(Entry(**entry) for entry in record["files"])
        folder = Path(record["folder"]) if record["folder"] else None
        return cls(**(record | {"files": entries, "folder": folder}))


def weights_of(folder: Path) -> str | None:
    """`Base.weights` of the model in `folder`, from remembered hashes or read for it."""
    names, _ = verify.needed(path.name for path in folder.iterdir())
    paths = [(folder / name).resolve() for name in names if name.endswith(".safetensors")]
    memory = files.cache_folder() / "digests.json"
    return _identity(
        path.name if _SHA256.fullmatch(path.name) else verify.digest(path, memory)
        for path in paths  # the hub's cache names a file by its hash
    )


def _identity(hashes: Iterable[str | None]) -> str | None:
    """Independent of the names and the order of the files."""
    known = list(hashes)
    if not known or None in known:
        return None
    return f"sha256:{files.digest(files.canonical(sorted(map(str, known))))}"


def resolve(
    model: str, *, revision: str | None, token: str | None, cache: Path | None = None
) -> Base:
    """Pin `model`, a folder or `org/model`, at `revision` (None: main, or the folder as it is).

    `token` None falls back to the user's saved login. Without a network a complete copy in the
    cache is used. Raises SpecError, RefusedError or TransientError.
    """
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        with stored(folder):
            return _resolve_folder(model, folder.resolve())
    if not _HUB_ID.fullmatch(model) or ".." in model or model.startswith(("./", "../")):
        what = "is neither a folder nor the name of a model"
        change = "name an existing folder, org/model of the hub, or a preset"
        raise SpecError.at("BASE-100", model[:200], what, change)
    copy = _cached(model, revision, cache)
    try:
        return _resolve_hub(model, revision, token, patient=copy is None)
    except TuningError as error:
        if copy is None and Path(model).parent.is_dir() and Path(model).parent != Path():
            what = f"{error.problems[0].what}; nor is there a folder {model}"
            first = replace(error.problems[0], what=what)
            raise type(error)([first, *error.problems[1:]]) from None
        if copy is None or not isinstance(error, TransientError):
            raise
        log.info("%s: the hub cannot be reached, so the cached copy is used", model)
        return copy


def check(base: Base, *, token: str | None, cache: Path | None = None) -> dict[str, Any]:
    """Check access to the model and that it can be trained, without downloading weights.

    Returns its parsed config.json. Raises SpecError, RefusedError or TransientError.
    """
    if base.folder is not None:
        return verify.verify(base.folder)
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    hub_id = str(base.hub_id)
    where: dict[str, Any] = {"revision": base.revision, "endpoint": hub.endpoint()}
    large = max(base.files, key=lambda entry: entry.size).name
    url = hf_hub_url(hub_id, large, **where)

    if missing(base, cache):  # else the hub will not be needed
        look = partial(get_hf_file_metadata, url, token=token or None, timeout=15)
        hub.ask(look, hub_id, base.revision)
    path = companion(base, "config.json", token=token, cache=cache)
    assert path is not None  # `resolve` refuses a model without
    try:
        config = verify.json_object(path)
    except ValueError as error:
        change = "tell the model's authors"
        raise SpecError.at("BASE-103", f"{hub_id} config.json", str(error), change) from None
    if problems := verify.config_problems(config, name=hub_id, made_from=base.made_from):
        raise verify.at(hub_id, problems)
    return config


def fetch(
    base: Base,
    *,
    cache: Path | None = None,
    token: str | None = None,
    progress: Report = lambda done, total, note: None,
    stop: Callable[[], bool] = lambda: False,
) -> Path:
    """The folder with the complete, verified model; missing files are downloaded.

    `cache` None is the hub's usual cache (HF_HOME). Raises SpecError if the disk is too small or
    the model cannot be trained, RefusedError, TransientError, or
    Stopped when `stop` turns true.
    """
    with stored(base.folder or _cache_folder(cache)):
        return _fetch(base, cache, token, progress, stop)


def _fetch(
    base: Base, cache: Path | None, token: str | None, progress: Report, stop: Callable[[], bool]
) -> Path:
    if base.folder is not None:
        verify.verify(base.folder)
        return base.folder
    folder = _download(base, cache, token, progress, stop)
    verify.verify(folder)
    progress(base.needed_bytes, base.needed_bytes, "")
    return folder


def fetch_tokenizer(
    base: Base,
    *,
    cache: Path | None = None,
    token: str | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Path:
    """The folder with the model's tokenizer, configs and chat template; the weights may be absent.

    Raises as `fetch` does, which does not download these files again.
    """
    if base.folder is not None:
        return base.folder
    light = tuple(entry for entry in base.files if entry.name in verify.COMPANIONS)
    with stored(_cache_folder(cache)):
        return _download(
            replace(base, files=light), cache, token, lambda done, total, note: None, stop
        )


def _download(
    base: Base, cache: Path | None, token: str | None, progress: Report, stop: Callable[[], bool]
) -> Path:
    _sweep(base, cache)
    lacking = missing(base, cache)
    _check_room(base, lacking, _cache_folder(cache))
    meter = Meter(base, base.needed_bytes - sum(e.size for e in lacking), progress, stop)
    memory = _storage(str(base.hub_id), cache) / "tuning-digests.json"
    jobs = [
        partial(download, base, entry, cache=cache, token=token, memory=memory, meter=meter)
        for entry in base.files
    ]
    results = side_by_side(jobs, at_once=AT_ONCE, stop=stop)
    if stop():
        raise stopped(base)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return _snapshot(base, cache)


def missing(base: Base, cache: Path | None) -> list[Entry]:
    """The files of `base` that are not in the cache yet."""
    folder = _snapshot(base, cache)
    return [e for e in base.files if not (folder / e.name).is_file()]


def companion(
    base: Base, name: str, *, token: str | None, cache: Path | None = None
) -> Path | None:
    """The small file `name` of the model, fetched alone; None if it has none.

    Raises as `check` does.
    """
    if name not in {entry.name for entry in base.files}:
        return None
    if base.folder is not None:
        return base.folder / name
    from huggingface_hub import hf_hub_download

    where: dict[str, Any] = {"revision": base.revision, "endpoint": hub.endpoint()}
    hub_id = str(base.hub_id)

    def work() -> Path:
        return Path(hf_hub_download(hub_id, name, cache_dir=cache, token=token or None, **where))

    return hub.ask(work, hub_id, base.revision)


def complete_folder(base: Base, cache: Path | None = None) -> Path | None:
    """The folder with all files of `base`, if they are on this machine."""
    if base.folder is not None:
        return base.folder
    return None if missing(base, cache) else _snapshot(base, cache)


def _resolve_folder(name: str, folder: Path) -> Base:
    verify.verify(folder)
    names, _ = verify.needed(path.name for path in folder.iterdir())
    known = files.cache_folder() / "digests.json"
    entries = tuple(
        Entry(n, (folder / n).stat().st_size, verify.digest(folder / n, known)) for n in names
    )
    identity = files.digest(files.canonical([[entry.name, entry.sha256] for entry in entries]))
    return Base(
        name=name,
        source="folder",
        hub_id=None,
        folder=folder,
        revision=f"sha256:{identity}",
        files=entries,
        total_bytes=sum(entry.size for entry in entries),
    )


def _resolve_hub(hub_id: str, revision: str | None, token: str | None, *, patient: bool) -> Base:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.endpoint(), token=token)

    def work() -> tuple[Any, dict[str, Entry]]:
        info = api.model_info(hub_id, revision=revision, files_metadata=True, timeout=15)
        if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
            raise ValueError("a model without a commit")
        return info, {each.rfilename: entry_of(each) for each in info.siblings or []}

    patience = None if patient else Patience(tries=1)
    info, listing = hub.ask(work, hub_id, revision, patience=patience)
    names, problems = verify.needed(listing)
    if problems:
        raise verify.at(hub_id, problems)
    licence = getattr(info.card_data, "license", None) if info.card_data else None
    return Base(
        name=hub_id,
        source="hub",
        hub_id=hub_id,
        folder=None,
        revision=info.sha,
        files=tuple(listing[name] for name in names),
        licence=licence if isinstance(licence, str) else None,
        gated=bool(info.gated),
        total_bytes=sum(entry.size for entry in listing.values()),
        made_from=_made_from(info.card_data),
    )


def _made_from(card: Any) -> str | None:
    """The one model that a model card says it was made from, unless trained further since."""
    named = getattr(card, "base_model", None)
    named = named[0] if isinstance(named, list) and len(named) == 1 else named
    relation = getattr(card, "base_model_relation", None) or "quantized"
    known = isinstance(named, str) and _HUB_ID.fullmatch(named)
    return named if known and relation == "quantized" else None


def entry_of(sibling: Any) -> Entry:
    """A file of the hub's listing. Raises ValueError for one that is not of the hub's form."""
    name, size, git_id = sibling.rfilename, sibling.size or 0, sibling.blob_id
    sha256 = sibling.lfs.sha256 if sibling.lfs else None
    if not isinstance(name, str) or type(size) is not int or size < 0:
        raise ValueError("a file without name or size")
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise ValueError("a file with an invalid sha256")
    known = isinstance(git_id, str) and _COMMIT.fullmatch(git_id) and sha256 is None
    return Entry(name, size, sha256, git_id if known else None)


def _cached(hub_id: str, revision: str | None, cache: Path | None) -> Base | None:
    """`hub_id` from the cache alone, if it is complete there."""
    storage = _storage(hub_id, cache)
    commit = revision or "main"
    try:
        if not _COMMIT.fullmatch(commit):
            commit = (storage / "refs" / commit).read_text(encoding="utf-8").strip()
        folder = storage / "snapshots" / commit
        names, _ = verify.needed(path.name for path in folder.iterdir())
        verify.verify(folder)
    except (OSError, SpecError):
        return None
    entries = tuple(Entry(name, (folder / name).stat().st_size) for name in names)
    base = Base(hub_id, "hub", hub_id, None, commit, entries)
    return replace(base, total_bytes=base.needed_bytes)


def _cache_folder(cache: Path | None) -> Path:
    if cache is not None:
        return cache.expanduser()
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _storage(hub_id: str, cache: Path | None) -> Path:
    return _cache_folder(cache) / f"models--{hub_id.replace('/', '--')}"


def _snapshot(base: Base, cache: Path | None) -> Path:
    return _storage(str(base.hub_id), cache) / "snapshots" / base.revision


def _sweep(base: Base, cache: Path | None) -> None:
    """Remove partial files of killed downloads: the library gives each try a new name."""
    for path in (_storage(str(base.hub_id), cache) / "blobs").glob("*.incomplete"):
        if time.time() - path.stat().st_mtime > STALE:
            path.unlink(missing_ok=True)


def check_room(base: Base, cache: Path | None) -> None:
    """Raise SpecError if what is missing of `base` is known not to fit the disk of the cache."""
    if base.folder is None:
        _check_room(base, missing(base, cache), _cache_folder(cache))


def _check_room(base: Base, wanted: list[Entry], folder: Path) -> None:
    """Refuse a disk that is known to be too small before anything is written to it."""
    need = int(sum(entry.size for entry in wanted) * ROOM)
    instead = "set HF_HOME to a larger disk"
    files.require_space(folder, need, code="HUB-120", where=base.name, instead=instead)
