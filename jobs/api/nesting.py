"""JSON of bounded nesting.

The API server stores objects that are nested ten times deeper than Python's parser reads: one such
object in a list must not keep the operator from all others. What is nested too deeply is null here.
"""

from __future__ import annotations

import json
import re
from typing import Any

MAX_DEPTH = 100
MAX_PARTS = 1000  # lists and objects in what a pod writes
# Strings, closed or not, so that no input is scanned twice; and brackets.
_TOKEN = re.compile(rb'"(?:[^"\\]+|\\.)*+"?|[][{}]', re.DOTALL)


def loads(text: bytes) -> Any:
    """The value of trusted JSON `text`. Raises ValueError if it is not JSON."""
    try:
        return json.loads(text)
    except RecursionError:
        return json.loads(_shallow(text))


def loads_untrusted(text: bytes) -> Any:
    """The value of JSON that a pod wrote. Raises ValueError also for one of too many parts.

    Nesting is bounded even where the parser would not fail: what walks through the value might.
    """
    if text.count(b"[") + text.count(b"{") > MAX_PARTS:
        raise ValueError("too many lists and objects")
    return json.loads(_shallow(text))


def _shallow(text: bytes) -> bytes:
    """`text` with null in place of what is nested deeper than MAX_DEPTH."""
    kept: list[bytes] = []
    depth = start = 0
    for token in _TOKEN.finditer(text):
        match token[0]:
            case b"[" | b"{":
                depth += 1
                if depth == MAX_DEPTH + 1:
                    kept += [text[start : token.start()], b"null"]
                    start = len(text)
            case b"]" | b"}":
                if depth == MAX_DEPTH + 1:
                    start = token.end()
                depth -= 1
    return b"".join([*kept, text[start:]])


_LINK = re.compile("https?://[!-?A-~]{1,600}")  # no space, no login


def links(told: object) -> dict[str, str]:
    """The run's page at each tracker, of what a pod says: addresses of the web only."""
    found = told.items() if isinstance(told, dict) else ()
    return {k: v for k, v in found if k in ("mlflow", "wandb") and _LINK.fullmatch(f"{v}")}
