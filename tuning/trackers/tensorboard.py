"""TensorBoard's event files, written without its package.

A file of records: length (8 bytes), its checksum, an Event in protobuf, its checksum. The file is
the memory of what was written: at a start a record that a kill left half is cut off, and the last
step is read back.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tuning.trackers.values import BEFORE, Ending, Identity, Key, Point

LARGEST = 3.4e38  # of a float of 4 bytes
_STEP, _SUMMARY = 2, 5  # fields of Event; 1 is the time, 3 the version


class TensorBoard:
    """The event file of one run."""

    id: str | None = None
    link: str | None = None
    sent: Key | int | None

    def __init__(self, folder: Path, run: Identity) -> None:
        """Open the file in `folder`, made if absent."""
        folder.mkdir(parents=True, exist_ok=True)
        there = sorted(folder.glob(f"events.out.tfevents.*.{run.identity}"))
        name = f"events.out.tfevents.{int(time.time())}.{run.identity}"
        path = there[0] if there else folder / name
        end, sent = 0, BEFORE
        for event, end in _records(path.read_bytes() if path.exists() else b""):  # noqa: B007
            sent = max(sent, _key(event))
        self._path, self.sent = path, sent
        with path.open("ab") as file:
            file.truncate(end)
        if not end:
            self._append([_text(3, "brain.Event:2")])

    def send(self, points: Sequence[Point]) -> None:
        """Append an event for each point."""
        self._append(_event(point) for point in points)

    def close(self, ending: Ending, facts: dict[str, Any]) -> None:
        """Nothing is left to do."""

    def _append(self, events: Iterable[bytes]) -> None:
        now = _tag(1, 1) + struct.pack("<d", time.time())
        with self._path.open("ab") as file:
            for event in events:
                data = now + event
                size = struct.pack("<Q", len(data))
                file.write(size + _checksum(size) + data + _checksum(data))


def _event(point: Point) -> bytes:
    values = b"".join(
        _message(1, _text(1, tag) + _tag(2, 5) + _float(value))
        for tag, value in point.grouped().items()
    )
    return _tag(_STEP, 0) + _varint(point.step) + _message(_SUMMARY, values)


def _records(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Each whole event of a file, and where it ends."""
    start = 0
    while len(data) >= start + 12:
        size = data[start : start + 8]
        end = start + 12 + struct.unpack("<Q", size)[0]
        event = data[start + 12 : end]
        sound = data[start + 8 : start + 12] == _checksum(size)
        if not sound or data[end : end + 4] != _checksum(event):
            return
        start = end + 4
        yield event, start


def _key(event: bytes) -> Key:
    """Step and kind of an event that `send` wrote."""
    if event[9:10] != _tag(_STEP, 0):
        return BEFORE
    step, shift = 0, 0
    for byte in event[10:]:
        step |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    return step, int(b"eval/loss" in event)


def _float(value: float) -> bytes:
    return struct.pack("<f", max(-LARGEST, min(LARGEST, value)))


def _tag(field: int, kind: int) -> bytes:
    return bytes([field << 3 | kind])


def _varint(number: int) -> bytes:
    made = bytearray()
    while number > 0x7F:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*made, number])


def _message(field: int, content: bytes) -> bytes:
    return _tag(field, 2) + _varint(len(content)) + content


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())


def _checksum(data: bytes) -> bytes:
    """CRC-32C, masked as in TFRecord."""
    table, crc = _table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return struct.pack("<I", masked)


@cache
def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table
