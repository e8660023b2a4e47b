"""WWW-Authenticate headers -> challenges, whatever a registry or the proxy before it sends.

RFC 9110, 11.6.1: several challenges in one header or in several, any scheme, names in any case,
with parameters or with a token68. Broken quoting, missing commas and plain noise are read as far as
they go: nothing is an error here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.request import parse_http_list

Challenge = dict[str, str]  # of a registry: realm, service, scope; after a refusal error
LONGEST = 1 << 13  # characters of a header that are read
_NAME = r"(?<![\w!#$%&'*+.^`|~-])([\w!#$%&'*+.^`|~-]++)"
_SCHEME = re.compile(_NAME, re.ASCII)
_PARAMETER = re.compile(rf"{_NAME}[ \t]*=[ \t]*(\"(?:[^\"\\]|\\.)*\"?|[^\s,;]*)", re.ASCII)


def parse(headers: Iterable[str]) -> dict[str, Challenge]:
    """The challenges of the headers' values by scheme, in lower case like parameters' names.

    Of two with the same scheme the first that names a realm counts.
    """
    read: list[tuple[str, Challenge]] = []
    for header in headers:
        read.append(("", {}))  # for parameters before any scheme
        for element in parse_http_list(header[:LONGEST]):
            if not _PARAMETER.match(element) and (name := _SCHEME.search(element)):
                read.append((name[1].lower(), {}))
                element = element[name.end() :]
            for key, value in _PARAMETER.findall(element):
                read[-1][1].setdefault(key.lower(), _unquoted(value))
    challenges: dict[str, Challenge] = {}
    for scheme, parameters in read:
        if scheme and not challenges.get(scheme, {}).get("realm"):
            challenges[scheme] = parameters
    return challenges


def _unquoted(value: str) -> str:
    if value.startswith('"'):
        return re.sub(r"\\(.)", r"\1", value[1:].removesuffix('"'))
    return value.strip("'")
