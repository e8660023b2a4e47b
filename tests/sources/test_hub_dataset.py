"""Datasets of the hub by name: which commit, config, splits and files; what is refused, and how."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.data_files import DataFilesDict, get_data_patterns
from fake_hub import FakeHub
from huggingface_hub import constants
from hypothesis import given, settings

from tuning.errors import DataError, RefusedError, SpecError, TransientError
from tuning.network.policy import Policy
from tuning.network.retry import Patience
from tuning.sources import dataset_files, fetch, hub, hub_dataset
from tuning.sources.base import Entry
from tuning.sources.http import Limits
from tuning.sources.hub_dataset import Pinned
from tuning.spec import Source

NAME, URL = "datasets/org/two", "hf://datasets/org/two"
HERE = Policy(allow_hosts={"127.0.0.1", "localhost"})
QUICK = Limits(connect=2, stall=1, retry=Patience(tries=3, first=0.01, longest=0.02))
ROW = b'{"prompt": "a", "completion": "b"}\n'


def card(configs: str) -> bytes:
    return f"---\nlicense: mit\nconfigs:\n{configs}\n---\n# A set\n".encode()


def parquet(rows: int) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["a"] * rows, "completion": ["b"] * rows}), sink)
    return sink.getvalue()


CARD = card(
    "\n".join(
        f"- config_name: {language}\n  data_files:\n"
        + "\n".join(
            f"  - split: {split}\n    path: {language}/{split}-*"
            for split in ("train", "validation", "test")
        )
        for language in ("en", "de")
    )
)
TWO = {"README.md": CARD, ".gitattributes": b"*.parquet lfs"} | {
    f"{language}/{split}-{n:05}-of-00002.parquet": parquet(n + 1 + len(split))
    for language in ("en", "de")
    for split in ("train", "validation", "test")
    for n in range(2)
}


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the machine's: no saved login, no cache, no waiting between tries."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub, "PATIENCE", Patience(first=0.001, tries=3))
    folder = tmp_path_factory.mktemp("hf")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def pin(url: str, **options: Any) -> Pinned:
    return hub_dataset.pin(url, **{"policy": HERE} | options)


def names(pinned: Pinned) -> list[str]:
    return [entry.name for entry in pinned.files]


# -- commit, config and split -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "config", "splits"),
    [
        ("?config=en", "en", ("train",)),
        ("?config=de&split=validation", "de", ("validation",)),
        ("?split=test%2Btrain&config=en", "en", ("test", "train")),
        ("@main/?config=de", "de", ("train",)),
    ],
)
def test_config_and_split_choose_the_files_at_one_commit(
    fake: FakeHub, tmp_path: Path, query: str, config: str, splits: tuple[str, ...]
) -> None:
    """Shards in order, the other splits named in a note, the same after a trip to the journal."""
    commit = fake.add(NAME, TWO)

    found = pin(f"{URL}{query}")

    assert (commit, "org/two", config, splits) == (
        found.revision,
        found.name,
        found.config,
        found.splits,
    )
    assert names(found) == [
        f"{config}/{split}-{n:05}-of-00002.parquet" for split in splits for n in range(2)
    ]
    assert {"train", "validation", "test"} == {*found.splits, *found.others}
    assert ", ".join(found.others) in " ".join(found.notes())
    assert f"{len(found.files)} files" in found.notes()[0]
    assert found == Pinned.from_json(found.to_json())


def test_the_files_come_whole_through_our_own_fetcher_and_resume(
    fake: FakeHub, tmp_path: Path
) -> None:
    """Each transfer breaks off once; the hub's sha256 is that of what lies there in the end."""
    fake.add(NAME, TWO)
    fake.cut_at = 300
    url = f"{URL}?config=en"
    pinned = pin(url)

    found = fetch.fetch(
        Source(urls=(url,)), tmp_path / "data", policy=HERE, pinned=[pinned], limits=QUICK
    )

    assert [TWO[name] for name in names(pinned)] == [file.path.read_bytes() for file in found]
    assert [hashlib.sha256(TWO[name]).hexdigest() for name in names(pinned)] == [
        file.sha256 for file in found
    ]
    assert f"{URL}/en/train-00000-of-00002.parquet" == found[0].shown


def test_datasets_and_single_urls_are_one_list(fake: FakeHub, tmp_path: Path) -> None:
    """Two configs and a file of a third place are read in the order of the spec."""
    fake.add(NAME, TWO)
    fake.add("datasets/org/own", {"rows.jsonl": ROW})
    source = Source(
        urls=(f"{URL}?config=de", "hf://datasets/org/own/rows.jsonl", f"{URL}?config=en")
    )
    pinned = [pin(url) for url in hub_dataset.named(source)]

    found = fetch.fetch(source, tmp_path / "data", policy=HERE, pinned=pinned, limits=QUICK)

    assert ["0000", "0001", "0002", "0003", "0004"] == [file.path.name for file in found]
    assert ["de", "de", "rows.jsonl", "en", "en"] == [
        file.shown.removeprefix(f"{URL}/").partition("/")[0].rpartition("/")[2]
        if URL in file.shown
        else file.shown.rpartition("/")[2]
        for file in found
    ]


def test_a_hub_that_lists_no_sizes_is_no_fault(fake: FakeHub, tmp_path: Path) -> None:
    """A mirror may list names alone."""
    fake.add(NAME, {"a.jsonl": ROW, "b.jsonl": ROW * 2})
    pinned = pin(URL)
    unknown = replace(pinned, files=tuple(Entry(entry.name, 0) for entry in pinned.files))

    found = fetch.fetch(Source(urls=(URL,)), tmp_path, policy=HERE, pinned=[unknown], limits=QUICK)

    assert [len(ROW), 2 * len(ROW)] == [file.size for file in found]


def test_a_dataset_named_twice_is_refused(fake: FakeHub, tmp_path: Path) -> None:
    """Its rows would count twice, whatever the two URLs look like."""
    fake.add(NAME, TWO)
    source = Source(urls=(f"{URL}?config=en", f"{URL}@main?config=en&split=train"))
    pinned = [pin(url) for url in source.urls]

    with pytest.raises(SpecError, match=r"FETCH-102 .*is the same as urls\[0\]"):
        fetch.fetch(source, tmp_path / "data", policy=HERE, pinned=pinned)


@pytest.mark.parametrize(
    ("content", "data"),
    [
        ({"train.csv": b"prompt,completion\na,b\n", "test.csv": b"x"}, ["train.csv"]),
        ({"data/train/a.jsonl": ROW, "data/train/b.jsonl": ROW, "data/dev/c.jsonl": ROW},
         ["data/train/a.jsonl", "data/train/b.jsonl"]),
        ({"rows.json": b"[]", "README.md": b"# no metadata", "dataset_infos.json": b"{}"},
         ["rows.json"]),
        ({"a.jsonl.gz": b"x", "LICENSE": b"x", "picture.png": b"x", "b.jsonl.zst": b"x"},
         ["a.jsonl.gz", "b.jsonl.zst"]),
        ({"train/data-00000-of-00001.arrow": b"x", "train/state.json": b"{}",
          "train/dataset_info.json": b"{}", "dataset_dict.json": b"{}"},
         ["train/data-00000-of-00001.arrow"]),
        ({"README.md": card("- config_name: default\n  data_dir: b"), "a/x.jsonl": ROW,
          "b/train.jsonl": ROW, "b/test.jsonl": ROW}, ["b/train.jsonl"]),
        ({"README.md": card("- config_name: one\n  data_files: a/*.jsonl\n"
                            "- config_name: two\n  default: true\n  data_files: [b.jsonl]"),
          "a/x.jsonl": ROW, "b.jsonl": ROW}, ["b.jsonl"]),
        ({".huggingface.yaml": b"configs:\n- config_name: c\n  data_files: b.jsonl",
          "README.md": card("- config_name: c\n  data_files: a.jsonl"),
          "a.jsonl": ROW, "b.jsonl": ROW}, ["b.jsonl"]),
        ({"README.md": card("- config_name: 2024\n  data_files: a/*"), "a/x.jsonl": ROW,
          "a/empty.jsonl": b""}, ["a/x.jsonl"]),
        ({"name.py": b"raise SystemExit", "train.jsonl": ROW}, ["train.jsonl"]),
    ],
)  # fmt: skip
def test_without_a_choice_the_default_config_and_train_are_read(
    fake: FakeHub, tmp_path: Path, content: dict[str, bytes], data: list[str]
) -> None:
    """By the card's metadata, or by the names of files and folders; no code is asked for."""
    fake.add(NAME, content)

    assert data == names(pin(URL))
    assert not [path for path in fake.downloads() if path.endswith(".py")]


def test_the_hubs_own_copy_in_parquet_has_its_configs_by_folder(
    fake: FakeHub, tmp_path: Path
) -> None:
    """What a set with a loader script is told to use works, with a / or with %2F."""
    content = {f"{c}/{s}/0000.parquet": parquet(1) for c in "ab" for s in ("train", "test")}
    fake.add(NAME, content, branch="refs/convert/parquet")

    for revision in ("refs/convert/parquet", "refs%2Fconvert%2Fparquet"):
        found = pin(f"{URL}@{revision}?config=b")
        assert ["b/train/0000.parquet"] == names(found)
    with pytest.raises(SpecError, match=r"HUB-121 .*no default one: a, b"):
        pin(f"{URL}@refs/convert/parquet")


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("", "HUB-121 .*several configs and no default one: en, de"),
        ("?config=fr", "HUB-121 .*no config fr; it has: en, de"),
        ("?config=en&split=dev", "HUB-122 .*no split dev; it has: train, validation, test"),
        ("?config=de&split=train%2Bvalid", "HUB-122 .*no split valid;"),
        ("@v9?config=en", "HUB-103 .*no revision v9"),
    ],
)
def test_a_choice_that_is_missing_or_wrong_is_told_the_names(
    fake: FakeHub, tmp_path: Path, query: str, words: str
) -> None:
    fake.add(NAME, TWO)

    with pytest.raises((SpecError, RefusedError), match=words):
        pin(f"{URL}{query}")
    assert not [path for path in fake.downloads() if path.endswith(".parquet")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"two.py": b"raise SystemExit", "README.md": b"#"}, r"HUB-123 .*loader script \(two.py\)"),
        ({"data.zip": b"PK", "README.md": b"#"}, "HUB-123 .*no data file .*but: md, zip"),
        ({"a.png": b"x", "b.png": b"x"}, "HUB-123 .*no data file"),
        ({"a.txt": b"x"}, "HUB-123 .*no data file .*txt"),
        ({}, "HUB-123 .*but: none"),
        ({"train_sft.jsonl": ROW, "README.md": card(
            "- config_name: d\n  data_files:\n  - split: train_sft\n    path: train_sft.jsonl")},
         "HUB-122 .*no split train; it has: train_sft"),
        ({"a.jsonl": ROW, "README.md": card("- config_name: d\n  data_files: b.jsonl")},
         "HUB-124 .*names b.jsonl, which is not there"),
        ({"a.jsonl": ROW, "README.md": card(
            "- config_name: d\n  data_files: https://evil.example/a.jsonl")},
         "HUB-124 .*not in the repository"),
        ({"a.jsonl": ROW, "README.md": card("  nonsense: [")}, "HUB-124 .*not YAML"),
        ({"a.jsonl": ROW, "README.md": card("- 7")}, "HUB-124 .*not a list of configs"),
        ({"a.jsonl": ROW, "README.md": card("- data_files: a.jsonl")}, "HUB-124 .*config_name"),
        ({"a.jsonl": ROW, "README.md": card("- config_name: d\n  data_files: {a: 1}")}, "HUB-124"),
        ({"a.jsonl": ROW, "README.md": card(
            "- config_name: default\n- config_name: b\n  default: true")}, "HUB-124 .*default"),
        ({"a.jsonl": ROW, "README.md": card("- config_name: d\n  data_files: 'a**b'")}, "HUB-124"),
    ],
)  # fmt: skip
def test_a_set_that_cannot_be_read_says_why(
    fake: FakeHub, tmp_path: Path, content: dict[str, bytes], words: str
) -> None:
    """No remote code, no archives, no places elsewhere, no traceback for any metadata."""
    fake.add(NAME, content)

    with pytest.raises(SpecError, match=words):
        pin(URL)


def test_a_gated_set_is_refused_with_its_page_and_opened_by_the_token(
    fake: FakeHub, tmp_path: Path
) -> None:
    """Its files are listed to everybody; the token goes to the hub alone, not to its CDN."""
    fake.add(NAME, TWO | {"en/small.jsonl": ROW}, gated=True)
    url = f"{URL}?config=en"
    source = Source(urls=(url, f"{URL}/en/small.jsonl"))

    for token in (None, fake.outsider):
        with pytest.raises(RefusedError, match=f"HUB-101 .*licence at {fake.url}/{NAME}, "):
            pin(url, token=token)
    pinned = [pin(url, token=fake.token)]
    fake.requests.clear()
    headers = hub_dataset.headers(source, fake.token, None)
    fetch.fetch(source, tmp_path, policy=HERE, credentials=headers, pinned=pinned, limits=QUICK)

    asked = {path.startswith("/cdn/"): token for _, path, token in fake.requests}
    assert {True: None, False: fake.token} == asked


def test_one_file_of_a_gated_set_is_refused_with_its_page_too(
    fake: FakeHub, tmp_path: Path
) -> None:
    """A token that is not on the list is refused in the same words."""
    fake.add(NAME, TWO, gated=True)
    source = Source(urls=(f"{URL}/en/train-00000-of-00002.parquet",))

    for token in (None, fake.outsider):
        headers = hub_dataset.headers(source, token, None)
        with pytest.raises(RefusedError, match=f"FETCH-111 .*access at {fake.url}/{NAME}, then"):
            fetch.check(source, policy=HERE, credentials=headers, limits=QUICK)


def test_a_private_a_missing_and_an_unreachable_set_are_told_apart(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add(NAME, TWO, private=True)

    with pytest.raises(RefusedError, match=r"HUB-102 .*such dataset at .*a private dataset needs"):
        pin(URL)
    with pytest.raises(RefusedError, match="HUB-102"):
        pin("hf://datasets/org/none", token=fake.token)
    assert "en" == pin(f"{URL}?config=en", token=fake.token).config
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TransientError, match=r"HUB-112 .*cannot reach"):
        pin(URL)


def test_the_policy_is_obeyed_before_anything_is_asked(fake: FakeHub, tmp_path: Path) -> None:
    """A private HF_ENDPOINT is opened like any host; a set has no checksums of its user's."""
    fake.add(NAME, TWO)

    with pytest.raises(SpecError, match=r"FETCH-101 .*--allow-host"):
        pin(URL, policy=Policy())
    strict = Policy(allow_hosts={"127.0.0.1"}, require_checksums=True)
    with pytest.raises(SpecError, match=r"FETCH-105 .*one by one"):
        pin(URL, policy=strict)
    assert [] == fake.requests


def test_an_answer_that_is_no_hubs_is_an_error_of_ours(fake: FakeHub, tmp_path: Path) -> None:
    fake.add(NAME, TWO)
    fake.broken = lambda path, count: 200 if "/api/" in path else None

    with pytest.raises(TransientError, match="HUB-116"):
        pin(URL)


def test_a_file_that_is_not_what_the_hub_lists_is_refused(fake: FakeHub, tmp_path: Path) -> None:
    """By size or sha256, for a mirror may be damaged."""
    fake.add(NAME, TWO | {"small.jsonl": ROW})
    url = f"{URL}?config=en"
    pinned = pin(url)
    fake.repositories[NAME].files = {name: data + b"x" for name, data in TWO.items()}

    lying = replace(pinned, files=tuple(replace(e, sha256=None) for e in pinned.files))
    for each in (pinned, lying):
        with pytest.raises(DataError, match="FETCH-121"):
            fetch.fetch(
                Source(urls=(url,)), tmp_path / "d", policy=HERE, pinned=[each], limits=QUICK
            )


# -- the rules of `datasets` --------------------------------------------------------------------

_WORDS = ("train", "training", "test", "dev", "val", "eval", "data", "en", "x", "my-train", ".git")
_LEAVES = ("train-00000-of-00002", "train", "test_0", "rows", "valid.v2", "extra-00000-of-00001")
_PATHS = st.builds(
    lambda folders, leaf, ending: "/".join([*folders, leaf + ending]),
    st.lists(st.sampled_from((*_WORDS, "__cache__")), max_size=2),
    st.sampled_from((*_LEAVES, *_WORDS)),
    st.sampled_from((".jsonl", ".parquet", ".csv", ".md", "")),
)


@settings(max_examples=30, deadline=None)
@given(paths=st.lists(_PATHS, min_size=1, max_size=8, unique=True))
def test_splits_are_found_by_names_as_datasets_finds_them(
    tmp_path_factory: pytest.TempPathFactory, paths: list[str]
) -> None:
    """The same splits of the same files as `datasets` finds in a folder of the same names."""
    folder = tmp_path_factory.mktemp("set")
    present = []
    for path in paths:
        target = folder / path
        if any(each.is_file() for each in target.parents) or target.is_dir():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"")
        present.append(path)
    try:
        theirs = DataFilesDict.from_patterns(get_data_patterns(str(folder)), str(folder))
    except (FileNotFoundError, ValueError):
        theirs = DataFilesDict()
    expected = {
        split: sorted({Path(each).relative_to(folder).as_posix() for each in each_split})
        for split, each_split in theirs.items()
    }

    try:
        ours = dataset_files.splits(dataset_files.Config(), present)
    except dataset_files.Invalid:
        ours = {}

    assert {split: each for split, each in expected.items() if each} == {
        split: sorted(each) for split, each in ours.items()
    }


@pytest.mark.parametrize(
    "data_files",
    [
        "data/*.jsonl",
        "**/*.csv",
        ["a.csv", "data/b*.jsonl"],
        [{"split": "train", "path": "data/**"}, {"split": "test", "path": ["a.csv"]}],
        "./data/b?.jsonl",
        "data/[ab]*.jsonl",
        ".hidden/*.jsonl",
    ],
)
def test_patterns_of_a_card_mean_what_datasets_reads(tmp_path: Path, data_files: Any) -> None:
    """`*` stays in a folder, `**` does not; hidden files only if they are named."""
    present = ["a.csv", "data/a1.jsonl", "data/b1.jsonl", "data/in/c.jsonl", ".hidden/d.jsonl"]
    for name in present:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    patterns = datasets.data_files.sanitize_patterns(data_files)
    theirs = DataFilesDict.from_patterns(patterns, str(tmp_path))

    ours = dataset_files.splits(dataset_files.Config(data_files), present)

    relative = {s: [str(Path(e).relative_to(tmp_path)) for e in each] for s, each in theirs.items()}
    assert relative == ours


def test_choosing_files_loads_no_torch() -> None:
    """The parent of a run never does."""
    code = (
        "import sys; from tuning.sources import dataset_files as d\n"
        "d.readable(d.splits(d.Config(), ['train.csv'])['train'])\n"
        "sys.exit('torch' in sys.modules)"
    )

    assert 0 == subprocess.run([sys.executable, "-c", code], check=False).returncode
