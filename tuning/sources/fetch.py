"""URLs, images and folders -> verified local files, in the user's order.

URLs are downloaded concurrently as `0000`, `0001`, ...: a server's name for a file is ignored, and
two URLs that end alike are two files. Local files stay in place. A finished fetch does nothing when
run again; an interrupted one resumes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from urllib3.exceptions import HTTPError

from tuning import files
from tuning.console import Report
from tuning.errors import DataError, Problem, RefusedError, SpecError, TransientError, TuningError
from tuning.network import answer
from tuning.network.answer import NotHttp
from tuning.network.connect import Resolver, lookup
from tuning.network.policy import Headers, Policy, place
from tuning.network.retry import Again, Patience
from tuning.network.session import Response
from tuning.sources import hub, local, stores
from tuning.sources.download import Aborted, Meter, download
from tuning.sources.http import Item, Limits, Web, broken, empty, not_http, validate
from tuning.sources.hub_dataset import Pinned
from tuning.sources.local import File, PullImage
from tuning.sources.stores import Keys
from tuning.spec import Source
from tuning.spec.urls import on_hub
from tuning.threads import side_by_side

log = logging.getLogger(__name__)

SIDE_BY_SIDE = 6
_CHECKSUM = re.compile(r"sha256=([0-9a-fA-F]{64})")


@dataclass(frozen=True)
class Seen:
    """A URL's answer before the download."""

    shown: str
    size: int | None  # bytes, if announced
    head: bytes  # its first bytes, as sent
    url: int | None = None  # the number of the input's URL that named it


def fetch(
    source: Source,
    folder: Path,
    *,
    policy: Policy,
    credentials: Headers | None = None,
    keys: Keys | None = None,
    pinned: Sequence[Pinned] = (),
    pull_image: PullImage | None = None,
    progress: Report = lambda done, total, note: None,
    stop: Callable[[], bool] = lambda: False,
    limits: Limits | None = None,
    resolve: Resolver = lookup,
) -> tuple[File, ...]:
    """The files of `source`: those of its URLs, downloaded into `folder`, then local ones in place.

    `credentials`: headers by host; `keys`: those of object stores; `pinned`: the datasets that the
    URLs name; `pull_image` extracts the files under /data of an OCI image into a folder. Raises
    one error with the problems of all files: SpecError, RefusedError or DataError if any is final,
    otherwise TransientError; Stopped when `stop` turns true.
    """
    here = on_this_machine(source)
    if source.image:
        with local.stored(folder):
            return local.from_image(source, folder, pull_image)
    if not source.urls:
        return here
    items = _items(source, policy, keys, pinned)
    web = Web(policy, credentials or {}, limits or Limits(), resolve)
    with local.stored(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _forget_others(folder, len(items))
    meter = Meter(folder, web.limits, progress, stop)
    return _all_of(items, folder, web, meter, stop) + here


def on_this_machine(source: Source) -> tuple[File, ...]:
    """The files and the folder's files of `source`, hashed in place. Raises as `fetch` does."""
    named = [(path, str(path)) for path in source.files]
    if source.folder is not None:
        with local.stored(source.folder):
            named += local.chosen(local.listed(source.folder), source.folder, source)
    seen: dict[Path, str] = {}
    problems = []
    for number, (path, shown) in enumerate(named):
        if first := seen.get(path.resolve()):
            what = f"is the same file as {first}, so that its rows would count twice"
            problems.append(Problem("FETCH-102", shown, what, "remove one of the two"))
        if number < len(source.files):  # links within a folder are its author's
            seen.setdefault(path.resolve(), shown)
    if problems:
        raise SpecError(problems)
    with local.stored(source.folder or Path()):
        return local.hashed(named)


def stores_of(source: Source, keys: Keys | None) -> tuple[str, ...]:
    """Identify the stores (endpoint, account) of `source`, for cache keys. Not secret.

    Raises SpecError for invalid `keys`.
    """
    places = [stores.of(url.partition("#")[0], keys or Keys()) for url in source.urls]
    return tuple(store.identity for store in places if store)


def check(
    source: Source,
    *,
    policy: Policy,
    credentials: Headers | None = None,
    keys: Keys | None = None,
    pinned: Sequence[Pinned] = (),
    limits: Limits | None = None,
    resolve: Resolver = lookup,
    head: int = 64 << 10,
) -> tuple[Seen, ...]:
    """Access, size and first `head` bytes of every URL; of a dataset only of its first file.

    Raises as `fetch` does, after one try.
    """
    web = Web(policy, credentials or {}, limits or Limits(retry=Patience(tries=1)), resolve)
    seen: list[Seen] = []
    problems: list[TuningError] = []
    items = _items(source, policy, keys, pinned)
    looked = [item for item in items if item.name is None]
    looked += {item.number: item for item in reversed(items) if item.name}.values()
    for item in sorted(looked, key=lambda item: item.index):
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
    first = b""
    try:
        validate(item, response)
        total, length = _announced(response)
        while (
            response.status != 416
            and len(first) < head
            and (piece := response.read1(head - len(first)))
        ):
            first += piece
    except NotHttp as fault:
        raise not_http(item, fault) from None
    except (HTTPError, OSError):
        raise broken(item, len(first), None) from None
    finally:
        response.close()
    if not first and total in (0, None):
        raise empty(item)
    if length is not None and len(first) < min(head, length):
        raise broken(item, len(first), length)
    return Seen(item.shown, total, first, item.number)


def _announced(response: Response) -> tuple[int | None, int | None]:
    """Bytes of the whole file and of this answer's body, if announced. Raises NotHttp."""
    headers = response.headers
    if response.status == 206:
        part = answer.body_range(headers)
        if part.start != 0 or part.end is None:
            raise NotHttp("has another range than the requested one")
        return part.total, part.end
    if response.status == 416:
        of_file = answer.content_range(headers)
        if of_file is not None and of_file.total:
            raise NotHttp("refuses the beginning of the file")
        return 0, None
    answer.is_chunked(headers)
    length = answer.content_length(headers)
    return length, length


def _items(
    source: Source, policy: Policy, keys: Keys | None, pinned: Sequence[Pinned]
) -> list[Item]:
    """The files to fetch, judged by the text of their URLs. Raises SpecError with all problems."""
    items: list[Item] = []
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    for item, fragment in _chosen(source, _expanded(source, keys, pinned)):
        checksum, number = _CHECKSUM.fullmatch(fragment), item.number or 0
        first = seen.setdefault(_same(item.address), number)
        if refusal := policy.refusal(item.address):
            where = f"input.urls[{number}]"  # not the URL: it may contain a secret
            change = "write a public address; --allow-host HOST opens a private one"
            if item.store:  # the URL is fine: the address comes from the keys
                where = f"{item.where} at {place(item.address)[1]}"
                whose = (keys or Keys()).origin
                change = f"correct the address in {whose}, or open it with --allow-host HOST"
            problems.append(Problem("FETCH-101", where, refusal, change))
        elif first != number:
            what = f"is the same as urls[{first}], so that its rows would count twice"
            problems.append(Problem("FETCH-102", item.where, what, "remove one of the two"))
        elif fragment and not checksum:
            what = "ends in a # that is not followed by a checksum"
            change = "write #sha256= and 64 hexadecimal digits, or nothing"
            problems.append(Problem("FETCH-103", item.where, what, change))
        elif policy.require_checksums and not checksum:
            what = "has no checksum, which the policy requires"
            problems.append(Problem("FETCH-105", item.where, what, "add #sha256=<64 digits>"))
        else:
            sha256 = checksum[1].lower() if checksum else item.sha256
            items.append(replace(item, index=len(items), sha256=sha256))
    if problems:
        raise SpecError(problems)
    return items


def _expanded(
    source: Source, keys: Keys | None, pinned: Sequence[Pinned]
) -> Iterator[tuple[Item, str]]:
    """Every file that the URLs name, with what follows a # in its URL."""
    datasets = {each.url: each for each in pinned}
    for number, text in enumerate(source.urls):
        if (dataset := datasets.get(text)) is not None:
            for entry in dataset.files:
                yield (
                    Item(
                        number,
                        dataset.address(entry),
                        sha256=entry.sha256,
                        number=number,
                        name=dataset.shown(entry),
                        size=entry.size or None,  # a mirror may not tell it
                    ),
                    "",
                )
        else:
            url, _, fragment = text.partition("#")
            url = on_hub(url, hub.endpoint()) or url
            yield Item(number, url, store=stores.of(url, keys or Keys()), number=number), fragment


def _chosen(source: Source, files: Iterable[tuple[Item, str]]) -> list[tuple[Item, str]]:
    """Those of `files` that dataset_path selects. Raises SpecError if there is none."""
    listed = list(files)
    if not source.within:
        return listed
    paths = [unquote(item.url.partition("?")[0]) for item, _ in listed]
    for within in local.spellings(source.within):
        if not within:
            return listed
        if any(ended := [path.endswith(f"/{within}") for path in paths]):
            return [each for each, chosen in zip(listed, ended, strict=True) if chosen]
    raise local.no_match(source, [path.rpartition("/")[2] for path in paths])


def _same(url: str) -> str:
    """`url` with scheme, host and port normalised."""
    try:
        scheme, host, port = place(url)
    except ValueError:
        return url
    rest = url.partition("://")[2]
    return f"{scheme}://{host}:{port}{rest[rest.find('/') :] if '/' in rest else '/'}"


def _all_of(
    items: list[Item], folder: Path, web: Web, meter: Meter, stop: Callable[[], bool]
) -> tuple[File, ...]:
    """Download all `items` concurrently; an error of one does not hide those of others."""
    for item in items:
        meter.expect(item.index, item.size)

    def job(item: Item) -> File:
        try:
            return _one(item, folder, web, meter)
        except TransientError:
            raise
        except BaseException:
            meter.failed.set()
            raise

    jobs = [partial(job, item) for item in items]
    outcomes = side_by_side(jobs, at_once=SIDE_BY_SIDE, stop=stop)
    if stop():
        meter.check()
    fetched = [outcome for outcome in outcomes if isinstance(outcome, File)]
    if len(fetched) < len(items):
        raise _together([outcome for outcome in outcomes if not isinstance(outcome, File)])
    return tuple(fetched)


def _one(item: Item, folder: Path, web: Web, meter: Meter) -> File:
    """The finished file of an earlier run, or a new download."""
    target = folder / f"{item.index:04}"
    record = target.with_name(target.name + ".json")
    known = _finished(item, target, record)
    if known is None:
        meter.check()
        record.unlink(missing_ok=True)
        sha256, size = download(item, target, web, meter)
        known = File(target, item.shown, sha256, size, item.number)
        stamp = target.stat().st_mtime_ns
        files.write_json(
            record, {"url": item.key, "sha256": sha256, "size": size, "mtime_ns": stamp}
        )
        log.info("%s: %d bytes, sha256 %s", item.where, size, sha256)
    meter.expect(item.index, known.size)
    meter.have(item.index, known.size)
    return known


def _finished(item: Item, target: Path, record: Path) -> File | None:
    """The file of an earlier run, if it has not changed since."""
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
    return File(target, item.shown, known["sha256"], known["size"], item.number)


def _forget_others(folder: Path, count: int) -> None:
    """Remove the files of an earlier spec with more URLs."""
    for path in folder.iterdir():
        number = path.name[:4]
        if number.isdigit() and int(number) >= count and path.is_file():
            path.unlink()


def _together(errors: list[Any]) -> BaseException:
    """One error with all problems: a bug before a final error before a transient one."""
    expected: list[TuningError] = []
    for error in errors:
        if isinstance(error, OSError):
            expected.append(local.storage_failed(error))
        elif isinstance(error, TuningError):
            expected.append(error)
        elif not isinstance(error, Aborted):
            return error  # type: ignore[no-any-return]
    problems = list(dict.fromkeys(problem for error in expected for problem in error.problems))
    for kind in (SpecError, RefusedError, DataError):
        if any(isinstance(error, kind) for error in expected):
            return kind(problems)
    return type(expected[0])(problems)
