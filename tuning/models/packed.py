"""Cache of packed 4-bit base weights: a later start reads a third of the bytes, packs nothing.

A folder of safetensors for each base, quantisation and library versions, with the sha256 of every
file. A missing, damaged or unwritable entry costs time, not the run.
"""

from __future__ import annotations

import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tuning import files

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
WORTHWHILE = 1 << 30  # bytes of 16-bit weights; smaller ones are packed in a moment
SUFFIXES = (".safetensors", ".json")  # no pickle, no code


def folder(root: Path, *, base: str, revision: str, made_by: dict[str, Any]) -> Path:
    """The cache folder below `root` for the packed weights of `revision` of `base`.

    `made_by` is all that decides their bytes: quantisation, library versions.
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
    """Write the packed `model` to `target`, whole or not at all; of several ranks, the first."""
    if int(os.environ.get("RANK", "0")):
        return
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        target.parent.mkdir(parents=True, exist_ok=True)
        free = files.free_bytes(target.parent)
        if free < 2 * size:
            logger.info("packed weights not cached: %d bytes are free in %s", free, target.parent)
            return
        shutil.rmtree(scratch, ignore_errors=True)
        model.save_pretrained(scratch, safe_serialization=True)
        digests = {path.name: files.digest_file(path) for path in sorted(scratch.iterdir())}
        files.write_json(scratch / MANIFEST, {"files": digests})
        shutil.rmtree(target, ignore_errors=True)  # not whole, or it would have been used
        scratch.replace(target)
    except OSError as error:  # full, read-only, or another run was first
        logger.info("packed weights not cached: %s", error)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
