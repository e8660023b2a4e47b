"""Tokens to text, one token at a time: whole characters only, cut at the first stop string."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

MAX_PENDING = 12  # tokens to wait for the rest of a character; then it is shown broken
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a byte in a sentencepiece vocabulary


class Detokenizer:
    """Decodes one answer incrementally."""

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = tuple(stops)
        self._longest = max((len(stop) for stop in stops), default=0)
        self._tokens: list[int] = []
        self._context = 0  # decoding starts here, so that white space at a boundary is kept
        self._read = 0  # tokens before this one are in the text
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain after `token`."""
        self._tokens.append(token)
        known = self._decode(self._tokens[self._context : self._read])
        text = self._decode(self._tokens[self._context :])
        if text.endswith("\ufffd") and len(self._tokens) - self._read < MAX_PENDING:
            return ""  # in the middle of a character
        self._context, self._read = self._read, len(self._tokens)
        return self._until_stop(text[len(known) :])

    def end(self) -> str:
        """The text held back so far; no token follows."""
        if self.stopped:
            return ""
        known = self._decode(self._tokens[self._context : self._read])
        rest = self._until_stop(self._decode(self._tokens[self._context :])[len(known) :])
        held, self._held = self._held, ""
        return rest + held

    def _until_stop(self, text: str) -> str:
        """`text` up to a stop string; an end that may begin one is held back."""
        if not self._stops:
            return text
        text = self._held + text
        positions = [at for at in map(text.find, self._stops) if at >= 0]
        if positions:
            self.stopped, self._held = True, ""
            return text[: min(positions)]
        lengths = range(min(self._longest - 1, len(text)), 0, -1)
        begins = (n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops))
        certain = len(text) - next(begins, 0)
        self._held = text[certain:]
        return text[:certain]


def vocabulary_decoder(tokenizer: Any) -> Callable[[str], bytes]:
    """Maps an entry of the vocabulary to the bytes it stands for."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        return lambda entry: str(tokenizer.convert_tokens_to_string([entry])).encode()
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    if '"ByteLevel"' in json.dumps(json.loads(fast.to_str()).get("decoder")):
        byte_of = _byte_alphabet()

        def from_bytes(entry: str) -> bytes:
            if entry in added or not all(letter in byte_of for letter in entry):
                return entry.encode()
            return bytes(byte_of[letter] for letter in entry)

        return from_bytes

    def from_pieces(entry: str) -> bytes:
        if match := _BYTE.fullmatch(entry):
            return bytes([int(match[1], 16)])
        return entry.encode() if entry in added else entry.replace("\u2581", " ").encode()

    return from_pieces


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's byte alphabet, letter to byte: printable bytes are themselves, others follow 255.

    Source: bytes_to_unicode in https://github.com/openai/gpt-2/blob/master/src/encoder.py
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + number): byte for number, byte in enumerate(others)}
