"""Renders untrusted chat templates in a subprocess with time and memory limits.

A template is a program. Jinja's sandbox keeps it from touching anything, but not from running for
ever or filling the memory, and no inspection tells which templates do: a text doubled thirty times
looks like any other. So every template is rendered in a process with a memory limit that is killed
when it is late. The process gets messages and returns text; it holds no key and no weights. A
template that is late several times in a row is not rendered for a while.

Requests and answers are JSON, each after its length in four bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
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
from typing import IO, Any

import jinja2

from tuning.data.chat_rewrites import with_clock

RENDER_SECONDS = 5.0
START_SECONDS = 60.0
MEMORY = 256 << 20  # bytes beyond what the process has when it is ready
MAX_TEXT = 16 << 20  # characters of a rendered text
MAX_TEMPLATE = 100_000  # characters of an adapter's template
MAX_LATE, PAUSE_SECONDS = 3, 60.0  # after so many timeouts in a row a template pauses
_LENGTH = struct.Struct(">I")
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR")  # inherited
_TOO_MUCH = "the model's chat template takes too much memory"
_TOO_LONG = "the model's chat template takes too long"
_MARKS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # transformers' own tags

Message = Mapping[str, Any]


class NotRendered(Exception):
    """The template does not take these messages; the text, for clients, says why."""


class TooCostly(NotRendered):
    """The template takes too much time or memory."""


class Renderer:
    """A rendering process, started at the first rendering and again after it ended.

    Threads may share it; it renders one conversation at a time.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False
        self._lock = threading.Lock()
        self._late: dict[str, int] = {}  # template -> timeouts in a row
        self._paused_until: dict[str, float] = {}

    def __call__(
        self,
        template: str,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        special_tokens: Mapping[str, Any],
        tools: Sequence[Any] | None = None,
    ) -> str:
        """The text of `messages`. Raises NotRendered."""
        request = {
            "template": with_clock(template),
            "messages": list(messages),
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "special_tokens": dict(special_tokens),
        }
        with self._lock:
            if time.monotonic() < self._paused_until.get(template, 0.0):
                raise TooCostly(_TOO_LONG)
            try:
                answer = self._exchange(request)
            except TimeoutError:
                self._kill()
                self._late[template] = self._late.get(template, 0) + 1
                if self._late[template] >= MAX_LATE:
                    self._paused_until[template] = time.monotonic() + PAUSE_SECONDS
                raise TooCostly(_TOO_LONG) from None
            except (EOFError, BrokenPipeError):  # killed by the system
                self._kill()
                raise TooCostly(_TOO_MUCH) from None
        self._late.pop(template, None)
        if "text" in answer:
            return str(answer["text"])
        raise (TooCostly if answer["costly"] else NotRendered)(str(answer["why"]))

    def prewarm(self) -> None:
        """Start the process without waiting for it."""
        with self._lock:
            self._start()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._kill()

    def _exchange(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if self._process and self._process.poll() is not None:  # ended between two renderings
            self._kill()
        process = self._process or self._start()
        assert process.stdin and process.stdout
        if not self._is_ready:
            _read(process.stdout, START_SECONDS)
            self._is_ready = True
        _write(process.stdin, request)
        return _read(process.stdout, RENDER_SECONDS)

    def _start(self) -> subprocess.Popen[bytes]:
        inherited = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        self._is_ready = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tuning.serve.rendering"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=inherited
            | {
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(sys.path),
                "HF_HUB_OFFLINE": "1",
                "TRANSFORMERS_VERBOSITY": "error",  # else it reports that torch is missing
            },
        )
        return self._process

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe:
                with contextlib.suppress(OSError):  # bytes the process never read
                    pipe.close()
        process.wait()


def _write(pipe: IO[bytes], record: Mapping[str, Any]) -> None:
    body = json.dumps(record).encode()
    pipe.write(_LENGTH.pack(len(body)) + body)
    pipe.flush()


def _read(pipe: IO[bytes], seconds: float) -> dict[str, Any]:
    """The next record. Raises TimeoutError, and EOFError at the end."""
    end = time.monotonic() + seconds

    def take(size: int) -> bytes:
        taken = b""
        while len(taken) < size:
            if not select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError
            piece = os.read(pipe.fileno(), size - len(taken))
            if not piece:
                raise EOFError
            taken += piece
        return taken

    (size,) = _LENGTH.unpack(take(_LENGTH.size))
    answer: dict[str, Any] = json.loads(take(size))
    return answer


def template_problem(
    template: str, renderer: Renderer, special_tokens: Mapping[str, Any]
) -> str | None:
    """Why an adapter's template cannot be used; None if it can."""
    if len(template) > MAX_TEMPLATE:
        return f"its chat template has {len(template):,} characters"
    try:
        jinja2.Environment(  # noqa: S701  parsed only, never rendered in this process
            extensions=["jinja2.ext.loopcontrols"]
        ).parse(_MARKS.sub("", template))
    except jinja2.TemplateError as error:
        return f"its chat template is wrong: {str(error)[:120]}"
    question: Message = {"role": "user", "content": "hello"}
    reason = ""
    for turns in ([question], [{"role": "system", "content": "be short"}, question]):
        try:
            renderer(template, turns, add_generation_prompt=True, special_tokens=special_tokens)
        except NotRendered as error:
            reason = reason or str(error)
            if isinstance(error, TooCostly):
                break
        else:
            return None
    return f"its chat template does not take a question: {reason}"


def main() -> None:
    """The rendering process: answer requests from stdin until it is closed."""
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # saves seconds and memory
    from transformers.utils.chat_template_utils import render_jinja_template

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal signals the whole group
    incoming, outgoing = sys.stdin.buffer, sys.stdout.buffer
    _write(outgoing, {})
    while head := incoming.read(_LENGTH.size):
        request = json.loads(incoming.read(*_LENGTH.unpack(head)))
        _write(outgoing, _answer(render_jinja_template, request))


def _answer(render: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        (text,), _ = render(
            [request["messages"]],
            tools=request["tools"],
            chat_template=request["template"],
            add_generation_prompt=request["add_generation_prompt"],
            **request["special_tokens"],
        )
        if len(text) <= MAX_TEXT:
            return {"text": text}
        return {"costly": True, "why": _TOO_MUCH}
    except MemoryError:
        return {"costly": True, "why": _TOO_MUCH}
    except jinja2.TemplateError as error:  # includes what a template raises itself
        return {"costly": False, "why": str(error)[:200]}
    except Exception:  # an untrusted program may raise anything
        return {"costly": False, "why": "the model's chat template does not take these messages"}


if __name__ == "__main__":
    main()
