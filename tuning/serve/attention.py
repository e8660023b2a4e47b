"""Attention of each request to itself, where many lie in one row.

With transformers' `sdpa` a batch is one row of queries against one of keys, and a mask hides every
request from every other: eight prompts of a thousand tokens cost eight times what they would cost
alone (measured: six tenths of the time of a busy server with long prompts). So the blocks on the
diagonal are computed by themselves: every piece of a prompt, and the single tokens of answers
together unless their keys are too many. A single token alone also spares the copy of its keys for
each query head of a group: with 100 million parameters and 8 clients on two CPU cores, 2.7 times a
plain loop became 3.05 (benchmarks/serve.py). The keys, the mask and the function are transformers'
own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

SPANS = "request_spans"
"""Argument of a forward pass: (ends of queries, layer type -> ends of keys), as numbers."""

# Keys times width, above which single tokens are worth a call each: what a call costs, in work.
WORTH = {"cpu": 1 << 16, "cuda": 1 << 28}


def install() -> None:
    """Make this transformers' `sdpa`; without spans it is what it was."""
    AttentionInterface.register("sdpa", attend)


def spans(kwargs: dict[str, Any]) -> tuple[list[int], dict[str, list[int]]]:
    """The spans of a batch, from the arguments that the manager gives the model."""
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
    found = kwargs.pop(SPANS, None)
    if found is None or attention_mask is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, cache=cache, **kwargs
        )
        return out, None
    key, value = cache.update(
        key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs
    )
    queries, keys = found[0], found[1][cache.layer_to_allocator[module.layer_idx].layer_type]
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
        for q, k in blocks(queries, keys, WORTH[query.device.type] // width)
    ]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], None


def blocks(
    queries: Sequence[int], keys: Sequence[int], together: int
) -> Iterator[tuple[slice, slice]]:
    """Which queries go with which keys in one call; neighbours of one query each may go together.

    `queries` and `keys` are where requests begin and end; `together` is how many keys are not worth
    a call of their own.
    """
    first, number = 0, len(queries) - 1
    while first < number:
        last = first + 1
        if queries[last] - queries[first] == 1:
            while (
                last < number
                and queries[last + 1] - queries[last] == 1
                and keys[last + 1] - keys[first] <= together
            ):
                last += 1
        yield slice(queries[first], queries[last]), slice(keys[first], keys[last])
        first = last
