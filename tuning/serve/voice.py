"""Words to tokens and back: one tokenizer, and the chat template of whoever answers.

Templates come with the base model or with an adapter, never with a request. They are programs,
which transformers runs in jinja's sandbox; that stops them from touching anything, not from taking
for ever or filling the memory. So an adapter's own template, which a stranger may have written, is
read first (`distrust`), and every rendering ends after `PATIENCE` seconds.
"""

from __future__ import annotations

import copy
import ctypes
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jinja2

from tuning import chat

T = TypeVar("T")
_MARKS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # transformers' own tags

PATIENCE = 5.0  # seconds
LONGEST = 100_000  # characters of a template
GROWS = frozenset({"center", "format", "indent", "wordwrap", "xmlattr"})  # filters, by an argument

Message = dict[str, str]


class NotRendered(Exception):
    """The template does not take these messages; the text says why, for whoever asked."""


class Voice:
    """How one model is spoken to."""

    def __init__(self, tokenizer: Any, model: Any, *, template: str | None = None) -> None:
        """`template` (Jinja text) stands in for the tokenizer's own."""
        self._tokenizer = tokenizer
        if template is not None and template != tokenizer.chat_template:
            self._tokenizer = copy.copy(tokenizer)
            self._tokenizer.chat_template = template
        self.chats = bool(self._tokenizer.chat_template)
        self.ends = frozenset(chat.stops(model, self._tokenizer))

    def conversation(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of `messages` and of the beginning of an answer. Raises NotRendered."""

        def render() -> str:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages), add_generation_prompt=True, tokenize=False
                )
            )

        if not self.chats:
            raise NotRendered("this model has no chat template; use /v1/completions")
        try:
            text = within(PATIENCE, render)
        except TimeoutError:
            raise NotRendered("the model's chat template takes too long") from None
        except jinja2.TemplateError as error:  # also what a template raises itself
            raise NotRendered(str(error)[:200]) from None
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError):
            raise NotRendered("the model's chat template does not take these messages") from None
        return self._ids(text, special=False)

    def plain(self, text: str) -> list[int]:
        """The tokens of a prompt that is no conversation."""
        return self._ids(text, special=True)

    def decode(self, ids: list[int]) -> str:
        """The text of generated tokens, without special ones."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def token(self, id: int) -> str:
        """One token by itself, special or not."""
        return str(self._tokenizer.decode([id]))

    def _ids(self, text: str, *, special: bool) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])


def distrust(template: str) -> str | None:
    """Why a stranger's template is not used; None if it is."""
    if len(template) > LONGEST:
        return f"its chat template has {len(template):,} characters"
    try:
        tree = jinja2.Environment(  # noqa: S701  only read, never rendered here
            extensions=["jinja2.ext.loopcontrols"]
        ).parse(_MARKS.sub("", template))
    except jinja2.TemplateError as error:
        return f"its chat template is wrong: {str(error)[:120]}"
    for node in tree.find_all((jinja2.nodes.Mul, jinja2.nodes.Pow, jinja2.nodes.Filter)):
        if not isinstance(node, jinja2.nodes.Filter):
            return "its chat template multiplies, which could fill the memory"
        if node.name in GROWS:
            return f"its chat template uses {node.name}, which could fill the memory"
    return None


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
