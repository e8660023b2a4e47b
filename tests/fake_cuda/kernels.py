"""Kernels that only a GPU has: attention, as it would choose it, and rms_norm, each one operator.

The choice of attention copies that of torch for CUDA (ATen/native/transformers/cuda/sdp_utils.cpp),
as far as shapes and types decide it. Values come from the formula, in float32.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.nn.attention import varlen

HALVES = (torch.float16, torch.bfloat16)
FLASH_WIDTH = 256  # widest head
Tensor = torch.Tensor


def _weights(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale + bias) of [..., heads, length, width]."""
    scores = q @ k.transpose(-1, -2) * scale + bias
    return scores.softmax(-1).nan_to_num()  # a row of padding may see nothing


def _shared(q: Tensor, *keys: Tensor) -> list[Tensor]:
    """Keys or values of as many heads as the query."""
    return [t.repeat_interleave(q.shape[-3] // t.shape[-3], dim=-3) for t in keys]


def _formula(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None) -> Tensor:
    """Attention; fewer key heads are shared."""
    k, v = _shared(q, k, v)
    return _weights(q, k, bias, scale or q.shape[-1] ** -0.5) @ v


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the query, key and value, by that of the output; autograd is off within an operator."""
    scale = scale or q.shape[-1] ** -0.5
    heads, all_k, all_v = k.shape[-3], *_shared(q, k, v)
    weights = _weights(q, all_k, bias, scale)
    of_weights = grad @ all_v.transpose(-1, -2)
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale

    def gathered(t: Tensor) -> Tensor:
        return t.unflatten(-3, (heads, -1)).sum(-3)

    of_k, of_v = of_scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad
    return of_scores @ all_k, gathered(of_k), gathered(of_v)


def _bias(mask: Tensor | None, causal: bool, rows: int, columns: int) -> Tensor:
    if causal:
        mask = torch.ones(rows, columns, dtype=torch.bool).tril()
    if mask is None:
        return torch.zeros(1, 1)
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)


def _cpu(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().cpu().float() for t in tensors]


# scaled_dot_product_attention


def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Any, causal: bool, scale: Any) -> Tensor:
    bias = _bias(None if mask is None else mask.cpu(), causal, q.shape[-2], k.shape[-2])
    return _formula(*_cpu(q, k, v), bias, scale).to(q.device, q.dtype)


def _backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, causal: bool, scale: Any, grad: Tensor
) -> list[Tensor]:
    bias = _bias(None if mask is None else mask.cpu(), causal, q.shape[-2], k.shape[-2])
    *inputs, out = _cpu(q, k, v, grad)
    return [g.to(q.device, q.dtype) for g in _gradients(*inputs, bias, scale, out)]


@torch.library.custom_op("fake_cuda::flash_attention", mutates_args=())
def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    return _forward(q, k, v, mask, causal, scale)


@torch.library.custom_op("fake_cuda::efficient_attention", mutates_args=())
def efficient_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    return _forward(q, k, v, mask, causal, scale)


@torch.library.custom_op("fake_cuda::attention_backward", mutates_args=())
def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    q_grad, k_grad, v_grad = _backward(q, k, v, mask, causal, scale, grad)
    return q_grad, k_grad, v_grad


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> Any:
    return *attention_backward(*ctx.saved_tensors, ctx.causal, ctx.scale, grad), None, None, None


for _kernel in (flash_attention, efficient_attention):
    _kernel.register_autograd(_differentiate, setup_context=_keep)


def choose(
    capability: tuple[int, int], q: Tensor, k: Tensor, mask: Tensor | None, *, grouped: bool
) -> str:
    """The kernel for these tensors on such a card: flash, efficient or math."""
    fewer = k.shape[-3] != q.shape[-3]
    half = q.dtype in HALVES
    if q.dim() != 4 or (fewer and not grouped):
        return "math"
    if capability >= (8, 0) and half and mask is None and q.shape[-1] <= FLASH_WIDTH:
        return "flash"
    native = q.dtype != torch.bfloat16 or capability >= (8, 0)
    if not fewer and not grouped and native and q.dtype in (*HALVES, torch.float32):
        return "efficient"
    return "math"


# torch.nn.attention.varlen


def _by_document(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    window: list[int] | None,
    scale: Any,
    each: Any,
) -> list[Any]:
    """`each(q, k, v, bias)` for each document, [heads, length, width]; stacked along the tokens."""
    left = -1 if window is None else window[0]
    found = []
    bounds = offsets.tolist()
    for start, end in itertools.pairwise(bounds):
        seen = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        if left >= 0:
            seen = seen.triu(-left)
        part = slice(start, end)
        parts = [t[part].transpose(0, 1) for t in (q, k, v)]
        found.append(each(*parts, _bias(seen, False, 0, 0), part))
    return found


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Any, max_q: int,
    max_k: int, causal: bool = False, scale: float | None = None,
    window: list[int] | None = None, grouped: bool = False, *rest: Any,
) -> Any:  # fmt: skip
    assert query.dtype in HALVES and causal == (window == [-1, 0]), "unlike training"
    assert grouped or key.shape[1] == query.shape[1]
    assert max_q >= int(cu_seq_q.diff().max())
    q, k, v = _cpu(query, key, value)
    outs = _by_document(
        q, k, v, cu_seq_q, window, scale,
        lambda a, b, c, bias, _: _formula(a, b, c, bias, scale).transpose(0, 1),
    )  # fmt: skip
    lse = query.new_zeros((query.shape[1], len(query)), dtype=torch.float32)
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    return torch.cat(outs).to(query.device, query.dtype), lse, state


def _varlen_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, is_causal: bool,
    rng_state: Tensor, scale: float | None = None, window_size: list[int] | None = None,
    *rest: Any,
) -> Any:  # fmt: skip
    q, k, v, grad = _cpu(query, key, value, grad_out)
    found = _by_document(
        q, k, v, cu_seq_q, window_size, scale,
        lambda a, b, c, bias, part: _gradients(a, b, c, bias, scale, grad[part].transpose(0, 1)),
    )  # fmt: skip
    return tuple(
        torch.cat([g.transpose(0, 1) for g in each]).to(query.device, query.dtype)
        for each in zip(*found, strict=True)
    )


# torch.nn.functional.rms_norm, which is one kernel on a GPU


def _rms_norm(x: Tensor, shape: list[int], weight: Tensor | None, eps: float | None) -> Any:
    wide = x.float()
    scale = (wide.square().mean(-1, keepdim=True) + (eps or 0.0)).rsqrt()
    out = wide * scale if weight is None else wide * scale * weight
    return out.to(x.dtype), scale


def _rms_norm_backward(
    grad: Tensor, x: Tensor, shape: list[int], scale: Tensor, weight: Tensor | None, needed: Any
) -> Any:
    wide = x.float() * scale
    inner = grad.float() if weight is None else grad.float() * weight
    into = (inner - wide * (inner * wide).mean(-1, keepdim=True)) * scale
    of_weight = (grad.float() * wide).flatten(0, -2).sum(0)
    return into.to(x.dtype), of_weight.to(x.dtype) if needed[1] else None


# Products of 16 bits with sums of 32, as trl's head makes them


def _mm_into(a: Tensor, b: Tensor, kind: torch.dtype, *, out: Tensor) -> Tensor:
    return out.copy_(a.to(kind) @ b.to(kind))


def _addmm_into(
    start: Tensor, a: Tensor, b: Tensor, kind: torch.dtype, *,
    beta: float = 1, alpha: float = 1, out: Tensor,
) -> Tensor:  # fmt: skip
    return out.copy_(start * beta + a.to(kind) @ b.to(kind) * alpha)


def _histc(values: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    """Of whole numbers too, as experts count their tokens."""
    found = torch.histc(values.cpu().float(), bins, min, max)
    return found.to(values.device, values.dtype)


ATEN = torch.library.Library("aten", "IMPL")  # kept, or the kernels would go with it


def install(device: Any) -> None:
    """Let `scaled_dot_product_attention` and `varlen_attn` run on the fake `device`."""
    composed = torch.nn.functional.scaled_dot_product_attention
    kernels = {"flash": flash_attention, "efficient": efficient_attention}

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        kind = query.device.type
        if torch.is_autocast_enabled(kind):  # which casts for this function
            dtype = torch.get_autocast_dtype(kind)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        chosen = "math"
        if kind == "cuda" and not dropout_p:
            capability = device.card.capability
            chosen = choose(capability, query, key, attn_mask, grouped=enable_gqa)
        if chosen in kernels:
            return kernels[chosen](query, key, value, attn_mask, is_causal, scale)
        return composed(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    torch.nn.functional.scaled_dot_product_attention = attend
    ATEN.impl("mm.dtype_out", _mm_into, "CUDA")
    ATEN.impl("addmm.dtype_out", _addmm_into, "CUDA")
    ATEN.impl("histc", _histc, "CUDA")
    ATEN.impl("_fused_rms_norm", _rms_norm, "CUDA")
    ATEN.impl("_fused_rms_norm_backward", _rms_norm_backward, "CUDA")
    varlen._varlen_attn.register_kernel("cuda")(_varlen)
    varlen._varlen_attn_backward.register_kernel("cuda")(_varlen_backward)
