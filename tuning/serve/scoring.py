"""Log-probabilities of a prompt's own tokens, for evaluation by likelihood.

A forward pass computes logits only where a token is to be generated: the logits of a whole prompt,
its length times the vocabulary, may not fit beside the model. Here the hidden states of the pass
are kept, and the model's own head turns a few rows of them at a time into logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch

ROWS = 32  # of logits at once


class Scored(Protocol):
    """The part of a request that is scored."""

    @property
    def unscored(self) -> int:
        """Tokens of the prompt whose log-probabilities are wanted and not known yet."""

    def score(self, logits: torch.Tensor) -> None:
        """Take the `logits` [tokens, vocabulary] in float32 of the next unscored tokens."""


class PromptScorer:
    """Scores the prompts in the forward passes of a model, which reads each from its start."""

    def __init__(self, model: Any) -> None:
        self._model, self._decoder = model, model.base_model
        self._is_wanted = False
        self._output: Any = None  # of the decoder
        self._hook = self._decoder.register_forward_hook(self._keep)

    def remove(self) -> None:
        """Detach from the model."""
        self._hook.remove()

    def expect(self, works: Iterable[Scored | None]) -> None:
        """Prepare for a forward pass of `works`."""
        self._is_wanted = any(work is not None and work.unscored for work in works)

    @torch.no_grad()
    def score(self, row: Iterable[tuple[Scored | None, int]]) -> None:
        """Score the requests of the last pass, which read so many tokens of each."""
        if not self._is_wanted:
            return
        self._is_wanted, start = False, 0
        hidden = self._output.last_hidden_state[0]
        for work, count in row:
            known = min(count, work.unscored) if work is not None else 0
            for first in range(start, start + known, ROWS):
                assert work is not None
                work.score(self._logits(hidden[first : min(first + ROWS, start + known)]).float())
            start += count
        self._output = None

    def _keep(self, decoder: Any, args: Any, output: Any) -> None:
        if self._is_wanted:
            self._output = output

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the model makes of `hidden` [tokens, width] behind its decoder.

        That is a product with the vocabulary, and whatever the family does to it (scaling, a cap),
        so the model's own code computes it, with a decoder that returns `hidden`.
        """
        output = type(self._output)(last_hidden_state=hidden[None])
        self._decoder.forward = lambda *args, **kwargs: output
        try:
            ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            logits: torch.Tensor = self._model.forward(input_ids=ids, use_cache=False).logits[0]
            return logits
        finally:
            del self._decoder.forward
