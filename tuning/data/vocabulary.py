"""Token ids against the rows of the base model's embedding.

Where the tokenizer is on this machine, `check` encodes the first rows as a run does.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tuning import files, presets
from tuning.data.formats import Fault, Plain, Tokens
from tuning.errors import SpecError

if TYPE_CHECKING:
    from tuning.data.encode import Encoder


@dataclass
class Vocabulary:
    """The size of the base model's embedding, and where its tokenizer is."""

    rows: int | None = None  # of the embedding; None: unknown
    folder: Path | None = None  # with the tokenizer, where it is on this machine
    template: str | None = None  # the user's chat template
    new_tokens: tuple[str, ...] = ()  # the user's, which get rows of their own
    train_on: Literal["assistant", "all"] = "assistant"

    def faults(self, examples: Sequence[Plain]) -> list[Fault | None]:
        """For each example its fault: a token id without a row, or what encoding says, or None."""
        from tuning.data.encode import beyond_embedding

        if self._encoder and examples:
            self._encoder.raw_pairs = None  # each file decides for itself
            encoded = self._encoder.encode(examples)
            return [each if isinstance(each, Fault) else None for each in encoded]
        if self.rows is None:
            return [None] * len(examples)
        largest = [max(each.input_ids) if isinstance(each, Tokens) else -1 for each in examples]
        rows = self.rows + len(self.new_tokens)
        return [beyond_embedding(n, rows) if n >= rows else None for n in largest]

    @cached_property
    def _encoder(self) -> Encoder | None:
        """What a run encodes rows with; None where the tokenizer is not on this machine."""
        from tuning.data.encode import Encoder
        from tuning.data.tokenizer import load_template, load_tokenizer

        if self.folder is None:
            return None
        tokenizer = load_tokenizer(self.folder, self.new_tokens, self.template)
        return Encoder(
            tokenizer,
            load_template(tokenizer, self.template),
            train_on=self.train_on,
            embedding_rows=self.rows,
            new_tokens=len(self.new_tokens),
        )


def embedding_rows(base: Path) -> int | None:
    """The rows of the token embedding, as config.json of the folder `base` says; None if unknown.

    A tokenizer may have more tokens (an added pad token), of which only those in use matter, or
    fewer (an embedding padded to a round size).
    """
    try:
        config = files.read_json(base / "config.json")
    except (OSError, ValueError):
        return None  # reading the model says more
    if not isinstance(config, dict):
        return None
    with suppress(SpecError):
        if facts := presets.facts(config):
            return facts.vocab
    parts = (config, config.get("text_config"))
    sizes = (part.get("vocab_size") for part in parts if isinstance(part, dict))
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)
