"""URLs, images and folders -> verified local files, in the order the user gave them.

URLs are downloaded side by side under names of our own (`0000`, `0001`, ...): a server's name for a
file decides nothing, and two URLs that end alike are two files. Local files stay where they are. A
fetch that was finished does nothing when it is run again; a broken one goes on where it was.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from urllib3 import BaseHTTPResponse

from tuning import files, process
from tuning.errors import DataError, Problem, RefusedError, SpecError, TransientError, TuningError
from tuning.network.policy import Headers, Policy, Resolver, load_headers, lookup, place
from tuning.sources import hub, stores
from tuning.sources.download import Enough, Meter, Report, download
from tuning.sources.http import Again, Item, Patience, Web, empty, judge
from tuning.sources.stores import Keys, load_keys
from tuning.spec import Source
from tuning.spec.urls import on_hub
from tuning.threads import side_by_side

__all__ = [
    "File",
    "Headers",
    "Keys",
    "Patience",
    "Policy",
    "Seen",
    "check",
    "fetch",
    "load_headers",
    "load_keys",
    "stores_of",
]

log = logging.getLogger(__name__)

PullImage = Callable[[str, Path], object]  # image reference, empty folder for its /data files

SIDE_BY_SIDE = 6
# Companions of data in published folders; whoever means them names them with --data.
_NO_DATA = re.compile(
    r"(readme|license|licence|notice|changelog)(\..*)?|.*\.md"
    r"|(dataset_infos?|dataset_dict|state)\.json",  # of datasets' save_to_disk
    re.IGNORECASE,
)
_CHECKSUM = re.compile(r"sha256=([0-9a-fA-F]{64})")


@dataclass(frozen=True)
class File:
    """One verified file of the data."""

    path: Path
    shown: str  # what messages call it: the URL without its query, or the path as given
    sha256: str
    size: int  # bytes

    def to_json(self) -> dict[str, Any]:
        """For the journal and for requests to child processes; `from_json` is the way back."""
        return {
            "path": str(self.path),
            "shown": self.shown,
            "sha256": self.sha256,
            "size": self.size,
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> File:
        """The file that `to_json` wrote down."""
        return cls(Path(record["path"]), record["shown"], record["sha256"], record["size"])


@dataclass(frozen=True)
class Seen:
    """What a URL answers before it is downloaded."""

    shown: str
    size: int | None  # bytes, if the server says so
    head: bytes  # its first bytes, as sent


def fetch(
    source: Source,
    folder: Path,
    *,
    policy: Policy,
    credentials: Headers | None = None,
    keys: Keys | None = None,
    pull_image: PullImage | None = None,
    progress: Report = lambda done, total, note: None,
    stop: Callable[[], bool] = lambda: False,
    patience: Patience | None = None,
    resolve: Resolver = lookup,
) -> tuple[File, ...]:
    """The files of `source`, downloaded into `folder` or, if they are local, where they are.

    `credentials` holds headers by host, `keys` those of object stores; `pull_image` lays the files
    under /data of an OCI image into a folder. Raises one error with the problems of all files:
    SpecError, RefusedError or DataError if any of them is final, otherwise TransientError; Stopped
    when `stop` turns true.
    """
    if source.files:
        return _hashed([(path, str(path)) for path in source.files])
    if source.folder:
        return _hashed(_chosen(listed(source.folder), source.folder, source))
    if source.image:
        return _from_image(source, folder, pull_image)
    items = _items(_named(source), policy, keys)
    web = Web(policy, credentials or {}, patience or Patience(), resolve)
    folder.mkdir(parents=True, exist_ok=True)
    _forget_others(folder, len(items))
    meter = Meter(folder, web.patience, progress, stop)
    return _all_of(items, folder, web, meter, stop)


def stores_of(source: Source, keys: Keys | None) -> tuple[str, ...]:
    """What tells the stores of `source` from others in which its URLs name other files.

    Raises SpecError for `keys` that cannot be meant.
    """
    found = [stores.of(url.partition("#")[0], keys or Keys()) for url in source.urls]
    return tuple(store.identity for store in found if store)


def check(
    source: Source,
    *,
    policy: Policy,
    credentials: Headers | None = None,
    keys: Keys | None = None,
    patience: Patience | None = None,
    resolve: Resolver = lookup,
    head: int = 64 << 10,
) -> tuple[Seen, ...]:
    """Look at every URL without downloading it: access, size in bytes, first `head` bytes.

    Raises as `fetch` does, after one try.
    """
    web = Web(policy, credentials or {}, patience or Patience(tries=1), resolve)
    seen: list[Seen] = []
    problems: list[TuningError] = []
    for item in _items(_named(source), policy, keys):
        try:
            seen.append(_look(item, web, head))
        except Again as again:
            problems.append(again.final([again.problem]))
        except TuningError as error:
            problems.append(error)
    if problems:
        raise _together(problems)
    return tuple(seen)


def _look(item: Item, web: Web, head: int) -> Seen:
    response = web.get(item, {"Range": f"bytes=0-{head - 1}"})
    try:
        judge(item, response)
        first = b""
        while (
            response.status != 416
            and len(first) < head
            and (piece := response.read1(head - len(first)))
        ):
            first += piece
    finally:
        response.close()
    if not first:
        raise empty(item)
    return Seen(item.shown, _size(response), first)


def _size(response: BaseHTTPResponse) -> int | None:
    """Bytes of the whole file, if the answer says so."""
    of_range = response.headers.get("content-range", "").rpartition("/")[2]
    whole = response.headers.get("content-length", "") if response.status == 200 else of_range
    return int(whole) if whole.isdigit() else None


# -- URLs ---------------------------------------------------------------------------------------


def _named(source: Source) -> tuple[str, ...]:
    """The URLs of `source` that count. Raises SpecError if dataset_path names none of them."""
    if not source.within:
        return source.urls
    paths = {url: unquote(url.partition("#")[0].partition("?")[0]) for url in source.urls}
    for within in _spellings(source.within):
        if not within:
            return source.urls
        if found := tuple(url for url, path in paths.items() if path.endswith(f"/{within}")):
            return found
    else:
        raise _nothing(source, [path.rpartition("/")[2] for path in paths.values()])


def _spellings(within: str) -> tuple[str, ...]:
    """As it is written, and as KAITO means it, where all data lie in a folder `data`."""
    inner = f"{within}/".removeprefix("data/").rstrip("/")
    return (within,) if inner == within else (within, inner)


def _items(urls: tuple[str, ...], policy: Policy, keys: Keys | None) -> list[Item]:
    """The URLs taken apart and judged by their text. Raises SpecError with all problems."""
    items: list[Item] = []
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    for index, text in enumerate(urls):
        url, _, fragment = text.partition("#")
        url = on_hub(url, hub.endpoint()) or url
        checksum = _CHECKSUM.fullmatch(fragment)
        store = stores.of(url, keys or Keys())
        item = Item(index, url, checksum[1].lower() if checksum else None, store)
        first = seen.setdefault(_same(item.address), index)
        if refusal := policy.refusal(item.address):
            where = f"input.urls[{index}]"  # not the URL: who knows what is in it
            change = "write a public address; --allow-host HOST opens a private one"
            if store:  # the URL is fine: the address comes from the keys
                where = f"{item.where} at {place(item.address)[1]}"
                whose = (keys or Keys()).origin
                change = f"correct the address in {whose}, or open it with --allow-host HOST"
            problems.append(Problem("FETCH-101", where, refusal, change))
        elif first != index:
            what = f"is the same as urls[{first}], so that its rows would count twice"
            problems.append(Problem("FETCH-102", item.where, what, "remove one of the two"))
        elif fragment and not checksum:
            what = "ends in a # with something else than a checksum"
            change = "write #sha256= and 64 hexadecimal digits, or nothing"
            problems.append(Problem("FETCH-103", item.where, what, change))
        elif policy.require_checksums and not checksum:
            what = "has no checksum, which the policy asks for"
            problems.append(Problem("FETCH-105", item.where, what, "add #sha256=<64 digits>"))
        else:
            items.append(item)
    if problems:
        raise SpecError(problems)
    return items


def _same(url: str) -> str:
    """`url` with what does not tell two files apart spelled one way."""
    try:
        scheme, host, port = place(url)
    except ValueError:
        return url
    rest = url.partition("://")[2]
    return f"{scheme}://{host}:{port}{rest[rest.find('/') :] if '/' in rest else '/'}"


def _all_of(
    items: list[Item], folder: Path, web: Web, meter: Meter, stop: Callable[[], bool]
) -> tuple[File, ...]:
    """Download all `items` side by side; what one of them raises does not hide the others."""
    for item in items:
        meter.expect(item.index)

    def job(item: Item) -> Callable[[], File]:
        def work() -> File:
            try:
                return _one(item, folder, web, meter)
            except TransientError:
                raise
            except BaseException:
                meter.doomed.set()
                raise

        return work

    outcomes = side_by_side([job(item) for item in items], at_once=SIDE_BY_SIDE, stop=stop)
    if stop():
        meter.look()
    found = [outcome for outcome in outcomes if isinstance(outcome, File)]
    if len(found) < len(items):
        raise _together([outcome for outcome in outcomes if not isinstance(outcome, File)])
    return tuple(found)


def _one(item: Item, folder: Path, web: Web, meter: Meter) -> File:
    """One finished file: the one that is there, or a new one."""
    target = folder / f"{item.index:04}"
    record = target.with_name(target.name + ".json")
    known = _finished(item, target, record)
    if known is None:
        meter.look()
        record.unlink(missing_ok=True)
        sha256, size = download(item, target, web, meter)
        known = File(target, item.shown, sha256, size)
        stamp = target.stat().st_mtime_ns
        files.write_json(
            record, {"url": item.key, "sha256": sha256, "size": size, "mtime_ns": stamp}
        )
        log.info("%s: %d bytes, sha256 %s", item.where, size, sha256)
    meter.expect(item.index, known.size)
    meter.have(item.index, known.size)
    return known


def _finished(item: Item, target: Path, record: Path) -> File | None:
    """The file of an earlier run, if it is still the one that was verified then."""
    try:
        known, stat = files.read_json(record), target.stat()
    except (OSError, ValueError):
        return None
    if known["url"] != item.key or known["size"] != stat.st_size:
        return None
    if item.sha256 not in (None, known["sha256"]):
        return None
    if known["mtime_ns"] != stat.st_mtime_ns and files.digest_file(target) != known["sha256"]:
        return None
    return File(target, item.shown, known["sha256"], known["size"])


def _forget_others(folder: Path, count: int) -> None:
    """Remove what an earlier spec with more URLs left."""
    for path in folder.iterdir():
        number = path.name[:4]
        if number.isdigit() and int(number) >= count and path.is_file():
            path.unlink()


def _together(errors: list[Any]) -> BaseException:
    """One error with all problems; a final one beats a transient one, a bug beats both."""
    known: list[TuningError] = []
    for error in errors:
        full = process.disk_full(error)
        if full is not None:
            known.append(full)
        elif isinstance(error, TuningError):
            known.append(error)
        elif not isinstance(error, Enough):
            return error  # type: ignore[no-any-return]
    problems = list(dict.fromkeys(problem for error in known for problem in error.problems))
    for kind in (SpecError, RefusedError, DataError):
        if any(isinstance(error, kind) for error in known):
            return kind(problems)
    return type(known[0])(problems)


# -- what is local ------------------------------------------------------------------------------


def listed(folder: Path) -> list[tuple[Path, str]]:
    """The data files below `folder`, sorted by name: each its path and what to call it.

    Hidden files and companions such as README.md are left out. Raises DataError if there is
    nothing, or a link that leads out of the folder.
    """
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise DataError.at("FETCH-123", str(folder), what, "name the folder that holds the data")
    root = folder.resolve()
    found, problems = [], []
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        if not path.resolve().is_relative_to(root):
            what = "is a link that leads out of the folder"
            change = "put the file itself there"
            problems.append(Problem("FETCH-125", f"{folder}/{name}", what, change))
        elif not path.is_file():
            log.info("%s: not a regular file, left out", path)
        elif _NO_DATA.fullmatch(path.name):
            log.info("%s: not data by its name, left out", path)
        else:
            found.append((path, f"{folder}/{name}"))
    if problems:
        raise DataError(problems)
    if not found:
        raise DataError.at("FETCH-124", str(folder), "holds no data file", "put the data there")
    return found


def _walk(folder: Path) -> Iterator[Path]:
    """Everything below `folder` that is not hidden and no folder, by name; no link is descended."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith(".") or entry.name == "lost+found":
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
        else:
            yield Path(entry.path)


def _chosen(found: list[tuple[Path, str]], root: Path, source: Source) -> list[tuple[Path, str]]:
    """Those of the files below `root` that dataset_path and dataset_extension mean."""
    names = {path: path.relative_to(root).as_posix() for path, _ in found}
    if source.within:
        for within in _spellings(source.within):
            start = f"{within}/" if within else ""
            if inside := [each for each in found if f"{names[each[0]]}/".startswith(start)]:
                break
        else:
            raise _nothing(source, list(names.values()))
        found = inside
    if source.ending:
        ended = [each for each in found if _ends(names[each[0]], source.ending)]
        found = ended or found  # where none has it, it says what the files are
    return found


def _ends(name: str, ending: str) -> bool:
    name = name.lower()
    for suffix in (".gz", ".gzip", ".zst", ".zstd"):
        name = name.removesuffix(suffix)
    return name.endswith(f".{ending}")


def _nothing(source: Source, names: list[str]) -> SpecError:
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    what = f'names "{source.within}", and no such file or folder is among the data: {shown}'
    change = "name a file or folder that is there, or remove the key"
    return SpecError.at("FETCH-126", "DatasetConfig.dataset_path", what, change)


def _hashed(named: list[tuple[Path, str]]) -> tuple[File, ...]:
    """Local files, hashed where they are. Raises DataError with all problems."""
    found, problems = [], []
    for path, shown in named:
        try:
            size = path.stat().st_size
            if not path.is_file():
                problems.append(Problem("FETCH-123", shown, "is no file", "name a file"))
            elif size == 0:
                problems.append(Problem("FETCH-120", shown, "is empty", "name a file with rows"))
            else:
                found.append(File(path.resolve(), shown, files.digest_file(path), size))
        except OSError as error:
            what = "does not exist" if error.errno == 2 else f"cannot be read: {error.strerror}"
            problems.append(Problem("FETCH-123", shown, what, "check its name and rights"))
    if problems:
        raise DataError(problems)
    return tuple(found)


def _from_image(source: Source, folder: Path, pull_image: PullImage | None) -> tuple[File, ...]:
    """The files under /data of an image, pulled once."""
    reference = str(source.image)
    if pull_image is None:
        raise ValueError("a source that is an image needs pull_image")
    target, record = folder / "image", folder / "image.json"
    known = files.read_json(record) if record.exists() else None
    if not known or known["image"] != reference or not target.is_dir():
        scratch = folder / "image.tmp"
        for old in (scratch, target):
            shutil.rmtree(old, ignore_errors=True)
        record.unlink(missing_ok=True)
        scratch.mkdir(parents=True)
        pull_image(reference, scratch)
        files.replace_folder(scratch, target)
        files.write_json(record, {"image": reference})
    found = [(path, f"{reference}:/data/{path.relative_to(target)}") for path, _ in listed(target)]
    return _hashed(_chosen(found, target, source))
