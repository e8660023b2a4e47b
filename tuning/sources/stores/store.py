"""What every object store has in common."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

_CODE = re.compile(r"<Code>(\w{1,80})</Code>")


@dataclass(frozen=True)
class Signed:
    """A GET of a store's file with what proves that it is ours, good for some minutes."""

    url: str = field(repr=False)  # the address, with a signature in its query where one is
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


class Store(Protocol):
    """A place of one file."""

    @property
    def address(self) -> str:
        """Where it is asked for; holds no secret."""
        ...

    @property
    def identity(self) -> str:
        """What tells its store from others in which the same URL names another file; no secret."""
        ...

    def signed(self, headers: Mapping[str, str]) -> Signed:
        """A GET of the address with `headers`, from now on. The headers found are more of them."""
        ...

    def moved(self, headers: Mapping[str, str], body: str) -> str | None:
        """Where to ask again: an address that a refusal points to, or the same with a login.

        None if there is no such way, or if it was gone before.
        """
        ...

    def meaning(self, status: int, body: str) -> tuple[str, str]:
        """What is wrong, and what to change; never a text of the answer's."""
        ...


def code_of(body: str, status: int) -> str:
    """The code in an answer's XML, in which all stores write their reasons; else the status."""
    found = _CODE.search(body)
    return found[1] if found else str(status)
