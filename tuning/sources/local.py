"""Data files that are on this machine: single files, folders, and what images hold under /data."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuning import files
from tuning.errors import DataError, Problem, SpecError, TransientError
from tuning.sources import splits
from tuning.spec import Source

log = logging.getLogger(__name__)

PullImage = Callable[[str, Path], object]  # image reference, empty folder for its /data files

# Files beside data in published folders; --data FILE still reads one.
_COMPANIONS = re.compile(
    r"(readme|license|licence|notice|changelog)(\..*)?|.*\.md"
    r"|(dataset_infos?|dataset_dict|state)\.json",  # of datasets' save_to_disk
    re.IGNORECASE,
)


@dataclass(frozen=True)
class File:
    """One verified file of the data."""

    path: Path
    shown: str  # what messages call it: the URL without its query, or the path as given
    sha256: str
    size: int  # bytes
    url: int | None = None  # the number of the input's URL that named it

    def to_json(self) -> dict[str, Any]:
        """For the journal and for requests to child processes; `from_json` reads it."""
        return asdict(self) | {"path": str(self.path)}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> File:
        """The file that `to_json` recorded."""
        return cls(**record | {"path": Path(record["path"])})


def listed(folder: Path) -> list[tuple[Path, str]]:
    """The data files below `folder`, sorted by name: path and display name of each.

    Hidden files and companions such as README.md are left out. Raises DataError for an empty folder
    or a link that leads out of it.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise DataError.at("FETCH-123", str(folder), what, "name the folder that holds the data")
    root = folder.resolve()
    data, problems = [], []
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        if not path.resolve().is_relative_to(root):
            what = "is a link that leads out of the folder"
            change = "put the file itself there"
            problems.append(Problem("FETCH-125", f"{folder}/{name}", what, change))
        elif not files.is_utf8(name):
            what = "has a name that is not UTF-8"
            problems.append(Problem("FETCH-123", ascii(name)[1:-1], what, "rename it"))
        elif not path.is_file():
            log.info("%s: not a regular file, left out", path)
        elif _COMPANIONS.fullmatch(path.name):
            log.info("%s: not data by its name, left out", path)
        else:
            data.append((path, f"{folder}/{name}"))
    if problems:
        raise DataError(problems)
    if not data:
        raise DataError.at("FETCH-124", str(folder), "holds no data file", "put the data there")
    return data


def _walk(folder: Path) -> Iterator[Path]:
    """The visible files below `folder`, by name; links to folders are not followed."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith(".") or entry.name == "lost+found":
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
        else:
            yield Path(entry.path)


def chosen(
    candidates: list[tuple[Path, str]], root: Path, source: Source
) -> list[tuple[Path, str]]:
    """The files below `root` that dataset_path and dataset_extension select."""
    names = {path: path.relative_to(root).as_posix() for path, _ in candidates}
    candidates = [each for each in candidates if names[each[0]] not in source.apart]
    if source.within:
        for within in spellings(source.within):
            start = f"{within}/" if within else ""
            if inside := [each for each in candidates if f"{names[each[0]]}/".startswith(start)]:
                break
        else:
            raise no_match(source, list(names.values()))
        candidates = inside
    if source.ending:
        ended = [each for each in candidates if _has_ending(names[each[0]], source.ending)]
        candidates = ended or candidates  # where none has it, it says what the files are
    outside = splits.held_out([names[path] for path, _ in candidates])
    return [each for each in candidates if names[each[0]] not in outside]


def split_notes(folder: Path) -> list[str]:
    """A note that names the files below `folder` that are left out as other splits."""
    names = [path.relative_to(folder).as_posix() for path, _ in listed(folder)]
    if not (outside := splits.held_out(names)):
        return []
    shown = ", ".join(outside[:6]) + (", ..." if len(outside) > 6 else "")
    return [
        f"not trained, as other splits by their names: {shown} (train_test_split holds out rows of "
        "train; to train on one of them, name it in DatasetConfig.dataset_path)"
    ]


def copy_notes(verified: Sequence[File]) -> list[str]:
    """A note for each file of the data that has the content of one before it."""
    first: dict[str, File] = {}
    pairs = [(file, first.setdefault(file.sha256, file)) for file in verified]
    return [
        f"{file.shown} has the same content as {before.shown}: its rows count twice"
        for file, before in pairs
        if file is not before
    ]


def _has_ending(name: str, ending: str) -> bool:
    name = name.lower()
    for suffix in (".gz", ".gzip", ".zst", ".zstd"):
        name = name.removesuffix(suffix)
    return name.endswith(f".{ending}")


def no_match(source: Source, names: list[str]) -> SpecError:
    """The error of a dataset_path that selects no file among `names`."""
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    what = f'names "{source.within}", and no such file or folder is among the data: {shown}'
    change = "name a file or folder that is there, or remove the key"
    return SpecError.at("FETCH-126", "DatasetConfig.dataset_path", what, change)


def hashed(named: list[tuple[Path, str]]) -> tuple[File, ...]:
    """Local files, hashed where they are. Raises DataError with all problems."""
    verified, problems = [], []
    for path, shown in named:
        try:
            size = path.stat().st_size
            if not path.is_file():
                problems.append(Problem("FETCH-123", shown, "is not a file", "name a file"))
            elif size == 0:
                problems.append(Problem("FETCH-120", shown, "is empty", "name a file with rows"))
            else:
                verified.append(File(path.resolve(), shown, files.digest_file(path), size))
        except OSError as error:
            if error.errno in (errno.EIO, errno.ESTALE):  # of the disk, not of the file
                raise storage_failed(error, path) from None
            what = "does not exist" if error.errno == 2 else f"cannot be read: {error.strerror}"
            problems.append(Problem("FETCH-123", shown, what, "check its name and rights"))
    if problems:
        raise DataError(problems)
    return tuple(verified)


def from_image(source: Source, folder: Path, pull_image: PullImage | None) -> tuple[File, ...]:
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
    data = [(path, f"{reference}:/data/{path.relative_to(target)}") for path, _ in listed(target)]
    return hashed(chosen(data, target, source))


@contextmanager
def stored(place: Path) -> Iterator[None]:
    """Raise TransientError for a file system below `place` that fails in the block."""
    try:
        yield
    except OSError as error:
        raise storage_failed(error, place) from None


def storage_failed(error: OSError, place: Path | None = None) -> TransientError:
    """The error of a file system that fails: a full disk, a lost mount, a read-only one."""
    where = str(error.filename or place or "the run directory")
    what = f"cannot be read or written ({error.strerror or type(error).__name__})"
    change = "check that disk or mount, then run the same command again; it goes on"
    return files.disk_full(error) or TransientError.at("FETCH-140", where, what, change)


def spellings(within: str) -> tuple[str, ...]:
    """dataset_path as written, and as KAITO reads it: relative to the folder `data`."""
    inner = f"{within}/".removeprefix("data/").rstrip("/")
    return (within,) if inner == within else (within, inner)
