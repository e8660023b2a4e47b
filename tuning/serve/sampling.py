"""Samples the next token of one request with transformers' own logits processors.

Greedy unless the request or the model's generation config says otherwise, like `generate`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.generation import logits_process as processors

MIN_TEMPERATURE = 1e-5  # below it, sampling is greedy: the scaled logits would overflow


@dataclass(frozen=True)
class Sampling:
    """Sampling settings; the defaults are greedy."""

    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    seed: int | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < MIN_TEMPERATURE


@dataclass(frozen=True)
class SampledToken:
    """A token with its log-probability and the most likely tokens, before sampling settings."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Samples the tokens of one request, and remembers them for penalties."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], ends: frozenset[int]) -> None:
        self._sampling = sampling
        self._ids = list(prompt)
        self._prompt_length = len(prompt)
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
    def _may_end(self) -> bool:
        return len(self._ids) - self._prompt_length >= self._sampling.min_tokens

    @property
    def _is_argmax(self) -> bool:
        """Whether the next token is that of the largest logit."""
        s = self._sampling
        penalties = s.presence_penalty or s.frequency_penalty or self._repetition is not None
        return s.is_greedy and not penalties and self._may_end

    def sample(self, logits: torch.Tensor, likeliest: int) -> int:
        """The next token, from `logits` [vocabulary] in float32; `likeliest` is their argmax."""
        token = likeliest if self._is_argmax else self._draw(self._penalised(logits.clone()))
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
            counts = torch.tensor(list(self._counts.values()), device=scores.device)
            scores[seen] -= s.presence_penalty + s.frequency_penalty * counts
        if not self._may_end:
            scores[[end for end in self._ends if end < len(scores)]] = -torch.inf
        return scores

    def _draw(self, scores: torch.Tensor) -> int:
        if self._sampling.is_greedy:
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
    """The logits warpers of `s`, in the order of `generate`."""
    warpers: list[processors.LogitsProcessor] = []
    if not s.is_greedy and s.temperature != 1:
        warpers.append(processors.TemperatureLogitsWarper(s.temperature))
    if s.top_k:
        warpers.append(processors.TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        warpers.append(processors.TopPLogitsWarper(s.top_p))
    if s.min_p:
        warpers.append(processors.MinPLogitsWarper(s.min_p))
    if s.typical_p < 1:
        warpers.append(processors.TypicalLogitsWarper(s.typical_p))
    return warpers


def with_logprobs(logits: torch.Tensor, token: int, count: int | None) -> SampledToken:
    """`token` with its log-probability and the `count` most likely tokens; None: neither."""
    if count is None:
        return SampledToken(token, None, ())
    return all_with_logprobs(logits[None], [token], count)[0]


def all_with_logprobs(
    logits: torch.Tensor, tokens: Sequence[int], count: int
) -> list[SampledToken]:
    """The same for several tokens, from `logits` [tokens, vocabulary] in float32."""
    logprobs = logits.log_softmax(-1)
    top = logprobs.topk(min(count, logprobs.shape[-1]))
    chosen = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
    columns = (chosen.tolist(), top.indices.tolist(), top.values.tolist())
    return [
        SampledToken(token, logprob, tuple(zip(ids, values, strict=True)))
        for token, logprob, ids, values in zip(tokens, *columns, strict=True)
    ]
