"""Token ids against the rows of the base model's embedding.

`check` encodes rows only where an id may be too large, because loading a tokenizer takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from tuning import files, presets
from tuning.data.formats import Fault, Plain, Tokens
from tuning.errors import SpecError


@dataclass
class Vocabulary:
    """The size of the base model's embedding, and where its tokenizer is."""

    rows: int | None = None  # of the embedding; None: unknown
    folder: Path | None = None  # with the tokenizer, where it is on this machine
    template: str | None = None  # the user's chat template
    new_tokens: tuple[str, ...] = ()  # the user's, which get rows of their own

    def faults(self, examples: Sequence[Plain]) -> list[Fault | None]:
        """For each example the fault that it has a token id without a row, or None."""
        from tuning.data.encode import Encoder, beyond_embedding
        from tuning.data.tokenizer import load_template, load_tokenizer

        if self.rows is None:
            return [None] * len(examples)
        if self.folder and self._may_exceed:
            tokenizer = load_tokenizer(self.folder, self.new_tokens, self.template)
            template = load_template(tokenizer, self.template)
            encoder = Encoder(
                tokenizer,
                template,
                train_on="all",
                embedding_rows=self.rows,
                new_tokens=len(self.new_tokens),
            )
            encoded = encoder.encode(examples)
            return [each if isinstance(each, Fault) else None for each in encoded]
        largest = [max(each.input_ids) if isinstance(each, Tokens) else -1 for each in examples]
        rows = self.rows + len(self.new_tokens)
        return [beyond_embedding(n, rows) if n >= rows else None for n in largest]

    @cached_property
    def _may_exceed(self) -> bool:
        assert self.folder is not None and self.rows is not None
        return largest_id(self.folder) >= self.rows


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


def largest_id(base: Path) -> int:
    """The largest token id in tokenizer.json of the folder `base`; -1 if it cannot be read."""
    try:
        return max(Tokenizer.from_file(str(base / "tokenizer.json")).get_vocab().values())
    except Exception:  # the library raises nothing narrower; loading the tokenizer says more
        return -1
