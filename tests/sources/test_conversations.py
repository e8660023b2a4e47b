"""Generated HTTP conversations: what is accepted is one version of the file, byte for byte.

A server on loopback plays a script: for each request an answer with a status, framing, validators
and faults that are drawn from a seed. The real fetch downloads from it. Whatever the server does,
the fetch ends with a file that equals one of the versions that it served as a whole, or with a
typed error; nothing half has the file's name.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path

import pytest

from tuning.errors import TuningError
from tuning.network.policy import Policy
from tuning.network.retry import Patience
from tuning.sources import fetch
from tuning.sources.http import Limits
from tuning.spec import Source

SHORT, LONG = 60, 1000  # conversations of the default run, and of one soak
LOOPBACK = Policy(allow_hosts={"127.0.0.1"})
LIMITS = Limits(connect=2, stall=0.15, retry=Patience(total=3, tries=4, first=0.001, longest=0.002))
ENDS = {10, 12, 20}  # the data is unusable, the host refuses, worth another try
FRAMINGS = ("length", "length", "length", "chunked", "closed", "both", "coded", "silly", "twice")
CUTS = ("none", "none", "none", "fin", "reset", "stall")


@dataclass(frozen=True)
class Version:
    """One content of the file, with what a good server says of it."""

    body: bytes
    number: int

    def validators(self, kind: str) -> dict[str, str]:
        modified = formatdate(1_700_000_000 + self.number, usegmt=True)
        return {
            "strong": {"ETag": f'"v{self.number}"', "Last-Modified": modified},
            "weak": {"ETag": f'W/"v{self.number}"', "Last-Modified": modified},
            "date": {"Last-Modified": modified},
            "tag": {"ETag": f'"v{self.number}"'},
            "none": {},
        }[kind]


@dataclass
class Script:
    """What the server does with each request, from a seed. `faults`: chance of each in 100."""

    seed: int
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        size = self.dice.choice((1, 7, 300, 5000, 70_000))
        self.versions = [Version(self._rows(size, "a"), 0)]
        for number in range(1, 3):  # of equal size, and of another
            other = self.dice.choice((size, size, size + 9, max(1, size // 2)))
            self.versions.append(Version(self._rows(other, "bc"[number - 1]), number))
        self.now = self.versions[0]
        self.kind = self.dice.choice(("strong", "strong", "weak", "date", "tag", "none"))
        self.faults = self.dice.choice((3, 10, 25, 50, 70))
        self.answered = 0

    def _rows(self, size: int, letter: str) -> bytes:
        return b"".join(b"%s%07d\n" % (letter.encode(), n) for n in range(size // 9 + 1))[:size]

    def chance(self, factor: float = 1.0) -> bool:
        return self.dice.random() * 100 < self.faults * factor

    def answer(self, request: str) -> tuple[bytes, str]:
        """The bytes to send for `request`, and how the connection ends."""
        self.answered += 1
        if self.chance():
            self.now = self.dice.choice(self.versions)
        if self.chance(0.5):
            return self._other(), "fin"
        headers = self.now.validators(self.kind)
        body, status = self.now.body, 200
        asked = re.search(r"^range: bytes=(\d+)-", request, re.I | re.M)
        condition = re.search(r"^if-range: (.*?)\r?$", request, re.I | re.M)
        current = not condition or condition[1] in headers.values() or self.chance()
        if asked and current and not self.chance():
            status, body = self._ranged(int(asked[1]), headers)
        elif self.chance(0.3):  # a part that was not asked for
            status, body = self._ranged(self.dice.randrange(len(body)), headers)
        if self.chance():
            self._confuse(headers)
        return self._framed(status, headers, body)

    def _other(self) -> bytes:
        status = self.dice.choice(("503 Busy", "404 No", "500 Oops", "429 Slow", "204 None", "x y"))
        silly = self.dice.choice(("0", "\u00b2", "9" * 5000, "-1", "soon"))
        return f"HTTP/1.1 {status}\r\nRetry-After: {silly}\r\nContent-Length: 0\r\n\r\n".encode(
            "latin-1", "replace"
        )

    def _ranged(self, start: int, headers: dict[str, str]) -> tuple[int, bytes]:
        """A 206 from `start`, or a 416 if there is nothing; with faults."""
        total = len(self.now.body)
        if self.chance():  # starts elsewhere: overlapping, or with a hole
            start = max(0, start + self.dice.choice((-5, -1, 1, 5)))
        if start >= total or self.chance(0.3):
            shown = total if not self.chance() else self.dice.choice((start, 0, total + 1))
            headers["Content-Range"] = f"bytes */{shown}"
            return 416, b""
        end = total if not self.chance(2) else self.dice.randint(start + 1, total)
        body = self.now.body[start:end]
        said = f"bytes {start}-{end - 1}/{total}"
        if self.chance():
            wrong = (f"bytes {start}-{total - 1}/{total}", f"bytes {start}-{end - 1}/{end}")
            odd = (f"bytes {start}-{end - 1}/*", "bytes \u00b2-5/9", f"bytes 0-{'9' * 5000}/*", "")
            said = self.dice.choice((*wrong, *odd, f"bytes {start}-{max(0, start - 2)}/{total}"))
        headers["Content-Range"] = said
        if self.chance(0.3):
            headers["Content-Type"] = "multipart/byteranges; boundary=x"
            headers.pop("Content-Range")
        return 206, body

    def _confuse(self, headers: dict[str, str]) -> None:
        """Validators vanish or change, an encoding appears."""
        match self.dice.randrange(5):
            case 0:
                headers.pop("ETag", None)
            case 1:
                headers.pop("Last-Modified", None)
            case 2:
                headers["ETag"] = self.dice.choice(('"other"', 'W/"other"', "v0", '""'))
            case 3:
                headers["Content-Encoding"] = self.dice.choice(("gzip", "br", "identity", "x"))
            case _:
                headers["Last-Modified"] = self.dice.choice(("yesterday", formatdate(usegmt=True)))

    def _framed(self, status: int, headers: dict[str, str], body: bytes) -> tuple[bytes, str]:
        """The answer as bytes, cut perhaps at any byte of it."""
        framing = self.dice.choice(FRAMINGS) if self.chance(3) else "length"
        protocol = "HTTP/1.0" if framing == "closed" and self.chance(3) else "HTTP/1.1"
        sent, length = body, str(len(body))
        if framing in ("chunked", "both", "coded"):
            coding = {"coded": self.dice.choice(("gzip, chunked", "x-chunked", "chunked, chunked"))}
            headers["Transfer-Encoding"] = coding.get(framing, "chunked")
            sent = self._chunks(body)
        if framing == "silly":
            length = self.dice.choice(("\u00b2", "9" * 5000, "-5", "1_0", "", "+3", "0x10"))
        if framing == "twice":
            length = self.dice.choice((f"{length}, {length}", f"{length}, {len(body) + 1}"))
        if self.chance(0.5):  # a length that is not the body's
            length = str(max(0, len(body) + self.dice.choice((-3, -1, 1, 50))))
        if framing not in ("chunked", "closed", "coded"):
            headers["Content-Length"] = length
        lines = [f"{protocol} {status} Fine", f"Date: {formatdate(usegmt=True)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        honest = length == str(len(body)) or framing in ("chunked", "closed", "both", "coded")
        if not honest or self.dice.random() < 0.8:  # without it nobody can know that more follows
            lines.append("Connection: close")
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        self.log.append(f"{status} {framing} {headers} {len(body)} of version {self.now.number}")
        end = self.dice.choice(CUTS) if self.chance(3) else "none"
        if length.isdecimal() and len(length) < 10 and int(length) < len(body):
            end = "none"  # cut where such a length ends, it would be the whole file for everybody
        if end == "none":
            return head + sent, "fin"
        at = self.dice.randrange(len(head) + len(sent)) if self.chance() else -1
        at = at if at >= 0 else len(head) + self.dice.randrange(len(sent) + 1)
        self.log[-1] += f", {end} at {at - len(head)}"
        return (head + sent)[:at], end

    def _chunks(self, body: bytes) -> bytes:
        sent, at = b"", 0
        while at < len(body):
            size = self.dice.randint(1, max(1, len(body) - at))
            piece = body[at : at + size]
            sent += b"%04x\r\n%s\r\n" % (len(piece), piece)
            at += size
        if self.chance(0.5):  # broken chunks
            at = self.dice.randrange(len(sent) + 1)
            return sent[:at] + self.dice.choice((b"zz\r\n", b"-5\r\n", b"\r\n", b"0")) + sent[at:]
        return sent + b"000\r\n\r\n"


@dataclass
class Stage:
    """The server: one thread, one connection at a time, raw bytes."""

    script: Script

    def __enter__(self) -> Stage:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/rows"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._socket.close()
        with socket.socket() as wake:
            wake.connect_ex(("127.0.0.1", int(self.url.rpartition(":")[2].partition("/")[0])))
        self._thread.join(5)

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):  # the client had enough
                self._converse(connection)

    def _converse(self, connection: socket.socket) -> None:
        connection.settimeout(2)
        request = b""
        while b"\r\n\r\n" not in request:
            piece = connection.recv(65536)
            if not piece:
                return
            request += piece
        data, end = self.script.answer(request.decode("latin-1"))
        connection.sendall(data)
        if end == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif end == "stall":
            self._over.wait(0.3)


def play(seed: int, folder: Path) -> str:
    """One conversation: fetch, and once more if it failed; "accepted" or the error's code."""
    script, ended = Script(seed), ""
    with Stage(script) as stage:
        for _ in range(2):  # what the first left must not spoil the second
            try:
                (file,) = fetch.fetch(
                    Source(urls=(stage.url,)), folder, policy=LOOPBACK, limits=LIMITS
                )
            except TuningError as error:
                assert error.exit_code in ENDS, (seed, error, script.log)
                assert not (folder / "0000").exists(), (seed, script.log)
                ended = error.problems[0].code
            else:
                data = file.path.read_bytes()
                whole = [version.number for version in script.versions if version.body == data]
                assert whole, (seed, len(data), script.log)
                return "accepted"
    return ended


def conversations(first: int, count: int, folder: Path) -> Iterator[str]:
    for seed in range(first, first + count):
        yield play(seed, folder / str(seed))


def test_what_is_accepted_is_one_version_of_the_file(tmp_path: Path) -> None:
    """Cuts, wrong ranges, changed files, odd framing: the file as served once, or a typed error.

    An untyped exception, a mixture of versions or a part with the file's name fails the test.
    """
    ends = list(conversations(0, SHORT, tmp_path))

    assert SHORT // 4 < ends.count("accepted") < SHORT, "the script is all good or all bad"
    assert len(set(ends)) > 4, "few kinds of errors were met"


@pytest.mark.soak
def test_a_thousand_conversations(tmp_path: Path) -> None:
    """The same with a thousand other seeds, times SOAK."""
    count = LONG * int(os.environ.get("SOAK", "1"))

    ends = list(conversations(SHORT, count, tmp_path))

    assert count // 4 < ends.count("accepted") < count
