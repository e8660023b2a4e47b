"""A dataset of the hub by its name -> a commit, a config, and the files of its splits.

The files are then fetched like any URL. No code of the dataset is run.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tuning.errors import SpecError
from tuning.network.policy import Headers, Policy, place
from tuning.network.retry import Patience
from tuning.sources import dataset_files, hub
from tuning.sources.base import Entry, entry_of
from tuning.spec import Source, urls

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHOWN = 12  # names in a message
_CARD_BYTES = 16 << 20


@dataclass(frozen=True)
class Pinned:
    """A dataset at one commit: the same files for ever."""

    url: str  # as the spec names it
    name: str  # org/name, as the hub calls it
    revision: str  # a commit
    config: str
    splits: tuple[str, ...]
    files: tuple[Entry, ...]  # of these splits
    others: tuple[str, ...] = ()  # splits that are left out
    options: tuple[str, ...] = ()  # of the config, for a reader of `datasets`

    def to_json(self) -> dict[str, Any]:
        """For the journal; `from_json` reads it."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Pinned:
        """The dataset that `to_json` recorded."""
        lists = {name: tuple(record[name]) for name in ("splits", "others", "options")}
        entries = tuple(Entry(**entry) for entry in record["files"])
        return cls(**record | lists | {"files": entries})

    @property
    def origin(self) -> dict[str, Any]:
        """What the data is, for the model card."""
        parts = ("name", "revision", "config", "splits")
        return {part: getattr(self, part) for part in parts} | {"splits": list(self.splits)}

    def address(self, entry: Entry) -> str:
        """The URL of a file at the hub."""
        where = f"{hub.endpoint()}/datasets/{self.name}/resolve/{self.revision}"
        return f"{where}/{quote(entry.name, safe='/')}"

    def shown(self, entry: Entry) -> str:
        """A file as messages call it."""
        return f"hf://datasets/{self.name}/{entry.name}"

    def notes(self) -> list[str]:
        """What the user should know of the choice."""
        chosen = f"config {self.config}, split {' and '.join(self.splits)}"
        count = f"{len(self.files):,} file{'s'[: len(self.files) > 1]}"
        found = [f"{self.name} at {self.revision[:12]}: {chosen}, {count}"]
        if self.others:
            found.append(
                f"{self.name}: not trained, as other splits: {', '.join(self.others)} "
                "(train_test_split holds out rows of train; split=NAME in the URL chooses others)"
            )
        if self.options:
            found.append(
                f"{self.name}: its README.md sets {', '.join(self.options)} for the reader of "
                "`datasets`; here the files are read by their content"
            )
        return found


def named(source: Source) -> tuple[str, ...]:
    """The URLs of `source` that name a dataset of the hub."""
    return tuple(url for url in source.urls if urls.dataset(url))


def headers(source: Source, token: str | None, own: Headers | None) -> Headers:
    """`own` headers by host, with the hub's token for the hub if `source` has files of it.

    `token` None is the user's saved login. No other host gets it, nor a redirect's target.
    """
    own = own or {}
    if not any(url.lower().startswith("hf://") for url in source.urls):
        return own
    from huggingface_hub import get_token

    token = token or get_token()
    _, host, port = place(hub.endpoint())
    if not token or host in own or f"{host}:{port}" in own:
        return own
    return {**own, f"{host}:{port}": {"Authorization": f"Bearer {token}"}}


def pin(
    url: str,
    *,
    policy: Policy,
    token: str | None = None,
    patience: Patience | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Pinned:
    """Choose the commit, config and files that `url` names, and check that they may be read.

    Raises SpecError, RefusedError or TransientError.
    """
    wanted = urls.dataset(url)
    assert wanted is not None
    where = f"datasets/{wanted.name}"
    _refuse_by_policy(where, policy)

    def ask(work: Callable[[], Any]) -> Any:
        return hub.ask(work, where, wanted.revision, patience=patience, stop=stop)

    name, commit, listing = ask(lambda: _listing(wanted, token))
    cards = [each for each in (dataset_files.CARD, dataset_files.CONFIGS) if each in listing]
    if large := [each for each in cards if listing[each].size > _CARD_BYTES]:
        raise _unreadable(where, f"{large[0]} is larger than {_CARD_BYTES >> 20} MiB")
    texts = {each: ask(partial(_text, name, commit, each, token)) for each in cards}
    converted = wanted.revision == dataset_files.CONVERTED
    try:
        configs, default = dataset_files.configs(texts, list(listing), converted=converted)
        config = _chosen_config(where, wanted.config or default, configs)
        splits = dataset_files.splits(configs[config], list(listing))
    except dataset_files.Invalid as error:
        raise _unreadable(where, str(error)) from None
    chosen, entries = _chosen_files(where, wanted.splits or ("train",), splits, listing)
    pinned = Pinned(
        url,
        name,
        commit,
        config,
        chosen,
        entries,
        tuple(split for split in splits if split not in chosen),
        configs[config].options,
    )
    ask(lambda: _knock(pinned, token))
    return pinned


def _refuse_by_policy(where: str, policy: Policy) -> None:
    """Before anything is asked: the fetcher would refuse the addresses of the files."""
    if refusal := policy.refusal(f"{hub.endpoint()}/"):
        change = "allow the host of HF_ENDPOINT with --allow-host HOST, or in the policy file"
        raise SpecError.at("FETCH-101", where, refusal, change)
    if policy.require_checksums:
        what = "has no checksum, which the policy requires"
        change = "name its files one by one, each with #sha256=<64 digits>"
        raise SpecError.at("FETCH-105", where, what, change)


def _listing(wanted: urls.Dataset, token: str | None) -> tuple[str, str, Mapping[str, Entry]]:
    """Name and commit of the dataset, and all its files by name."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.endpoint(), token=token)
    info = api.dataset_info(wanted.name, revision=wanted.revision, files_metadata=True, timeout=15)
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise ValueError("a dataset without a commit")
    name = str(info.id)
    if urls.dataset(f"hf://datasets/{name}") != urls.Dataset(name):
        raise ValueError("a dataset without a name")
    return name, info.sha, {each.rfilename: entry_of(each) for each in info.siblings or []}


def _text(name: str, commit: str, file: str, token: str | None) -> str:
    from huggingface_hub import hf_hub_download

    with tempfile.TemporaryDirectory() as folder:  # not the cache, which may be read-only
        path = hf_hub_download(
            name,
            file,
            repo_type="dataset",
            revision=commit,
            token=token or None,
            endpoint=hub.endpoint(),
            local_dir=folder,
        )
        return Path(path).read_text(encoding="utf-8", errors="replace")


def _knock(pinned: Pinned, token: str | None) -> None:
    """Ask for one file's headers: a gated dataset lists its files to everybody."""
    from huggingface_hub import get_hf_file_metadata

    get_hf_file_metadata(pinned.address(pinned.files[0]), token=token or None, timeout=15)


def _chosen_config(where: str, name: str | None, configs: Mapping[str, Any]) -> str:
    if name in configs:
        return str(name)
    change = "add config=NAME after a ? to the URL, with one of these names"
    if name is None:
        what = f"has several configs and no default one: {_names(configs)}"
        raise SpecError.at("HUB-121", where, what, change)
    what = f"has no config {name[:100]}; it has: {_names(configs)}"
    raise SpecError.at("HUB-121", where, what, change)


def _chosen_files(
    where: str,
    wanted: tuple[str, ...],
    splits: Mapping[str, list[str]],
    listing: Mapping[str, Entry],
) -> tuple[tuple[str, ...], tuple[Entry, ...]]:
    """The splits, and their files in order. Raises SpecError."""
    if not any(map(dataset_files.readable, splits.values())):
        raise _no_files(where, list(listing))
    if missing := [name for name in wanted if name not in splits]:
        what = f"has no split {_names(missing)}; it has: {_names(splits)}"
        change = "add split=NAME after a ? to the URL, with one of these names"
        raise SpecError.at("HUB-122", where, what, change)
    files = [file for split in wanted for file in dataset_files.readable(splits[split])]
    if not files:
        raise _no_files(where, [file for split in wanted for file in splits[split]])
    entries = tuple(listing[file] for file in dict.fromkeys(files))
    filled = tuple(entry for entry in entries if entry.size)  # a shard may have no rows
    return wanted, filled or entries


def _names(names: Any) -> str:
    listed = [str(name)[:100] for name in names]
    return ", ".join(listed[:_SHOWN]) + (f", ... ({len(listed)})" if len(listed) > _SHOWN else "")


def _unreadable(where: str, why: str) -> SpecError:
    what = f"its configs cannot be read as `datasets` reads them: {why}"
    change = f"name its files in place of it: hf://{where}/FILE"
    return SpecError.at("HUB-124", where, what, change)


def _no_files(where: str, names: list[str]) -> SpecError:
    scripts = [name for name in names if name.endswith(".py") and "/" not in name]
    if scripts:
        what = f"has a loader script ({scripts[0]}) and no data files; no code of it is run"
        change = (
            "write @refs/convert/parquet after its name, for the hub's own copy in parquet, if it "
            "has one; or convert it with an older `datasets` and give the files"
        )
        return SpecError.at("HUB-123", where, what, change)
    seen = sorted({name.rpartition(".")[2] for name in names if "." in name.rpartition("/")[2]})
    what = f"has no data file in parquet, arrow, JSON, JSONL or CSV (but: {_names(seen) or 'none'})"
    change = "use another dataset, or convert its files to one of these"
    return SpecError.at("HUB-123", where, what, change)
