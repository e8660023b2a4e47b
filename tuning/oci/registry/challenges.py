"""WWW-Authenticate headers -> challenges, whatever a registry or the proxy before it sends.

RFC 9110, 11.6.1: several challenges in one header or in several, any scheme, names in any case,
with parameters or with a token68. Broken quoting, missing commas and plain noise are read as far as
they go: nothing is an error here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

Challenge = dict[str, str]  # of a registry: realm, service, scope; after a refusal error
LONGEST = 1 << 13  # characters of a header that are read
_QUOTED = r'"(?:[^"\\]|\\.)*"?'
_NAME = r"(?<![\w!#$%&'*+.^`|~-])([\w!#$%&'*+.^`|~-]++)"
_VALUE = rf'{_QUOTED}|[^\s,;"]*'
_ITEM = re.compile(rf"{_NAME}(?:[ \t]*=[ \t]*({_VALUE}))?|{_QUOTED}", re.ASCII | re.DOTALL)


def parse(headers: Iterable[str]) -> dict[str, Challenge]:
    """The challenges of the headers' values by scheme, in lower case like parameters' names.

    Of two with the same scheme the first that names a realm counts.
    """
    read: list[tuple[str, Challenge]] = []
    for header in headers:
        end = 0
        read.append(("", {}))  # for parameters before any scheme
        for item in _ITEM.finditer(header[:LONGEST]):
            name, value, before = (item[1] or "").lower(), item[2], header[end : item.start()]
            if value is not None:
                read[-1][1].setdefault(name, _unquoted(value))
            elif name and (not end or "," in before or name in ("basic", "bearer")):
                read.append((name, {}))  # a word within a list is a token68
            end = item.end()
    challenges: dict[str, Challenge] = {}
    for scheme, parameters in read:
        if scheme and not challenges.get(scheme, {}).get("realm"):
            challenges[scheme] = parameters
    return challenges


def _unquoted(value: str) -> str:
    if value.startswith('"'):
        return re.sub(r"\\(.)", r"\1", value[1:].removesuffix('"'))
    return value.strip("'")
