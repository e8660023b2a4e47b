"""JSON of bounded nesting.

The API server stores objects that are nested ten times deeper than Python's parser reads: one such
object in a list must not keep the operator from all others. What is nested too deeply is null here.
"""

from __future__ import annotations

import json
import re
from typing import Any

MAX_DEPTH = 100
# Strings, closed or not, so that no input is scanned twice; and brackets.
_TOKEN = re.compile(rb'"(?:[^"\\]+|\\.)*+"?|[][{}]', re.DOTALL)


def loads(text: bytes) -> Any:
    """The value of trusted JSON `text`. Raises ValueError if it is not JSON."""
    try:
        return json.loads(text)
    except RecursionError:
        return loads_untrusted(text)


def loads_untrusted(text: bytes) -> Any:
    """The same with all that is nested deeper than MAX_DEPTH replaced, also where the parser would
    not fail: another function that walks through the value might."""
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
    return json.loads(b"".join([*kept, text[start:]]))
