"""Words to tokens and back: one tokenizer, and the chat template of whoever answers.

Templates come with the base model or with an adapter, never with a request. They are programs,
which transformers runs in jinja's sandbox; that stops them from touching anything, not from taking
for ever or filling the memory. The base's own is ended after `PATIENCE` seconds; an adapter's,
which a stranger may have written, is rendered in another process (`rendering`).
"""

from __future__ import annotations

import copy
import ctypes
import json
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import jinja2

from tuning.models import generate
from tuning.serve.rendering import PATIENCE, Costly, Message, NotRendered, Renderer

T = TypeVar("T")
_MARKS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # transformers' own tags
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how tokenizers with pieces spell a byte

LONGEST = 100_000  # characters of a template
_HELLO: list[Message] = [{"role": "user", "content": "hello"}]
_SYSTEM: Message = {"role": "system", "content": "be short"}


class Voice:
    """How one model is spoken to."""

    def __init__(
        self,
        tokenizer: Any,
        model: Any,
        *,
        template: str | None = None,
        renderer: Renderer | None = None,
    ) -> None:
        """`template` (Jinja text), rendered by `renderer`, stands in for the tokenizer's own."""
        self._tokenizer = tokenizer
        self._render: Callable[..., str] = self._own
        self.apart = False  # whether a stranger's template is rendered, which may take its time
        if template is not None and template != tokenizer.chat_template:
            assert renderer is not None
            self._tokenizer = copy.copy(tokenizer)
            self._tokenizer.chat_template = template
            self._render = partial(_apart, renderer, tokenizer, template)
            self.apart = True
        self.chats = bool(self._tokenizer.chat_template)
        self._spelled = _spelling(tokenizer)
        self.ends = frozenset(generate.stops(model, self._tokenizer, self._turns))

    def shown(self, messages: Sequence[Message]) -> str:
        """The text of `messages` and of the beginning of an answer. Raises NotRendered."""
        if not self.chats:
            raise NotRendered("this model has no chat template; use /v1/completions")
        return self._render(messages, ask=True)

    def conversation(self, text: str) -> list[int]:
        """The tokens of what is `shown`."""
        return self._ids(text, special=False)

    def plain(self, text: str) -> list[int]:
        """The tokens of a prompt that is no conversation."""
        return self._ids(text, special=True)

    def decode(self, ids: list[int]) -> str:
        """The text of generated tokens, without special ones."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def token(self, id: int) -> bytes:
        """One token by itself, special or not, as it stands in a text: perhaps half a character."""
        word = self._tokenizer.convert_ids_to_tokens(id)
        return b"" if word is None else self._spelled(str(word))

    def _turns(self, turns: list[dict[str, str]]) -> str:
        """`turns`, behind a system's if the template wants one; nothing if it takes neither."""
        for more in ([], [_SYSTEM]):
            try:
                return self._render([*more, *turns], ask=False) if self.chats else ""
            except NotRendered:
                continue
        return ""

    def _own(self, messages: Sequence[Message], *, ask: bool) -> str:
        """By the tokenizer's own template."""

        def render() -> str:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages), add_generation_prompt=ask, tokenize=False
                )
            )

        try:
            return within(PATIENCE, render)
        except TimeoutError:
            raise Costly("the model's chat template takes too long") from None
        except jinja2.TemplateError as error:  # also what a template raises itself
            raise NotRendered(str(error)[:200]) from None
        except Exception:  # a template is a stranger's program: it may raise anything
            raise NotRendered("the model's chat template does not take these messages") from None

    def _ids(self, text: str, *, special: bool) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])


def _apart(
    renderer: Renderer,
    tokenizer: Any,
    template: str,
    messages: Sequence[Message],
    *,
    ask: bool,
) -> str:
    return renderer(template, messages, ask=ask, words=tokenizer.special_tokens_map)


def _spelling(tokenizer: Any) -> Callable[[str], bytes]:
    """How the tokenizer's words become bytes: it spells each in printable characters."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        return lambda word: str(tokenizer.convert_tokens_to_string([word])).encode()
    decoder = json.dumps(json.loads(fast.to_str()).get("decoder"))
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    if '"ByteLevel"' in decoder:
        letters = _letters()

        def of_bytes(word: str) -> bytes:
            if word in added or not all(letter in letters for letter in word):
                return word.encode()
            return bytes(letters[letter] for letter in word)

        return of_bytes

    def of_pieces(word: str) -> bytes:
        if found := _BYTE.fullmatch(word):
            return bytes([int(found[1], 16)])
        if word in added:
            return word.encode()
        return word.replace("\u2581", " ").encode()

    return of_pieces


def _letters() -> dict[str, int]:
    """The bytes of GPT-2's alphabet, by letter: printable ones are themselves, others follow 255.

    Source: bytes_to_unicode in https://github.com/openai/gpt-2/blob/master/src/encoder.py
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    found = {chr(byte): byte for byte in printable}
    return found | {chr(256 + number): byte for number, byte in enumerate(others)}


def distrust(template: str, renderer: Renderer, words: Mapping[str, str]) -> str | None:
    """Why a stranger's template is not used; None if it is."""
    if len(template) > LONGEST:
        return f"its chat template has {len(template):,} characters"
    try:
        jinja2.Environment(  # noqa: S701  only read, never rendered here
            extensions=["jinja2.ext.loopcontrols"]
        ).parse(_MARKS.sub("", template))
    except jinja2.TemplateError as error:
        return f"its chat template is wrong: {str(error)[:120]}"
    why = ""
    for turns in (_HELLO, [_SYSTEM, *_HELLO]):
        try:
            renderer(template, turns, ask=True, words=words)
        except NotRendered as error:
            why = why or str(error)
            if isinstance(error, Costly):
                break
        else:
            return None
    return f"its chat template does not take a question: {why}"


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns, or TimeoutError raised inside of it after so many seconds.

    Ends a loop of Python code, which a template is; not a call that never comes back to Python.
    """
    thread, lock = threading.get_ident(), threading.Lock()
    done = late = False

    def interrupt() -> None:
        nonlocal late
        with lock:
            if not done:
                late = True
                error = ctypes.py_object(TimeoutError)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), error)

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    arrived = False
    try:
        return work()
    except TimeoutError:
        arrived = True
        raise
    finally:
        with lock:
            done = True
        timer.cancel()
        while late and not arrived:  # it is on its way, and must not hit what comes next
            time.sleep(0.01)
