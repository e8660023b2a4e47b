"""Rows for people to look at: each token's text and whether it is trained."""

from __future__ import annotations

from typing import Any

from tuning.data.encode import Encoded

TOKENS = 1000  # shown of a row


def flags(encoded: Encoded) -> list[bool]:
    """For each token whether it is trained."""
    made = [False] * len(encoded.ids)
    for start, end in zip(encoded.trained[::2], encoded.trained[1::2], strict=True):
        made[start:end] = [True] * (end - start)
    return made


def spelled(tokenizer: Any, encoded: Encoded) -> list[list[Any]]:
    """[text, trained] for each of the first tokens; those that share a character are joined."""
    made: list[list[Any]] = []
    run: list[int] = []
    for token, trained in list(zip(encoded.ids, flags(encoded), strict=True))[:TOKENS]:
        run.append(token)
        text = tokenizer.decode(run, clean_up_tokenization_spaces=False)
        if not text.endswith("\ufffd") or len(run) > 4:
            made.append([text, trained])
            run = []
    return made
