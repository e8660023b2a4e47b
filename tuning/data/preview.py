"""Tokenised rows for people: the text of each token, and whether it is trained."""

from __future__ import annotations

from typing import Any

from tuning.data.encode import Encoded

MAX_TOKENS = 1000  # shown of a row


def token_flags(encoded: Encoded) -> list[bool]:
    """For each token whether it is trained."""
    flags = [False] * len(encoded.ids)
    for start, end in zip(encoded.trained[::2], encoded.trained[1::2], strict=True):
        flags[start:end] = [True] * (end - start)
    return flags


def preview_tokens(tokenizer: Any, encoded: Encoded) -> list[list[Any]]:
    """[text, trained] for each of the first tokens; tokens that share a character are joined."""
    shown: list[list[Any]] = []
    pending: list[int] = []
    for token, trained in list(zip(encoded.ids, token_flags(encoded), strict=True))[:MAX_TOKENS]:
        pending.append(token)
        text = tokenizer.decode(pending, clean_up_tokenization_spaces=False)
        if not text.endswith("\ufffd") or len(pending) > 4:
            shown.append([text, trained])
            pending = []
    return shown
