"""Attention of packed rows over torch's own variable-length flash kernel, for transformers.

Registered as `torch_varlen`. Where a batch brings the offsets of its documents (`cu_seq_lens_q`, as
trl's collator makes them), each document sees itself alone and no mask of all pairs is built; any
other call (generation, padded rows) is transformers' own sdpa. Without a GPU the same is computed
document by document: exactly what the kernel's tests compare with, and itself faster than a mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import varlen
from transformers.integrations import sdpa_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tuning.plan.backends import VARLEN

HALVES = (torch.float16, torch.bfloat16)


def by_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    *,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """Causal attention within each document, one after the other, on any device.

    `query` is [tokens, heads, width], `key` and `value` may have fewer heads; document i holds the
    tokens offsets[i] to offsets[i + 1]. A token sees `window` tokens, itself included.
    """
    lengths, dtype = offsets.diff().tolist(), query.dtype
    if query.device.type == "cpu":  # whose attention takes twice as long in 16 bits
        query, key, value = query.float(), key.float(), value.float()
    grouped = key.shape[1] != query.shape[1]
    # split, not slices: the backward of a slice fills a whole tensor for each document
    parts = [torch.split(t.transpose(0, 1)[None], lengths, dim=2) for t in (query, key, value)]
    outputs = []
    for q, k, v in zip(*parts, strict=True):
        length = q.shape[2]
        options: dict[str, Any] = {"is_causal": True}
        if window is not None and window < length:
            seen = torch.ones(length, length, dtype=torch.bool, device=q.device)
            options = {"attn_mask": seen.tril().triu(1 - window)}
        out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped, **options)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs).to(dtype)


@cache
def _grouped(kernel: Callable[..., Any]) -> bool:
    """Whether keys may have fewer heads: torch 2.12 and newer; 2.11 wants as many as queries."""
    return "enable_gqa" in inspect.signature(kernel).parameters


def by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    *,
    longest: int,
    scale: float | None,
    window: int | None,
    kernel: Callable[..., Any] = varlen.varlen_attn,
) -> torch.Tensor:
    """The same by torch's flash kernel; `longest` is the longest document's tokens."""
    heads = query.shape[1]
    options: dict[str, Any] = {}
    if _grouped(kernel):
        options["enable_gqa"] = key.shape[1] != heads
    elif key.shape[1] != heads:
        key, value = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (key, value))
    reach = -1 if window is None else window - 1
    out: torch.Tensor = kernel(
        query, key, value, offsets, offsets, longest, longest,
        scale=scale, window_size=(reach, 0), **options,
    )  # fmt: skip
    return out


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' interface: [rows, heads, length, width] -> [rows, length, heads, width].

    Raises NotImplementedError for what the kernel lacks, rather than leaving it out in silence.
    """
    if options.get("s_aux") is not None or options.get("softcap") is not None:
        what = "softcap" if options.get("softcap") is not None else "attention sinks"
        raise NotImplementedError(f"{VARLEN} attention has no {what}")
    if cu_seq_lens_q is None:
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return found
    if dropout or options.get("position_bias") is not None or key.shape[2] != query.shape[2]:
        what = "dropout, no position bias and no cache in packed rows"
        raise NotImplementedError(f"{VARLEN} attention has no {what}")
    rows, heads, length, width = query.shape
    q, k, v = (t.transpose(1, 2).reshape(-1, t.shape[1], t.shape[3]) for t in (query, key, value))
    kind = q.device.type
    if torch.is_autocast_enabled(kind):  # custom operators are left out of autocast
        dtype = torch.get_autocast_dtype(kind)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if kind == "cuda" and q.dtype in HALVES:
        longest = int(max_length_q or cu_seq_lens_q.diff().max())
        out = by_kernel(
            q, k, v, cu_seq_lens_q, longest=longest, scale=scaling, window=sliding_window
        )
    else:
        out = by_document(q, k, v, cu_seq_lens_q, scale=scaling, window=sliding_window)
    return out.reshape(rows, length, heads, width), None


def without_mask(inputs: dict[str, Any]) -> dict[str, Any]:
    """`inputs` with offsets of documents, so marked that transformers makes no mask of them.

    It hands a mask of four dimensions on as it is, and `attention` does not look at it.
    """
    if "cu_seq_lens_q" not in inputs:
        return inputs
    return inputs | {"attention_mask": torch.empty(1, 1, 1, 1)}


def packed(documents: Sequence[torch.Tensor], *, device: torch.device, name: str) -> dict[str, Any]:
    """Inputs of token ids laid end to end, as trl's padding-free collator makes them.

    With all that it hands to a model under the attention `name`: recurrences read it, too.
    """
    lengths = torch.tensor([len(ids) for ids in documents])
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
    longest = int(lengths.max())
    numbers = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), lengths)
    made = {
        "input_ids": torch.cat(list(documents))[None].to(device),
        "position_ids": torch.cat([torch.arange(n) for n in lengths.tolist()])[None].to(device),
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": numbers[None].to(device),
    }
    return without_mask(made) if name == VARLEN else made


def _use_gqa(mask: Any, key: torch.Tensor, *arguments: Any) -> bool:
    """transformers' `use_gqa_in_sdpa`, and below compute capability 8.0 false.

    Older cards have no flash kernel, the memory-efficient one takes as many key heads as queries,
    and what is left would write out all scores.
    """
    if key.device.type == "cuda" and torch.cuda.get_device_capability(key.device) < (8, 0):
        return False
    return bool(_own_use_gqa(mask, key, *arguments))


_own_use_gqa = sdpa_attention.use_gqa_in_sdpa


def register() -> None:
    """Make `torch_varlen` known to transformers, and its sdpa fit for older cards."""
    sdpa_attention.use_gqa_in_sdpa = _use_gqa
    ALL_ATTENTION_FUNCTIONS.register(VARLEN, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(VARLEN, sdpa_mask)


register()
