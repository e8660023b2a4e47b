"""The header of a safetensors file, read strictly and without loading a tensor.

A file is eight bytes of length (little-endian), that many bytes of JSON, then the tensors' bytes.
Every function raises ValueError with a predicate ("is cut: ..."); the caller names file and code.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEADER = 100_000_000  # bytes; the format's own limit
MAX_DIMENSIONS = 64  # more than any library has; bounds the product of a shape
LFS = b"version https://git-lfs"  # how a pointer file of git LFS begins
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """Type (`BF16`, `F32`, ...) and shape of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of the file at `path` by name, sorted; header and file size agree."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(LFS))
        if start == LFS:
            raise ValueError("is a pointer of git LFS, not the file itself")
        length = header_length(start, limit=min(MAX_HEADER, size - 8))
        file.seek(8)
        return parse_header(file.read(length), data_bytes=size - 8 - length)


def header_length(start: bytes, *, limit: int = MAX_HEADER) -> int:
    """Bytes of the header, from the first eight bytes of a file."""
    if len(start) < 8:
        raise ValueError("is cut: it has no header")
    length = int.from_bytes(start[:8], "little")
    if not 2 <= length <= limit:
        raise ValueError(f"is cut or not a safetensors file: its header claims {length} bytes")
    return length


def parse_header(header: bytes, *, data_bytes: int | None = None) -> dict[str, Tensor]:
    """The tensors of a header's JSON by name, sorted; `data_bytes` (if known) follow it."""
    try:
        record = json.loads(header.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise ValueError("has a header that is no JSON, or names a key twice") from None
    if not isinstance(record, dict):
        raise ValueError("has a header that is no JSON object")
    metadata = record.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("has metadata that are not text")
    end = 0
    for first, last, name in sorted((*_span(name, entry), name) for name, entry in record.items()):
        if first != end:
            raise ValueError(f"has a hole or an overlap before tensor {name[:80]}")
        end = last
    if data_bytes is not None and end != data_bytes:
        raise ValueError(f"is cut or too long: its header says {end} bytes, {data_bytes} follow")
    return {name: Tensor(e["dtype"], tuple(e["shape"])) for name, e in sorted(record.items())}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("duplicate name")
    return record


def _span(name: str, entry: Any) -> tuple[int, int]:
    """First byte and end of a tensor; its type and shape agree with them."""
    try:
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, first, last]
        valid = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
        valid = valid and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)
        if valid and (last - first) * 8 == math.prod(shape) * _BITS[dtype]:
            return first, last
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"has an impossible header entry for tensor {name[:80]}")
