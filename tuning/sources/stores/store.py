"""The interface of an object store."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

_CODE = re.compile(r"<Code>(\w{1,80})</Code>")


@dataclass(frozen=True)
class Signed:
    """A signed GET of a store's file, valid for some minutes."""

    url: str = field(repr=False)  # the address, maybe with a signature in its query
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


class Store(Protocol):
    """One file of a store."""

    @property
    def address(self) -> str:
        """Its https URL. Not secret."""
        ...

    @property
    def identity(self) -> str:
        """Identifies the store (endpoint, account) in cache keys. Not secret."""
        ...

    def signed(self, headers: Mapping[str, str]) -> Signed:
        """A signed GET of the address with `headers`; the result holds further headers."""
        ...

    def moved(self, headers: Mapping[str, str], body: str) -> str | None:
        """The address to try after a refusal: where it points to, or the same with a login.

        None if there is none, or it was tried before.
        """
        ...

    def meaning(self, status: int, body: str) -> tuple[str, str]:
        """The problem and its remedy; never text of the answer."""
        ...


def code_of(body: str, status: int) -> str:
    """The error code in an answer's XML, else the status."""
    match = _CODE.search(body)
    return match[1] if match else str(status)
