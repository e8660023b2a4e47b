"""Headers of safetensors files: what the library writes is read, what it refuses is refused."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, deserialize

from tuning.safetensors import MAX_HEADER, Tensor, header_length, parse_header, read_header

Record = dict[str, Any]
BITS = {"BOOL": 8, "I8": 8, "F16": 16, "BF16": 16, "F32": 32, "I64": 64, "F8_E4M3": 8, "F4": 4}
SEEDS = range(40)


def record(rng: random.Random) -> tuple[Record, int]:
    """A valid header of up to six tensors in any order, and how many bytes follow it."""
    entries, end = {}, 0
    for number in range(rng.randrange(1, 7)):
        dtype = rng.choice(sorted(BITS))
        shape = [rng.choice((0, 1, 2, 4, 6)) for _ in range(rng.randrange(4))]
        if BITS[dtype] == 4:
            shape.append(2)  # whole bytes
        first, end = end, end + math.prod(shape) * BITS[dtype] // 8
        entries[f"layer.{number}.é"] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [first, end],
        }
    names = sorted(entries, key=lambda _: rng.random())
    metadata = {"__metadata__": {"format": "pt"}} if rng.random() < 0.5 else {}
    return metadata | {name: entries[name] for name in names}, end


def file(header: Any, size: int) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def accepted_by_library(data: bytes) -> bool:
    try:
        deserialize(data)
    except SafetensorError:
        return False
    return True


@pytest.mark.parametrize("seed", SEEDS)
def test_a_valid_header_gives_each_tensor(seed: int, tmp_path: Path) -> None:
    header, size = record(random.Random(seed))
    data = file(header, size)
    path = tmp_path / "w.safetensors"
    path.write_bytes(data)
    header.pop("__metadata__", None)

    tensors = read_header(path)

    assert accepted_by_library(data)
    assert sorted(header) == list(tensors)
    for name, entry in header.items():
        assert Tensor(entry["dtype"], tuple(entry["shape"])) == tensors[name]
    assert tensors == parse_header(data[8 : 8 + header_length(data)])


def entry_changed(key: str, change: Callable[[Any], Any]) -> Callable[[random.Random, Record], Any]:
    """A fault in `key` of one entry."""

    def fault(rng: random.Random, header: Record) -> Record:
        name = rng.choice([name for name in header if name != "__metadata__"])
        return header | {name: header[name] | {key: change(header[name][key])}}

    return fault


def renamed_key(rng: random.Random, header: Record) -> bytes:
    """A header that names one tensor twice."""
    name = next(name for name in header if name != "__metadata__")
    return json.dumps(header)[:-1].encode() + f", {json.dumps({name: header[name]})[1:]}".encode()


FAULTS: dict[str, Callable[[random.Random, Record], Any]] = {
    "unknown type": entry_changed("dtype", lambda _: "Q4"),
    "type is a list": entry_changed("dtype", lambda dtype: [dtype]),
    "negative dimension": entry_changed("shape", lambda shape: [*shape, -1]),
    "another shape": entry_changed("shape", lambda shape: [*shape, 3] if 0 not in shape else [1]),
    "dimension is no whole number": entry_changed("shape", lambda shape: [*shape, 1.0]),
    "dimension is a truth value": entry_changed("shape", lambda shape: [*shape, True]),
    "shape is text": entry_changed("shape", lambda _: "4"),
    "too many dimensions": entry_changed("shape", lambda shape: [*shape, *[1] * 65]),
    "a huge dimension": entry_changed("shape", lambda shape: [0, 1 << 64]),
    "three offsets": entry_changed("data_offsets", lambda span: [*span, 0]),
    "offset before the data": entry_changed("data_offsets", lambda span: [span[0] - 99, span[1]]),
    "moved": entry_changed("data_offsets", lambda span: [at + 1 for at in span]),
    "no shape": lambda rng, header: {name: {"dtype": "F32"} for name in header},
    "a list": lambda rng, header: [header],
    "not JSON": lambda rng, header: json.dumps(header).encode()[:-1],
    "not UTF-8": lambda rng, header: json.dumps(header).encode("utf-16"),
    "deep": lambda rng, header: b"[" * 100_000,
    "metadata are numbers": lambda rng, header: header | {"__metadata__": {"step": 1}},
    "a name twice": renamed_key,
    "a number of many digits": lambda rng, header: b'{"a": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("seed", range(3))
def test_a_broken_header_is_refused(fault: str, seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    header, size = record(rng)
    path = tmp_path / "w.safetensors"
    path.write_bytes(file(FAULTS[fault](rng, header), size))

    with pytest.raises(ValueError, match=r"^has (a|an|metadata) "):
        read_header(path)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_the_library_refuses_is_refused(seed: int, tmp_path: Path) -> None:
    """Bytes of the header are changed at random: what is accepted here, the library accepts."""
    rng = random.Random(seed)
    data = bytearray(file(*record(rng)))
    length = header_length(data)
    for _ in range(rng.randrange(1, 4)):
        data[rng.randrange(8 + length)] = rng.choice(b'0123456789[]{}":, aF')
    path = tmp_path / "w.safetensors"
    path.write_bytes(data)

    try:
        tensors = read_header(path)
    except ValueError:
        return

    assert accepted_by_library(bytes(data))
    assert {name: list(t.shape) for name, t in tensors.items()} == {
        name: entry["shape"] for name, entry in deserialize(bytes(data))
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: b"", "is cut: it has no header"),
        (lambda data: data[:7], "is cut: it has no header"),
        (lambda data: data[:20], "is cut or not a safetensors file"),
        (lambda data: bytes(8) + data[8:], "claims 0 bytes"),
        (lambda data: struct.pack("<Q", MAX_HEADER + 1) + data[8:], "claims 100000001 bytes"),
        (lambda data: data[:-1], "says 16 bytes, 15 follow"),
        (lambda data: data + b"x", "says 16 bytes, 17 follow"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "a pointer of git LFS"),
    ],
)
def test_a_file_of_another_size_is_refused(
    change: Callable[[bytes], bytes], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(
        change(file({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, 16))
    )

    with pytest.raises(ValueError, match=words):
        read_header(path)
