"""Checkpoints that a kill at any moment cannot spoil.

A checkpoint is a folder `checkpoints/<run id, 12 digits>-<step, 8 digits>`: safetensors and JSON,
and a manifest with the sha256 of each, written last. It is made under a temporary name, fsynced and
renamed, so a folder of that name is whole, or was damaged later; then its hashes tell. No pickle is
written, and none is ever read. Saving, choosing and pruning need no torch.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuning import files

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
QUARANTINE = "quarantine"
FORMAT = 1
SCRATCH = ".tmp-"


class Damaged(Exception):
    """A checkpoint is not what its manifest says."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    folder: Path
    run_id: str
    step: int

    def read(self, name: str) -> bytes:
        """The content of one of its files."""
        return (self.folder / name).read_bytes()


def save(
    root: Path, *, run_id: str, step: int, contents: Iterable[tuple[str, bytes]], keep: int = 2
) -> Checkpoint:
    """Write a checkpoint of `run_id` at `step` under `root` and remove all but the newest `keep`.

    `contents` are file names with their bytes, taken one at a time. Raises OSError (a full disk)
    with the earlier checkpoints as they were.
    """
    root.mkdir(parents=True, exist_ok=True)
    folder = root / _name(run_id, step)
    scratch = root / f"{SCRATCH}{folder.name}.{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir()
        listed = {}
        for name, data in contents:
            files.write(scratch / name, data)
            listed[name] = {"sha256": files.digest(data), "bytes": len(data)}
        record = {"format": FORMAT, "run_id": run_id, "step": step, "files": listed}
        files.write_json(scratch / MANIFEST, record)
        _remove(folder)  # of the same step: saved by a signal, and its stop undone
        files.replace_folder(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for old in _folders(root, run_id)[keep:]:
        _remove(old)
    return Checkpoint(folder, run_id, step)


def newest(root: Path, *, run_id: str) -> Checkpoint | None:
    """The newest checkpoint of `run_id` under `root` that is whole, or None.

    Damaged ones are moved to `root/quarantine` and named in the log; what a kill left half-written
    is removed; checkpoints of another run id are left alone and never used. The caller holds the
    run directory's lock.
    """
    if not root.is_dir():
        return None
    for path in root.glob(f"{SCRATCH}*"):
        shutil.rmtree(path, ignore_errors=True)
    others = sorted(
        path.name
        for path in root.iterdir()
        if path.name != QUARANTINE and not path.name.startswith(_name(run_id))
    )
    if others:
        logger.warning("left alone, of another recipe: %s", ", ".join(others))
    for folder in _folders(root, run_id):
        try:
            return verify(folder, run_id=run_id)
        except Damaged as error:
            put = _quarantine(folder)
            logger.warning("checkpoint %s is damaged (%s); moved to %s", folder.name, error, put)
    return None


def at(root: Path, *, run_id: str, step: int) -> Checkpoint:
    """The checkpoint of `step`, which somebody has verified."""
    return Checkpoint(root / _name(run_id, step), run_id, step)


def verify(folder: Path, *, run_id: str) -> Checkpoint:
    """The checkpoint in `folder`, once every file has the sha256 its manifest says.

    Raises Damaged.
    """
    try:
        record = files.read_json(folder / MANIFEST)
        found = {"format": record["format"], "run_id": record["run_id"]}
        step, listed = int(record["step"]), dict(record["files"])
        wanted = {name: str(entry["sha256"]) for name, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{MANIFEST}: {type(error).__name__}") from None
    if found != {"format": FORMAT, "run_id": run_id}:
        raise Damaged(f"{MANIFEST}: of another format or run")
    if folder.name != _name(run_id, step):
        raise Damaged(f"{MANIFEST}: says step {step}")
    there = {path.name for path in folder.iterdir()} - {MANIFEST}
    if there != set(wanted):
        raise Damaged(f"files {sorted(there ^ set(wanted))} missing or too many")
    for name, sha256 in wanted.items():
        try:
            same = files.digest_file(folder / name) == sha256
        except OSError as error:
            raise Damaged(f"{name}: {type(error).__name__}") from None
        if not same:
            raise Damaged(f"{name}: its sha256 is another")
    return Checkpoint(folder, run_id, step)


def _name(run_id: str, step: int | None = None) -> str:
    return f"{run_id[:12]}-" + ("" if step is None else f"{step:08d}")


def _folders(root: Path, run_id: str) -> list[Path]:
    """Checkpoint folders of `run_id`, newest first, whole or not."""
    return sorted((p for p in root.glob(f"{_name(run_id)}*") if p.is_dir()), reverse=True)


def _remove(folder: Path) -> None:
    """Remove a checkpoint so that a kill half-way leaves no damaged one behind."""
    if folder.exists():
        scratch = folder.with_name(f"{SCRATCH}old-{folder.name}.{os.getpid()}")
        folder.replace(scratch)
        shutil.rmtree(scratch, ignore_errors=True)


def _quarantine(folder: Path) -> Path:
    place = folder.parent / QUARANTINE
    place.mkdir(exist_ok=True)
    target = place / folder.name
    for number in range(1, 1000):
        if not target.exists():
            break
        target = place / f"{folder.name}.{number}"
    folder.replace(target)
    files.sync_folder(folder.parent)
    return target


# Trainer state as bytes. Tensors go to safetensors, everything else to JSON, which keeps every
# float bit for bit.


def pack_tensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """`tensors` as a safetensors file, sorted by name; tensors may share memory."""
    import safetensors.torch

    ready = {k: tensors[k].detach().cpu().contiguous().clone() for k in sorted(tensors)}
    return bytes(safetensors.torch.save(ready))


def unpack_tensors(data: bytes) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file."""
    import safetensors.torch

    return dict(safetensors.torch.load(data))


def pack_json(value: Any) -> bytes:
    """`value` as JSON; a number that is not finite is refused with ValueError."""
    return json.dumps(value, sort_keys=True, allow_nan=False).encode()


def split_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's `state_dict` as tensors, by their path in it, and as JSON values.

    Sorted by path: ranks that share a model gather the tensors one after another, and what was
    loaded from a file has another order on each of them.
    """
    import torch

    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for path, leaf in sorted(_leaves(state["state"], ""), key=lambda pair: pair[0]):
        if torch.is_tensor(leaf):
            tensors[path] = leaf
        else:
            values[path] = leaf
    return tensors, {"values": values, "param_groups": state["param_groups"]}


def _leaves(tree: Mapping[Any, Any], above: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def join_optimizer(
    tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]
) -> dict[str, Any]:
    """The `state_dict` that `split_optimizer` took apart."""
    state: dict[int, Any] = {}
    for path, leaf in {**tensors, **record["values"]}.items():
        index, *between, last = path.split(".")
        place = state.setdefault(int(index), {})
        for key in between:
            place = place.setdefault(key, {})
        place[last] = leaf
    groups = [
        {k: tuple(v) if k == "betas" else v for k, v in group.items()}
        for group in record["param_groups"]
    ]
    return {"state": dict(sorted(state.items())), "param_groups": groups}


def capture_random() -> dict[str, Any]:
    """The state of every random number generator, as JSON: Python, numpy, torch, CUDA."""
    import numpy
    import torch

    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],  # type: ignore[union-attr]
        "torch": _hex(torch.get_rng_state()),
        "cuda": [_hex(state) for state in cuda],
    }


def restore_random(record: Mapping[str, Any]) -> None:
    """Put every random number generator where `capture_random` found it.

    A machine with another number of GPUs keeps its own CUDA states: there is nothing to restore.
    """
    import numpy
    import torch

    version, numbers, gauss = record["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = record["numpy"]
    keys = numpy.array(keys, dtype=numpy.uint32)
    numpy.random.set_state((name, keys, position, has_gauss, cached))
    torch.set_rng_state(_tensor(record["torch"]))
    if record["cuda"] and len(record["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_tensor(state) for state in record["cuda"]])


def _hex(state: torch.Tensor) -> str:
    return state.cpu().numpy().tobytes().hex()


def _tensor(digits: str) -> torch.Tensor:
    import torch

    return torch.frombuffer(bytearray.fromhex(digits), dtype=torch.uint8)


def truncate_lines(path: Path, *, step: int) -> None:
    """Drop from a file of JSON lines every record after `step`, and what a kill left torn."""
    if path.exists():
        kept = [line for line, at in _lines(path) if at <= step]
        files.write(path, b"".join(kept))


def _lines(path: Path) -> Iterator[tuple[bytes, int]]:
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            yield line, int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
