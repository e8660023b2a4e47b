"""Extract wanted files under /data of an untrusted image into a new folder.

Only regular files are extracted, and hard links to such files of the same layer, with our mode,
owner and time. No link is followed, nothing is written outside, and size is limited.
"""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuning import adapter, files
from tuning.errors import SpecError
from tuning.oci.layout import layer, tar
from tuning.oci.layout.manifest import LARGEST_JSON, Blob, Image, blob_path, parse_json, refused
from tuning.oci.layout.package import ADAPTER_FILES
from tuning.oci.layout.tar import BadTar, Content, Entry, Source
from tuning.sources.local import stored

MOST_ENTRIES = 200_000  # in one image; a base image has some ten thousand
MOST_FILES = 10_000  # that are extracted
LARGEST_TOTAL = 64 << 30  # bytes that are extracted
_IN_PLACE = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.ENAMETOOLONG)
LONGEST_NAME, DEEPEST_NAME = 1024, 32  # characters, parts


def unpack(
    image: Image,
    layout: Path,
    target: Path,
    *,
    wanted: Callable[[str], bool] = ADAPTER_FILES.__contains__,
    verified: bool = False,
    largest: int = LARGEST_TOTAL,
) -> tuple[str, ...]:
    """Extract the files under /data of `image` into the new folder `target`; returns their names.

    Every blob's digest is checked first, unless they are `verified`. Only regular files whose name
    `wanted` accepts are extracted, `largest` bytes at most; a later layer's file replaces an
    earlier one's. Raises RefusedError for a damaged or malicious image, SpecError if `target`
    exists and is not empty; then nothing is left.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SpecError.at("IMAGE-103", str(target), "already exists", "name a new folder")
    if not verified:
        for blob in image.blobs:
            _verify(blob_path(layout, blob), blob, image.where)
    with stored(target):
        return _unpack(image, layout, target, wanted, largest)


def _unpack(
    image: Image, layout: Path, target: Path, wanted: Callable[[str], bool], largest: int
) -> tuple[str, ...]:
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        unpacking = _Unpacking(image.where, scratch, wanted, largest)
        names = unpacking.layers(image, layout)
        if unpacking.pickles and not any(name.endswith(layer.WEIGHTS) for name in names):
            raise SpecError([adapter.pickled(image.where, min(unpacking.pickles))])
        if not names:
            raise refused(image.where, "has no wanted file under /data")
        if target.exists():
            target.rmdir()
        files.replace_folder(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return names


def _verify(path: Path, blob: Blob, where: str) -> None:
    if not path.is_file():
        raise refused(where, f"lacks the blob {blob.digest}")
    if path.stat().st_size != blob.size or f"sha256:{files.digest_file(path)}" != blob.digest:
        raise refused(where, f"has a damaged blob {blob.digest}")


@dataclass
class _Unpacking:
    """The extraction of one image into `folder`."""

    where: str
    folder: Path
    wanted: Callable[[str], bool]
    largest: int
    entries: int = 0
    files: int = 0
    total: int = 0
    pickles: set[str] = field(default_factory=set)  # that were not wanted

    def layers(self, image: Image, layout: Path) -> tuple[str, ...]:
        """Extract every layer in turn; returns the names of the files."""
        expected = _diff_ids(image, layout)
        names: set[str] = set()
        for number, blob in enumerate(image.layers):
            try:
                with blob_path(layout, blob).open("rb") as raw:
                    stream = layer.plain(raw, blob, self.where)
                    names |= self._layer(stream)
            except (BadTar, EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise refused(self.where, f"has a layer that is not a valid tar: {error}") from None
            if expected and stream.digest not in (None, expected[number]):
                raise refused(self.where, f"has a layer that is not {expected[number]}")
        return tuple(sorted(names))

    def _layer(self, stream: Source) -> set[str]:
        names: set[str] = set()
        for entry, content in tar.entries(stream):
            self.entries += 1
            if self.entries > MOST_ENTRIES:
                raise refused(self.where, f"has more than {MOST_ENTRIES:,} entries")
            name = self._name(entry.name, entry.kind)
            if name is None or entry.kind == tar.FOLDER:
                continue
            if not self.wanted(name):
                self.pickles |= {name} if name.endswith(layer.PICKLES) else set()
                continue
            if name in names:
                raise refused(self.where, f"has data/{name} twice in one layer")
            try:
                self._file(name, entry, content, names)
            except OSError as error:
                if error.errno not in _IN_PLACE:
                    raise
                raise refused(self.where, "has a file in place of a folder") from None
            names.add(name)
        return names

    def _file(self, name: str, entry: Entry, content: Content, names: set[str]) -> None:
        self.files, self.total = self.files + 1, self.total + entry.size
        if self.files > MOST_FILES or self.total > self.largest:
            raise refused(self.where, "unpacks to more than the limit")
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if entry.kind == tar.HARD_LINK:
            source = self._name(entry.target, tar.REGULAR)
            if source not in names:
                raise refused(self.where, f"has data/{name} as a link to a missing file")
            path.hardlink_to(self.folder / str(source))
        elif entry.kind == tar.REGULAR:
            with path.open("xb") as out:
                while piece := content.read(files.CHUNK):
                    out.write(piece)
        else:
            raise refused(self.where, f"has data/{name} as a link or device")

    def _name(self, name: str, kind: bytes) -> str | None:
        """The entry's name below data/, or None if it is elsewhere."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if name.startswith("/") or ".." in parts:
            raise refused(self.where, "has an entry that points out of the image")
        if _hides_data(parts):
            raise refused(self.where, "deletes files of an earlier layer under /data")
        if not parts or parts[0] != "data":
            return None
        if len(parts) == 1:
            if kind != tar.FOLDER:
                raise refused(self.where, "has a /data that is not a folder")
            return None
        clean = "/".join(parts[1:])
        if not clean.isprintable() or "\\" in clean:
            raise refused(self.where, "has a file under /data with an unreadable name")
        if len(clean) > LONGEST_NAME or len(parts) > DEEPEST_NAME:
            raise refused(self.where, "has a file under /data with a name of impossible length")
        return clean


def _hides_data(parts: list[str]) -> bool:
    """Whether an entry is a whiteout of files under /data."""
    if len(parts) == 1:
        return parts[0] in (".wh.data", ".wh..wh..opq")
    return parts[:1] == ["data"] and parts[-1].startswith(".wh.")


def _diff_ids(image: Image, layout: Path) -> list[Any]:
    """The config's digests of the uncompressed layers; none if it is not an image's config."""
    path = blob_path(layout, image.config)
    if not image.config.media_type.endswith(("image.config.v1+json", "container.image.v1+json")):
        return []
    if image.config.size > LARGEST_JSON:
        raise refused(image.where, "has a config of impossible size")
    try:
        diff_ids = parse_json(path.read_bytes(), where=image.where)["rootfs"]["diff_ids"]
    except (KeyError, TypeError):
        diff_ids = None
    if not isinstance(diff_ids, list) or len(diff_ids) != len(image.layers):
        raise refused(image.where, "has a config that does not match its layers")
    return diff_ids
