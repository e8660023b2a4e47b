"""Base weights: resolve, pin, download, cache, verify.

A base model is a repository of the hub, pinned to a commit, or a local folder, pinned to the hash
of its files. Downloads go to the hub's usual cache, which other tools share.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tuning import files
from tuning.errors import SpecError, Stopped, TransientError, TuningError
from tuning.sources import hub
from tuning.sources import verify as weights
from tuning.sources.verify import verify
from tuning.threads import side_by_side

__all__ = ["Base", "Entry", "check", "check_room", "fetch", "fetch_tokenizer", "resolve", "verify"]

log = logging.getLogger(__name__)

Report = Callable[[float, float | None, str], None]  # bytes done, bytes in all, note

AT_ONCE = 4
ROOM = 1.05  # free disk over what is missing
STALE = 6 * 3600  # seconds after which a part of a killed download is rubbish
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_memory_lock = threading.Lock()


@dataclass(frozen=True)
class Entry:
    """A file of the model that training needs."""

    name: str
    size: int  # bytes
    sha256: str | None = None  # known for a hub's large files and for local ones


@dataclass(frozen=True)
class Base:
    """A base model, pinned: the same revision is the same bytes for ever."""

    name: str  # as it was asked for
    source: Literal["hub", "folder"]
    hub_id: str | None
    folder: Path | None  # where a local model is, absolute
    revision: str  # a commit of the hub, or "sha256:" and the hash of a folder's names and files
    files: tuple[Entry, ...]
    licence: str | None = None
    gated: bool = False
    total_bytes: int = 0  # of the whole repository

    @property
    def needed_bytes(self) -> int:
        """Bytes of the files that training needs."""
        return sum(entry.size for entry in self.files)

    def to_json(self) -> dict[str, Any]:
        """For the journal; `from_json` is the way back."""
        return asdict(self) | {"folder": str(self.folder) if self.folder else None}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Base:
        """The base that `to_json` wrote down."""
        entries = tuple(Entry(**entry) for entry in record["files"])
        folder = Path(record["folder"]) if record["folder"] else None
        return cls(**(record | {"files": entries, "folder": folder}))


def resolve(
    model: str, *, revision: str | None, token: str | None, cache: Path | None = None
) -> Base:
    """What `model`, a folder or `org/model`, is at `revision` (None: main, or the folder as it is).

    `token` None falls back to the user's saved login. Without a network, a complete copy in the
    cache serves. Raises SpecError, RefusedError or TransientError.
    """
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        return _resolve_folder(model, folder.resolve())
    if not _HUB_ID.fullmatch(model) or ".." in model or model.startswith(("./", "../")):
        what = "is no folder, and no name of a model"
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
        log.info("%s: the hub cannot be reached, the copy in the cache serves", model)
        return copy


def check(base: Base, *, token: str | None, cache: Path | None = None) -> dict[str, Any]:
    """The model's parsed config.json, if the model may be had and can be trained.

    Asks the hub for access without downloading weights. Raises SpecError, RefusedError or
    TransientError.
    """
    if base.folder is not None:
        return verify(base.folder)
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    hub_id = str(base.hub_id)
    where: dict[str, Any] = {"revision": base.revision, "endpoint": hub.endpoint()}
    large = max(base.files, key=lambda entry: entry.size).name
    url = hf_hub_url(hub_id, large, **where)

    def work() -> Path:
        if missing(base, cache):  # else nothing will be asked of the hub
            get_hf_file_metadata(url, token=token or None, timeout=15)
        return Path(
            hf_hub_download(hub_id, "config.json", cache_dir=cache, token=token or None, **where)
        )

    path = hub.ask(work, hub_id, base.revision)
    try:
        config = weights.json_object(path)
    except ValueError as error:
        change = "tell the model's authors"
        raise SpecError.at("BASE-103", f"{hub_id} config.json", str(error), change) from None
    if problems := weights.config_problems(config):
        raise weights.at(hub_id, problems)
    return config


def fetch(
    base: Base,
    *,
    cache: Path | None = None,
    token: str | None = None,
    progress: Report = lambda done, total, note: None,
    stop: Callable[[], bool] = lambda: False,
) -> Path:
    """The folder with the complete, verified model, downloaded as far as it is not there.

    `cache` None is the hub's usual cache (HF_HOME). Files that are there are not asked for again.
    Raises SpecError if the disk is too small or the model unfit, RefusedError, TransientError, or
    Stopped when `stop` turns true.
    """
    if base.folder is not None:
        verify(base.folder)
        return base.folder
    folder = _download(base, cache, token, progress, stop)
    verify(folder)
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

    Raises as `fetch` does; what was fetched here is not fetched again there.
    """
    if base.folder is not None:
        return base.folder
    light = tuple(entry for entry in base.files if entry.name in weights.COMPANIONS)
    return _download(replace(base, files=light), cache, token, lambda done, total, note: None, stop)


def _download(
    base: Base, cache: Path | None, token: str | None, progress: Report, stop: Callable[[], bool]
) -> Path:
    _sweep(base, cache)
    wanted = missing(base, cache)
    _check_room(base, wanted, _cache_folder(cache))
    meter = _Meter(base, base.needed_bytes - sum(e.size for e in wanted), progress, stop)
    jobs = [_job(base, entry, cache, token, meter) for entry in base.files]
    results = side_by_side(jobs, at_once=AT_ONCE, stop=stop)
    if stop():
        raise _stopped(base)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return _snapshot(base, cache)


def missing(base: Base, cache: Path | None) -> list[Entry]:
    """The files of `base` that are not in the cache yet."""
    folder = _snapshot(base, cache)
    return [e for e in base.files if not (folder / e.name).is_file()]


# -- a folder -----------------------------------------------------------------------------------


def _resolve_folder(name: str, folder: Path) -> Base:
    verify(folder)
    names, _ = weights.needed(path.name for path in folder.iterdir())
    known = files.cache_folder() / "digests.json"
    entries = tuple(
        Entry(n, (folder / n).stat().st_size, _digest(folder / n, known)) for n in names
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


def _digest(path: Path, memory: Path) -> str:
    """The sha256 of `path`, remembered in `memory` for as long as size and time stay the same."""
    path = path.resolve()
    stat = path.stat()
    stamp = [stat.st_size, stat.st_mtime_ns]
    known = _remembered(memory).get(str(path))
    if isinstance(known, list) and known[:2] == stamp:
        return str(known[2])
    sha256 = files.digest_file(path)
    with _memory_lock:
        try:
            memory.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(memory, _remembered(memory) | {str(path): [*stamp, sha256]})
        except OSError as error:  # a read-only home costs time, not the run
            log.info("cannot remember digests in %s: %s", memory, error)
    return sha256


def _remembered(memory: Path) -> dict[str, Any]:
    try:
        value = files.read_json(memory)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


# -- the hub ------------------------------------------------------------------------------------


def _resolve_hub(hub_id: str, revision: str | None, token: str | None, *, patient: bool) -> Base:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.endpoint(), token=token)
    info = hub.ask(
        lambda: api.model_info(hub_id, revision=revision, files_metadata=True, timeout=15),
        hub_id,
        revision,
        tries=hub.TRIES if patient else 1,
    )
    listing = {
        sibling.rfilename: Entry(
            sibling.rfilename, sibling.size or 0, sibling.lfs.sha256 if sibling.lfs else None
        )
        for sibling in info.siblings or []
    }
    names, problems = weights.needed(listing)
    if problems:
        raise weights.at(hub_id, problems)
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
    )


def _cached(hub_id: str, revision: str | None, cache: Path | None) -> Base | None:
    """`hub_id` from the cache alone, if all of it is there."""
    storage = _storage(hub_id, cache)
    commit = revision or "main"
    try:
        if not _COMMIT.fullmatch(commit):
            commit = (storage / "refs" / commit).read_text(encoding="utf-8").strip()
        folder = storage / "snapshots" / commit
        names, _ = weights.needed(path.name for path in folder.iterdir())
        verify(folder)
    except (OSError, SpecError):
        return None
    entries = tuple(Entry(name, (folder / name).stat().st_size) for name in names)
    found = Base(hub_id, "hub", hub_id, None, commit, entries)
    return replace(found, total_bytes=found.needed_bytes)


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
    """Remove parts that killed downloads left: the library gives each try a new name."""
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


def _job(
    base: Base, entry: Entry, cache: Path | None, token: str | None, meter: _Meter
) -> Callable[[], None]:
    """The download of one file, checked against its hash; once more if it came damaged."""
    from huggingface_hub import hf_hub_download

    hub_id = str(base.hub_id)
    memory = _storage(hub_id, cache) / "tuning-digests.json"

    def work() -> Path:
        return Path(
            hf_hub_download(
                hub_id,
                entry.name,
                revision=base.revision,
                cache_dir=cache,
                token=token or None,
                endpoint=hub.endpoint(),
                tqdm_class=meter.bar(),
            )
        )

    def job() -> None:
        for _ in range(2):
            if meter.stop():
                raise _stopped(base)
            path = hub.ask(work, hub_id, base.revision, stop=meter.stop)
            same = entry.sha256 is None or entry.sha256 == _digest(path, memory)
            if same and path.stat().st_size == entry.size:
                return
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        what = "is not what the hub lists: size or sha256 differ"
        change = "run the same command again; it fetches the file anew"
        raise TransientError.at("HUB-115", f"{hub_id} {entry.name}", what, change)

    return job


def _stopped(base: Base) -> Stopped:
    change = "run the same command again; it goes on"
    return Stopped.at("RUN-110", base.name, "stopped while it was fetched", change)


class _Meter:
    """Progress over all files, and the way a stop reaches a download that is under way."""

    def __init__(self, base: Base, done: int, report: Report, stop: Callable[[], bool]) -> None:
        self.base, self.stop = base, stop
        self._done, self._report = done, report
        self._lock = threading.Lock()

    def add(self, count: float) -> None:
        """`count` bytes more. Raises Stopped, out of the library's loop."""
        if self.stop():
            raise _stopped(self.base)
        with self._lock:
            self._done += int(count)
            total = self.base.needed_bytes
            self._report(max(0, min(self._done, total)), total, "")

    def bar(self) -> type:
        """A class that the library takes for a progress bar."""
        from huggingface_hub.utils import tqdm

        add = self.add

        class Bar(tqdm):  # type: ignore[misc]
            def __init__(self, *args: Any, **more: Any) -> None:
                super().__init__(*args, **{**more, "disable": True})

            def update(self, n: float | None = 1) -> None:
                add(n or 0)

            # Bytes on the wire, which compression makes another number; without these two the
            # library would make a second bar for them, and all would count twice.
            def update_transfer(self, n: float | None = 1) -> None:
                pass

            def set_transfer_postfix_str(self, text: str = "", refresh: bool = True) -> None:
                pass

        return Bar
