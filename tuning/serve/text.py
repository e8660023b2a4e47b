"""Tokens in, text out: whole characters only, and nothing of a stop string or after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

HELD = 12  # tokens that may wait for the rest of a character; then they are broken, and shown so


class Writer:
    """The text of one answer, as it comes."""

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = tuple(stops)
        self._longest = max((len(stop) for stop in stops), default=0)
        self._tokens: list[int] = []
        self._before = 0  # tokens up to here give the text before ...
        self._read = 0  # ... the tokens up to here, which are written
        self._held = ""  # written, but it may be the beginning of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain now that `token` has come."""
        self._tokens.append(token)
        known = self._decode(self._tokens[self._before : self._read])
        text = self._decode(self._tokens[self._before :])
        if text.endswith("\ufffd") and len(self._tokens) - self._read < HELD:
            return ""  # in the middle of a character
        self._before, self._read = self._read, len(self._tokens)
        return self._pass(text[len(known) :])

    def end(self) -> str:
        """The text that was held back, now that nothing follows."""
        if self.stopped:
            return ""
        known = self._decode(self._tokens[self._before : self._read])
        rest = self._pass(self._decode(self._tokens[self._before :])[len(known) :])
        held, self._held = self._held, ""
        return rest + held

    def _pass(self, text: str) -> str:
        if not self._stops:
            return text
        text = self._held + text
        found = [at for at in map(text.find, self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = next(
            (
                length
                for length in range(min(self._longest - 1, len(text)), 0, -1)
                if any(stop.startswith(text[-length:]) for stop in self._stops)
            ),
            0,
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
