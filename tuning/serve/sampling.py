"""Choosing the next token of one request, with transformers' own processors.

Greedy unless the request, or the model's generation config, says otherwise: what `generate` does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.generation import logits_process as processors

COLD = 1e-5  # a temperature below it leaves the likeliest token alone, and numbers that overflow


@dataclass(frozen=True)
class Sampling:
    """How to choose; the defaults leave everything to the largest logit."""

    temperature: float = 0.0  # 0: the likeliest token
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0  # no end before so many
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is chosen."""
        return self.temperature < COLD


@dataclass(frozen=True)
class Choice:
    """A token, its log-probability by the model itself, and the likeliest others."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class Chooser:
    """The state of choosing for one request."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], ends: frozenset[int]) -> None:
        self._sampling = sampling
        self._ids = list(prompt)
        self._prompt = len(prompt)
        self._ends = sorted(ends)
        self._counts: Counter[int] = Counter()
        self._generator: torch.Generator | None = None
        self._warpers = _warpers(sampling)
        self._repetition = (
            processors.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
            if sampling.repetition_penalty != 1.0
            else None
        )

    @property
    def _plain(self) -> bool:
        """Whether the next token is simply that of the largest logit."""
        s = self._sampling
        penalties = s.presence_penalty or s.frequency_penalty or self._repetition is not None
        early = len(self._ids) - self._prompt < s.min_tokens
        return s.greedy and not penalties and not early

    def choose(self, logits: torch.Tensor, likeliest: int) -> int:
        """The next token, from `logits` [vocabulary] in float32; it is remembered."""
        token = likeliest if self._plain else self._choose(self._penalised(logits.clone()))
        self._ids.append(token)
        self._counts[token] += 1
        return token

    def _penalised(self, scores: torch.Tensor) -> torch.Tensor:
        s = self._sampling
        if self._repetition is not None:
            ids = torch.tensor([self._ids], device=scores.device)
            scores = self._repetition(ids, scores[None])[0]
        if (s.presence_penalty or s.frequency_penalty) and self._counts:
            seen = torch.tensor(list(self._counts), device=scores.device)
            often = torch.tensor(list(self._counts.values()), device=scores.device)
            scores[seen] -= s.presence_penalty + s.frequency_penalty * often
        if len(self._ids) - self._prompt < s.min_tokens:
            scores[[end for end in self._ends if end < len(scores)]] = -torch.inf
        return scores

    def _choose(self, scores: torch.Tensor) -> int:
        if self._sampling.greedy:
            return int(scores.argmax())
        scores = scores[None]
        for warp in self._warpers:
            scores = warp(None, scores)
        if self._generator is None:
            self._generator = torch.Generator(device=scores.device)
            if self._sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self._sampling.seed)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))


def _warpers(s: Sampling) -> list[processors.LogitsProcessor]:
    """In the order of `generate`."""
    found: list[processors.LogitsProcessor] = []
    if not s.greedy and s.temperature != 1:
        found.append(processors.TemperatureLogitsWarper(s.temperature))
    if s.top_k:
        found.append(processors.TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        found.append(processors.TopPLogitsWarper(s.top_p))
    if s.min_p:
        found.append(processors.MinPLogitsWarper(s.min_p))
    if s.typical_p < 1:
        found.append(processors.TypicalLogitsWarper(s.typical_p))
    return found


def judge(logits: torch.Tensor, token: int, top: int | None) -> Choice:
    """`token` with what the model itself thought of it, and its `top` likeliest tokens.

    `top` None asks for no probabilities at all.
    """
    if top is None:
        return Choice(token, None, ())
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(min(top, logprobs.shape[-1]))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return Choice(token, float(logprobs[token]), tuple(pairs))
