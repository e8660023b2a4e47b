"""A stranger's chat template, rendered by a process that may have neither much time nor memory.

A template is a program. jinja's sandbox stops it from touching anything, not from taking for ever
or from filling the memory, and no reading of it tells which of them do: a text that is doubled
thirty times looks like any other. So what came with an adapter is rendered apart, in a process with
a bound on its memory that is ended when it is late. It gets messages and gives text; it holds no
key and no weights. A template that is late again and again is not asked for a while.

    with Renderer() as render:
        text = render(template, messages, ask=True, words={"bos_token": "<s>"})

Both ways a record is its length in four bytes and JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

PATIENCE = 5.0  # seconds for a rendering
STARTING = 60.0  # seconds until the process is there
MEMORY = 256 << 20  # bytes beyond what the process has when it is ready
LONGEST = 16 << 20  # characters of a rendered text
_LENGTH = struct.Struct(">I")
LATE, REST = 3, 60.0  # times in a row, and seconds without it then
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR")  # of the environment
_TOO_MUCH = "the model's chat template takes too much memory"
_TOO_LONG = "the model's chat template takes too long"

Message = Mapping[str, str]


class NotRendered(Exception):
    """The template does not take these messages; the text says why, for whoever asked."""


class Costly(NotRendered):
    """It takes too much time or memory for them."""


class Renderer:
    """A process that renders templates; it is made when it is needed, and again after it ended.

    Threads may share it: one rendering at a time.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._late: dict[str, int] = {}  # template -> how often in a row
        self._rests: dict[str, float] = {}  # and until when it is not asked

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(
        self, template: str, messages: Sequence[Message], *, ask: bool, words: Mapping[str, str]
    ) -> str:
        """The text of `messages`, with the beginning of an answer if `ask`; `words` are the special
        tokens by their names. Raises NotRendered."""
        asked = {"template": template, "messages": list(messages), "ask": ask, "words": dict(words)}
        with self._lock:
            if time.monotonic() < self._rests.get(template, 0.0):
                raise Costly(_TOO_LONG)
            try:
                answer = self._exchange(asked)
            except TimeoutError:
                self._end()
                self._late[template] = self._late.get(template, 0) + 1
                if self._late[template] >= LATE:
                    self._rests[template] = time.monotonic() + REST
                raise Costly(_TOO_LONG) from None
            except (EOFError, BrokenPipeError):  # the system ended it
                self._end()
                raise Costly(_TOO_MUCH) from None
        self._late.pop(template, None)
        if "text" in answer:
            return str(answer["text"])
        raise (Costly if answer["costly"] else NotRendered)(str(answer["why"]))

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _exchange(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        if self._process and self._process.poll() is not None:  # ended while nobody asked
            self._end()
        process = self._process or self._start()
        assert process.stdin and process.stdout
        _write(process.stdin, asked)
        return _read(process.stdout, PATIENCE)

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", "tuning.serve.rendering"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **{name: os.environ[name] for name in _KEPT if name in os.environ},
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(sys.path),
                "HF_HUB_OFFLINE": "1",
            },
        )
        assert process.stdout
        _read(process.stdout, STARTING)
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe:
                with contextlib.suppress(OSError):  # what it never read
                    pipe.close()
        process.wait()


def _write(pipe: IO[bytes], record: Mapping[str, Any]) -> None:
    body = json.dumps(record).encode()
    pipe.write(_LENGTH.pack(len(body)) + body)
    pipe.flush()


def _read(pipe: IO[bytes], seconds: float) -> dict[str, Any]:
    """The next record. Raises TimeoutError, or EOFError if there is none."""
    end = time.monotonic() + seconds

    def take(size: int) -> bytes:
        found = b""
        while len(found) < size:
            if not select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError
            piece = os.read(pipe.fileno(), size - len(found))
            if not piece:
                raise EOFError
            found += piece
        return found

    (size,) = _LENGTH.unpack(take(_LENGTH.size))
    answer: dict[str, Any] = json.loads(take(size))
    return answer


# -- in the process ---------------------------------------------------------------------------


def main() -> None:
    """Render what comes in until nothing comes any more."""
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # seconds, and much memory
    from transformers.utils.chat_template_utils import render_jinja_template

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal tells it to all; the parent decides
    incoming, outgoing = sys.stdin.buffer, sys.stdout.buffer
    _write(outgoing, {})
    while head := incoming.read(_LENGTH.size):
        asked = json.loads(incoming.read(*_LENGTH.unpack(head)))
        _write(outgoing, _rendered(render_jinja_template, asked))


def _rendered(render: Any, asked: Mapping[str, Any]) -> dict[str, Any]:
    import jinja2

    try:
        (text,), _ = render(
            [asked["messages"]],
            chat_template=asked["template"],
            add_generation_prompt=asked["ask"],
            **asked["words"],
        )
        if len(text) <= LONGEST:
            return {"text": text}
        return {"costly": True, "why": _TOO_MUCH}
    except MemoryError:
        return {"costly": True, "why": _TOO_MUCH}
    except jinja2.TemplateError as error:  # also what a template raises itself
        return {"costly": False, "why": str(error)[:200]}
    except Exception:  # a template is a stranger's program: it may raise anything
        return {"costly": False, "why": "the model's chat template does not take these messages"}


if __name__ == "__main__":
    main()
