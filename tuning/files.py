"""Files that survive a crash: atomic writes, canonical JSON, hashes.

Every write that matters goes to a temporary name in the same folder, is fsynced, renamed, and the
folder is fsynced, so that after a crash a reader sees the old file or the new one, never a part.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuning.errors import SpecError, TransientError, TuningError

CHUNK = 1 << 20


def canonical(value: Any) -> bytes:
    """`value` as JSON bytes that depend on nothing but the value: sorted keys, no spaces, UTF-8."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def is_utf8(text: str) -> bool:
    """Whether a name or an argument is UTF-8; Python keeps other bytes as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def digest(data: bytes) -> str:
    """The sha256 of `data` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path, *, cold: bool = False) -> str:
    """The sha256 of the file at `path`, read in pieces of 1 MiB.

    `cold` asks the kernel to read from the disk what it still has in memory.
    """
    whole = hashlib.sha256()
    with path.open("rb") as file:
        if cold:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while piece := file.read(CHUNK):
            whole.update(piece)
    return whole.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, where its file system can: SMB and FUSE may refuse."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF):
            raise
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Make the bytes of the file at `path` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _create(path: Path, mode: int) -> int:
    """A new file to write to; nothing is written through a link of that name."""
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)


def write(path: Path, data: bytes | str, *, mode: int = 0o644) -> None:
    """Write `data` to `path`: the whole of it is there afterwards, or nothing has changed."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with os.fdopen(_create(scratch, mode), "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON (sorted keys, two spaces, a final newline), atomically."""
    write(path, json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in the file at `path`."""
    return json.loads(path.read_text(encoding="utf-8"))


def sweep(folder: Path) -> None:
    """Remove from `folder` and below what killed writers left; nobody may be writing there now."""
    for path in folder.rglob(".*.tmp"):
        if path.is_file() and path.name.removesuffix(".tmp").rpartition(".")[2].isdigit():
            path.unlink(missing_ok=True)


def copy(source: Path, target: Path) -> None:
    """Copy the file `source` to `target`, whole or not at all."""
    scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with source.open("rb") as content, os.fdopen(_create(scratch, 0o666), "wb") as file:
            shutil.copyfileobj(content, file, CHUNK)
        sync_file(scratch)
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)
    sync_folder(target.parent)


def replace_folder(scratch: Path, target: Path) -> None:
    """Put the finished folder `scratch` in the place of `target`, which must be empty or absent."""
    for path in sorted(scratch.rglob("*")):
        if path.is_file():
            sync_file(path)
    for path in [*(p for p in scratch.rglob("*") if p.is_dir()), scratch]:
        sync_folder(path)
    scratch.replace(target)
    sync_folder(target.parent)


def cache_folder() -> Path:
    """The user's folder for what takes long to compute or fetch: $XDG_CACHE_HOME/tuning."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tuning"


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of `folder`, which need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def require_space(
    folder: Path,
    need: int,
    *,
    code: str,
    where: str,
    instead: str,
    error: type[TuningError] = SpecError,
) -> None:
    """Raise `error` if `need` bytes do not fit on the disk of `folder`; nothing is written."""
    free = free_bytes(folder)
    if need > free:
        what = f"needs {need:,} bytes in {folder}, where {free:,} are free"
        raise error.at(code, where, what, f"free some space, or {instead}")


_MAKING = ".making-"


def _nothing(name: str) -> bool:
    """Whether an entry of a folder is a volume's own, or left by a process that was killed."""
    return name == "lost+found" or name.startswith(_MAKING)


def refuse_taken(target: Path) -> None:
    """Raise SpecError where a new folder cannot be: at a file, or a folder that holds something."""
    free = not target.exists() or (
        target.is_dir() and all(_nothing(p.name) for p in target.iterdir())
    )
    if not free:
        raise SpecError.at(
            "IMAGE-103", str(target.absolute()), "already exists", "name a new folder"
        )


@contextmanager
def making(target: Path) -> Iterator[Path]:
    """A folder to be made, which becomes `target` when the block has ended well.

    An empty folder that is there, a mounted volume or the current one, say, is filled and stays
    what it is. Raises SpecError if `target` cannot become that.
    """
    target = target.absolute()
    refuse_taken(target)
    there = target.is_dir()
    try:
        if not there:
            target.parent.mkdir(parents=True, exist_ok=True)
        place = target if there else target.parent
        scratch = Path(tempfile.mkdtemp(prefix=_MAKING, dir=place))
    except OSError as error:
        what = f"cannot be made: {error.strerror}"
        raise SpecError.at("IMAGE-107", str(target), what, "name another folder") from None
    try:
        made = scratch / "made"
        yield made
        if there:
            for path in sorted(made.iterdir()):
                path.replace(target / path.name)
            sync_folder(target)
        else:
            replace_folder(made, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def parse_json(data: bytes) -> Any:
    """The JSON value of `data`; NaN, Infinity and duplicate names are errors (ValueError)."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("duplicate name")
        return found

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(data, object_pairs_hook=unique, parse_constant=no_constant)


def disk_full(error: BaseException) -> TransientError | None:
    """The disk-full error for an ENOSPC or EDQUOT of the operating system, else None."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_space(str(error.filename or "disk"))
    return None


# About a file's name, owner or kind, which waiting does not mend.
_OF_THE_PATH = frozenset(
    {
        *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EEXIST),
        *(errno.ENAMETOOLONG, errno.ENOTEMPTY, errno.EFBIG, errno.EXDEV, errno.EMLINK),
    }
)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # as libraries in Rust say it


def system_error(error: BaseException, where: Path | str = "disk") -> TuningError | None:
    """The error for what the operating system refused, else None: an error of another kind.

    Where the error names no file, it was in `where`.
    """
    if isinstance(error, OSError):
        number, path = error.errno, str(error.filename or where)
    else:
        said = _OS_ERROR.search(str(error))
        number, path = int(said[1]) if said else None, str(where)
    if number is None:
        return None
    if number in (errno.ENOSPC, errno.EDQUOT):
        return no_space(path)
    reason = os.strerror(number)
    if number in _OF_THE_PATH:
        change = "name a writable folder with --run-dir"
        return SpecError.at("RUN-103", path, f"cannot be written ({reason})", change)
    return TransientError.at(
        "RUN-122",
        path,
        f"the file system fails ({reason})",
        "look at the disk and its mount, then run the same command again; a file that stays "
        "unreadable is made again once you remove it",
    )


def no_space(where: str) -> TransientError:
    """The error for a full disk."""
    return TransientError.at(
        "RUN-120",
        where,
        "no space left on the device",
        "free some space and run the same command again; it goes on where it stopped",
    )
