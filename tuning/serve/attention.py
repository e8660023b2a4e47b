"""Block-diagonal attention: each request of a packed batch attends to itself only.

Continuous batching packs all requests into one row, and transformers' `sdpa` computes the whole
row of queries against all keys under a mask: eight prompts of a thousand tokens cost eight times
their own work (measured: 60 % of the time of a busy server with long prompts). Here each block on
the diagonal is computed separately: every chunk of a prompt, and the single tokens of answers
together unless their keys are too many. A single token alone also saves copying its keys for each
query head of a group: with 100 million parameters and 8 clients on two CPU cores, 2.7 times a
plain loop became 3.05 (benchmarks/serve.py). Keys, mask and kernel are transformers' own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

SPANS = "request_spans"
"""Argument of a forward pass: (ends of queries, layer type -> ends of keys), as numbers."""

# Keys times width above which a single token gets a call of its own: the overhead of a call.
CALL_OVERHEAD = {"cpu": 1 << 16, "cuda": 1 << 28}


def install() -> None:
    """Register this as transformers' `sdpa`; without spans it behaves as before."""
    AttentionInterface.register("sdpa", attend)


def spans(kwargs: dict[str, Any]) -> tuple[list[int], dict[str, list[int]]]:
    """The spans of a batch, from the arguments that the batching manager passes to the model."""
    keys = {kind: ends.tolist() for kind, ends in kwargs["cu_seq_lens_k"].items()}
    return kwargs["cu_seq_lens_q"].tolist(), keys


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function for transformers: [1, heads, tokens, width] -> [1, tokens, ...]."""
    request_spans = kwargs.pop(SPANS, None)
    if request_spans is None or attention_mask is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, cache=cache, **kwargs
        )
        return out, None
    key, value = cache.update(
        key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs
    )
    queries, keys_by_type = request_spans
    keys = keys_by_type[cache.layer_to_allocator[module.layer_idx].layer_type]
    width = query.shape[1] * query.shape[3]
    parts = [
        sdpa_attention_forward(
            module,
            query[:, :, q],
            key[:, :, k],
            value[:, :, k],
            attention_mask[..., q, k],
            **kwargs,
        )[0]
        for q, k in blocks(queries, keys, CALL_OVERHEAD[query.device.type] // width)
    ]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], None


def blocks(
    queries: Sequence[int], keys: Sequence[int], max_shared_keys: int
) -> Iterator[tuple[slice, slice]]:
    """The queries and keys of each call; neighbouring requests of one query may share a call.

    `queries` and `keys` hold the boundaries of requests; a shared call has at most
    `max_shared_keys` keys.
    """
    first, number = 0, len(queries) - 1
    while first < number:
        last = first + 1
        if queries[last] - queries[first] == 1:
            while (
                last < number
                and queries[last + 1] - queries[last] == 1
                and keys[last + 1] - keys[first] <= max_shared_keys
            ):
                last += 1
        yield slice(queries[first], queries[last]), slice(keys[first], keys[last])
        first = last
