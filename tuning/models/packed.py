"""4-bit base weights, packed once: a later start reads a third of the bytes and packs nothing.

A folder of safetensors for each base, way of packing and version of the libraries, with the sha256
of every file. It is a cache: what is missing, damaged or cannot be written costs time, not the run.
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
KEPT = (".safetensors", ".json")  # no pickle, no code


def folder(root: Path, *, base: str, revision: str, made_by: dict[str, Any]) -> Path:
    """Where the packed weights of `revision` of `base` belong below `root`.

    `made_by` is all that decides their bytes: the way of packing, versions of the libraries.
    """
    key = files.digest(files.canonical([base, revision, made_by]))
    return root / "packed" / key[:32]


def worthwhile(base: Path) -> bool:
    """Whether packing the weights in `base` takes long enough to remember."""
    return sum(path.stat().st_size for path in base.glob("*.safetensors")) >= WORTHWHILE


def whole(kept: Path) -> bool:
    """Whether `kept` holds packed weights and every byte of them is what was written."""
    try:
        listed = files.read_json(kept / MANIFEST)["files"]
        found = {path.name: path for path in kept.iterdir() if path.name != MANIFEST}
        if listed.keys() != found.keys() or not all(name.endswith(KEPT) for name in found):
            raise ValueError("its files are not those listed")
        with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter's lock
            digests = pool.map(files.digest_file, found.values())
            if dict(zip(found, digests, strict=True)) != listed:
                raise ValueError("a file has changed")
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("packed weights in %s are not used: %s", kept, error)
        return False
    return True


def keep(model: Any, target: Path) -> bool:
    """Write the packed `model` to `target`, whole or not at all; whether it is there now."""
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        need = sum(p.numel() * p.element_size() for p in model.parameters())
        target.parent.mkdir(parents=True, exist_ok=True)
        free = files.free_bytes(target.parent)
        if free < 2 * need:
            logger.info("packed weights are not kept: %d bytes are free in %s", free, target.parent)
            return False
        shutil.rmtree(scratch, ignore_errors=True)
        model.save_pretrained(scratch, safe_serialization=True)
        digests = {path.name: files.digest_file(path) for path in sorted(scratch.iterdir())}
        files.write_json(scratch / MANIFEST, {"files": digests})
        shutil.rmtree(target, ignore_errors=True)  # not whole, or it would have been used
        scratch.replace(target)
    except OSError as error:  # full, read-only, or another run was first
        logger.info("packed weights are not kept: %s", error)
        return False
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True
