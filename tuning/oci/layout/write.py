"""Write deterministic tar layers: without clock, owner or mode of this machine."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from tuning import files
from tuning.oci.layout.manifest import LAYER, Blob

NOTHING: Mapping[str, Path] = MappingProxyType({})
LARGEST_FILE = 8**11 - 1  # bytes in a USTAR header; larger files need GNU's form


class _Layer:
    """A tar being written and hashed: the files are read once."""

    def __init__(self, out: BinaryIO) -> None:
        self._out, self._hash, self.size = out, hashlib.sha256(), 0

    def put(self, data: bytes | memoryview) -> None:
        """Write the next bytes."""
        self._hash.update(data)
        self._out.write(data)
        self.size += len(data)

    def entry(self, name: str, kind: bytes, *, size: int = 0, target: str = "") -> None:
        """Write a header; time and owner are 0, names of owners empty."""
        entry = tarfile.TarInfo(name)
        entry.type, entry.size, entry.linkname = kind, size, target
        entry.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
        large = size > LARGEST_FILE
        self.put(entry.tobuf(tarfile.GNU_FORMAT if large else tarfile.USTAR_FORMAT))

    def file(self, name: str, path: Path) -> None:
        """Write a file's header and content."""
        with path.open("rb", buffering=0) as content:
            left = os.fstat(content.fileno()).st_size
            self.entry(name, tarfile.REGTYPE, size=left)
            padding, piece = -left % tarfile.BLOCKSIZE, memoryview(bytearray(files.CHUNK))
            while left:
                count = content.readinto(piece[:left])
                if not count:
                    raise OSError(f"{path} became shorter while it was read")
                self.put(piece[:count])
                left -= count
            self.put(bytes(padding))

    def end(self) -> str:
        """Write the end, padded as tar programs do; returns the digest."""
        self.put(bytes(2 * tarfile.BLOCKSIZE))
        self.put(bytes(-self.size % tarfile.RECORDSIZE))
        return f"sha256:{self._hash.hexdigest()}"


def write_layer(
    folder: Path, names: Iterable[str], blobs: Path, replaced: Mapping[str, Path] = NOTHING
) -> Blob:
    """One tar of the files `names` of `folder` under data/, and hard links to them under models/.

    The content of a name in `replaced` comes from there.
    A file beyond 8 GiB gets GNU's header, which all readers know but POSIX of 1988 does not.
    """
    names = sorted(names)
    scratch = blobs / f".{os.getpid()}.tmp"
    with scratch.open("wb") as out:
        layer = _Layer(out)
        layer.entry("data", tarfile.DIRTYPE)
        for name in names:
            layer.file(f"data/{name}", replaced.get(name, folder / name))
        layer.entry("models", tarfile.DIRTYPE)
        for name in names:
            layer.entry(f"models/{name}", tarfile.LNKTYPE, target=f"data/{name}")
        blob = Blob(LAYER, layer.end(), layer.size)
        out.flush()
        os.fsync(out.fileno())
    scratch.replace(blobs / blob.digest.removeprefix("sha256:"))
    files.sync_folder(blobs)
    return blob


def write_json(value: Any, media_type: str, blobs: Path) -> Blob:
    """`value` as a blob of canonical JSON."""
    data = files.canonical(value)
    blob = Blob(media_type, f"sha256:{files.digest(data)}", len(data))
    files.write(blobs / files.digest(data), data)
    return blob
