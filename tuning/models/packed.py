"""Cache of packed 4-bit base weights: a later start reads a third of the bytes, packs nothing.

A folder of safetensors for each base, quantisation and library versions, with the sha256 of every
file. A missing, damaged or unwritable entry costs time, not the run.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuning import files

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
WORTHWHILE = 1 << 30  # bytes of 16-bit weights; smaller ones are packed in a moment
SUFFIXES = (".safetensors", ".json")  # no pickle, no code


def folder(root: Path, *, base: str, revision: str, made_by: dict[str, Any]) -> Path:
    """The cache folder below `root` for the packed weights of `revision` of `base`.

    `made_by` is all that decides their bytes: quantisation, kind of device, library versions.
    """
    key = files.digest(files.canonical([base, revision, made_by]))
    return root / "packed" / key[:32]


def is_worthwhile(base: Path) -> bool:
    """Whether packing the weights in `base` takes long enough to cache them."""
    return sum(path.stat().st_size for path in base.glob("*.safetensors")) >= WORTHWHILE


def is_whole(folder: Path) -> bool:
    """Whether `folder` holds packed weights that match their hashes."""
    try:
        listed = files.read_json(folder / MANIFEST)["files"]
        paths = {path.name: path for path in folder.iterdir() if path.name != MANIFEST}
        if listed.keys() != paths.keys() or not all(name.endswith(SUFFIXES) for name in paths):
            raise ValueError("its files are not those listed")
        with ThreadPoolExecutor() as pool:  # hashing releases the GIL
            digests = pool.map(files.digest_file, paths.values())
            if dict(zip(paths, digests, strict=True)) != listed:
                raise ValueError("a file has changed")
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("packed weights in %s are not used: %s", folder, error)
        return False
    return True


def save(model: Any, target: Path) -> None:
    """Write the packed `model` to `target`, whole or not at all; of several ranks, the first.

    Not while another process writes to the same cache, nor over a copy that is whole: a run may be
    reading it.
    """
    if int(os.environ.get("RANK", "0")):
        return
    try:
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        target.parent.mkdir(parents=True, exist_ok=True)
        with _only_writer(target.parent):
            if is_whole(target):
                return
            for left in target.parent.glob(f".{target.name}.*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            free = files.free_bytes(target.parent)
            if free < 2 * size:
                folder = target.parent
                logger.info("packed weights not cached: %d bytes are free in %s", free, folder)
                return
            _write(model, target)
    except OSError as error:  # full, read-only, or another run writes
        logger.info("packed weights not cached: %s", error)


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """The lock of a cache's writers. Raises BlockingIOError where another process has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _write(model: Any, target: Path) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        model.save_pretrained(scratch, safe_serialization=True)
        digests = {path.name: files.digest_file(path) for path in sorted(scratch.iterdir())}
        files.write_json(scratch / MANIFEST, {"files": digests})
        scratch.chmod(0o755)
        shutil.rmtree(target, ignore_errors=True)  # not whole
        scratch.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
