"""Parts of a training step whose kernels run elsewhere, as code that allocates what they allocate.

Each says whose allocations it copies. Nothing is computed: what the tensors hold is arbitrary.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl.kernels import chunked_logprob

from tuning.models import four_bit
from tuning.plan.coefficients import FUSED_TILE_ROWS
from tuning.training.simulate.memory import kind

VARLEN = "simulated_varlen"  # a name with "flash" in it would be taken for a kernel to download
GROUPED_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.12 and newer
HEAD_ROWS = chunked_logprob.TOKEN_CHUNK_SIZE
HEAD_COLUMNS = 32768  # trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
FLASH_PADDING = 128  # rows a document that flash attention's backward adds to its fp32 accumulator
FLOAT = torch.float32


def _apply(function: Any, *arguments: Any) -> Any:
    return function.apply(*arguments)  # which torch leaves untyped


class _FlashVarlen(torch.autograd.Function):
    """aten's `_flash_attention_forward` and `_backward` on [tokens, heads, width], packed rows."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, documents: int) -> Any:
        out = torch.empty_like(q)
        ctx.documents = documents
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[1], q.shape[0], dtype=FLOAT))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, _, _ = ctx.saved_tensors
        tokens, heads, width = q.shape
        padded = tokens + FLASH_PADDING * ctx.documents
        width = -(-width // 32) * 32 if width <= 192 else 256
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        scratch = [q.new_empty(heads, padded, dtype=FLOAT)]
        scratch.append(q.new_empty(padded, heads, width, dtype=FLOAT))
        if k.shape[1] != heads:
            scratch += [torch.empty_like(q), torch.empty_like(q)]
        del scratch
        return dq, dk, dv, None


def _varlen(
    module: Any, query: Any, key: Any, value: Any, mask: Any, *, cu_seq_lens_q: Any, **options: Any
) -> tuple[Any, None]:
    """An attention function for transformers on top of torch's `varlen_attn`."""
    rows, heads, length, width = query.shape
    q, k, v = (t.transpose(1, 2).reshape(-1, t.shape[1], width) for t in (query, key, value))
    if not GROUPED_HEADS and k.shape[1] != heads:
        k, v = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
    return _apply(_FlashVarlen, q, k, v, len(cu_seq_lens_q) - 1).view(
        rows, length, heads, width
    ), None


ALL_ATTENTION_FUNCTIONS.register(VARLEN, _varlen)
ALL_MASK_ATTENTION_FUNCTIONS.register(VARLEN, lambda *args, **kwargs: None)


class _Sdpa(torch.autograd.Function):
    """aten's memory-efficient attention on CUDA and its flash attention on a CPU, with a mask.

    The output of the first is laid out as [rows, length, heads, width], of the second as the query.
    """

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, bias: Any, device: str) -> Any:
        rows, heads, length, width = q.shape
        out = torch.empty_like(q)
        if device == "cuda":
            out = q.new_empty(rows, length, heads, width).transpose(1, 2)
        lse = q.new_empty(rows, heads, length, dtype=FLOAT)
        ctx.save_for_backward(q, k, v, out, lse, bias)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, _, lse, _ = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        scratch = torch.empty_like(lse)  # row sums of out * grad
        del scratch
        return dq, dk, dv, None, None


def _sdpa_on(device: str) -> Any:
    """`torch.nn.functional.scaled_dot_product_attention` on a kind of device.

    A boolean mask becomes one of numbers. Keys of fewer heads, where nothing says that they are to
    be shared (Falcon), suit no kernel: torch computes all scores, and so does this.
    """
    composed = torch.nn.functional.scaled_dot_product_attention

    def sdpa(q: Any, k: Any, v: Any, attn_mask: Any = None, *rest: Any, **options: Any) -> Any:
        shared = k.shape[1] != q.shape[1]
        if shared and not options.get("enable_gqa"):
            return composed(q, k, v, attn_mask, *rest, **options)
        if shared:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.empty_like(attn_mask, dtype=q.dtype)
        return _apply(_Sdpa, q, k, v, attn_mask, device)

    return sdpa


class _Dequantised(torch.autograd.Function):
    """bitsandbytes' 4-bit matmul at training sizes: unpack the weight, multiply, forget it."""

    @staticmethod
    def forward(ctx: Any, x: Any, packed: Any, rows: int, columns: int) -> Any:
        ctx.shape = rows, columns
        weight = _unpacked(x, rows, columns)
        out = x.new_empty(*x.shape[:-1], rows)
        del weight
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        weight = _unpacked(grads[0], *ctx.shape)
        out = grads[0].new_empty(*grads[0].shape[:-1], ctx.shape[1])
        del weight
        return out, None, None, None


def _unpacked(like: Any, rows: int, columns: int) -> Any:
    with kind("dequantisation"):
        constants = like.new_empty(rows * columns // 64, dtype=FLOAT)
        constants = constants + 0.0  # the offset is added out of place
        weight = like.new_empty(rows, columns)
        del constants
    return weight


@dataclass(frozen=True)
class PackedState:
    """How an expert parameter is packed: what `models.four_bit` asks of a `QuantState`."""

    shape: torch.Size
    dtype: torch.dtype

    def unpack(self, packed: torch.Tensor, _: Any) -> torch.Tensor:
        """The whole parameter, as `bnb.functional.dequantize_4bit` makes it."""
        like = packed.new_empty(0, dtype=self.dtype)
        whole: torch.Tensor = _unpacked(like, self.shape[0] * self.shape[1], self.shape[2])
        return whole.view(self.shape)


def pack_parameter(module: torch.nn.Module, name: str, dtype: torch.dtype) -> None:
    """Replace the expert parameter `name` by a packed one without constants, on the meta device."""
    shape = module.get_parameter(name).shape
    packed = torch.empty((shape.numel() + 1) // 2, 1, dtype=torch.uint8, device="meta")
    setattr(module, name, torch.nn.Parameter(packed, requires_grad=False))
    four_bit.unpack_when_read(module, name, PackedState(shape, dtype))


class _Packed:
    """Marks a weight as packed, so that peft picks its 4-bit adapter layer."""


class PackedLinear(bnb.nn.Linear4bit):  # type: ignore[misc]
    """`bnb.nn.Linear4bit` without its constants, which are no tensors of the module."""

    def __init__(self, linear: torch.nn.Linear, compute_dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = torch.empty((linear.weight.numel() + 1) // 2, 1, dtype=torch.uint8, device="meta")
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        mark_packed(self.weight)
        self.bias, self.compute_dtype, self.quant_state = linear.bias, compute_dtype, None

    def unpacked(self) -> torch.Tensor:
        """The whole weight, as `bnb.functional.dequantize_4bit` makes it."""
        like = self.weight.new_empty(0, dtype=self.compute_dtype)
        whole: torch.Tensor = _unpacked(like, self.out_features, self.in_features)
        return whole

    def forward(self, x: torch.Tensor) -> Any:
        """x W^T, in the type of `x`."""
        out = _apply(
            _Dequantised, x.to(self.compute_dtype), self.weight, self.out_features, self.in_features
        )
        return out.to(x.dtype)


def mark_packed(weight: Any) -> None:
    """Make `weight` look packed to peft."""
    weight.quant_state, weight.quant_type, weight.compress_statistics = _Packed(), "nf4", True


class _Head(torch.autograd.Function):
    """trl's `ChunkedLogProbFunction` with Triton: one tile of logits, a float32 gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, targets: Any) -> Any:
        ctx.save_for_backward(hidden, weight, targets)
        rows = len(hidden)
        with kind("loss"):
            vectors = [hidden.new_empty(rows, dtype=FLOAT) for _ in range(7)]
            tile = _tile(hidden, _computed(hidden))
            ctx.log_z, ctx.entropy = (hidden.new_empty(rows, dtype=FLOAT) for _ in range(2))
            logprobs = hidden.new_empty(rows, dtype=FLOAT)
            del tile, vectors
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, _, _ = ctx.saved_tensors
        with kind("loss"):
            gradient = hidden.new_empty(hidden.shape, dtype=FLOAT)
            tile = _tile(hidden, hidden.dtype)
            del tile
            return gradient.to(hidden.dtype), None, None


class _TorchHead(torch.autograd.Function):
    """The same on a machine without Triton: trl's own tile functions, on the first tiles."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, targets: Any) -> Any:
        rows, vocab, dtype = min(len(hidden), HEAD_ROWS), len(weight), _computed(hidden)
        with kind("loss"):
            vectors = [hidden.new_empty(len(hidden), dtype=FLOAT) for _ in range(7)]
        with kind("tile"):
            tile_memory = _tile(hidden, dtype)
            some = hidden[:rows].to(dtype)
            for start in range(0, vocab, HEAD_COLUMNS):
                end = min(start + HEAD_COLUMNS, vocab)
                tile = tile_memory[:rows, : end - start]
                torch.mm(some, weight[start:end].to(dtype).t(), out=tile)
                chunked_logprob._forward_tile(
                    tile, 0, targets[:rows], *(v[:rows] for v in vectors), start, end - start,
                    1.0, 1.0, 1.0, False, True, False, False, True, 0,
                )  # fmt: skip
        with kind("loss"):
            log_z, entropy, logprobs = (
                hidden.new_empty(len(hidden), dtype=FLOAT) for _ in range(3)
            )
        ctx.save_for_backward(hidden, weight, targets, log_z, entropy)
        ctx.dtype = dtype
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, weight, targets, log_z, entropy = ctx.saved_tensors
        rows, vocab = min(len(hidden), HEAD_ROWS), len(weight)
        with kind("loss"):
            gradient = hidden.new_empty(hidden.shape, dtype=FLOAT)
        with kind("tile"):
            tile_memory = _tile(hidden, ctx.dtype)
            some = hidden[:rows].to(ctx.dtype)
            for start in range(0, vocab, HEAD_COLUMNS):
                end = min(start + HEAD_COLUMNS, vocab)
                part = weight[start:end].to(ctx.dtype)
                tile = tile_memory[:rows, : end - start]
                torch.mm(some, part.t(), out=tile)
                chunked_logprob._backward_tile(
                    tile, 0, targets[:rows], log_z[:rows], entropy[:rows], grads[0][:rows],
                    log_z[:rows], start, end - start, 1.0, 1.0, 1.0, False, True, False, 0,
                )  # fmt: skip
                gradient[:rows].addmm_(tile.float(), part.float())
            del tile_memory, some, part, tile
        with kind("loss"):
            return gradient.to(hidden.dtype), None, None


class _OnePassHead(torch.autograd.Function):
    """`models.kernels.head` on its first tile; the others come after it in the same memory."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, targets: Any, device: str) -> Any:
        size = min(len(hidden), FUSED_TILE_ROWS[device])
        with kind("loss"):
            gradient = torch.empty_like(hidden)
            ctx.save_for_backward(gradient)
            total = hidden.new_empty((), dtype=FLOAT)
        with kind("tile"):
            tile = hidden.new_empty(size, len(weight))
            probabilities = hidden.new_empty(size, len(weight), dtype=FLOAT)
            del tile, probabilities
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        with kind("loss"):
            return torch.empty_like(gradient), None, None, None


def _tile(hidden: Any, dtype: torch.dtype) -> Any:
    with kind("tile"):
        return hidden.new_empty(min(len(hidden), HEAD_ROWS), HEAD_COLUMNS, dtype=dtype)


def _computed(hidden: Any) -> torch.dtype:
    enabled = torch.is_autocast_enabled("cpu")
    return torch.get_autocast_dtype("cpu") if enabled else hidden.dtype


def loss(hidden: Any, weight: Any, labels: Any, *, device: str, fused: bool = False) -> Any:
    """trl's loss, or our one-pass head's, on `hidden` [rows, length, width].

    Every token but a row's first has a label.
    Where Triton is, trl copies out the tokens that have one; here all of them, the most there are.
    """
    shifted, targets = hidden[:, :-1], labels[:, 1:]
    if fused:
        every = torch.arange(targets.numel())
        flat = shifted.reshape(-1, shifted.shape[-1]).index_select(0, every).to(_computed(hidden))
        return _apply(_OnePassHead, flat, weight, targets.reshape(-1)[every], device)
    if device == "cpu":
        flat = shifted.reshape(-1, shifted.shape[-1])
        return -_apply(_TorchHead, flat, weight, targets.reshape(-1).clamp(min=0)).sum()
    rows, length = targets.shape
    row = torch.arange(rows).repeat_interleave(length)
    column = torch.arange(length).repeat(rows)
    return -_apply(_Head, shifted[row, column], weight, targets[row, column]).sum()


@contextlib.contextmanager
def installed(device: str) -> Iterator[None]:
    """Inside, attention by torch is the stand-in, and transformers looks at no mask's values."""
    functional = torch.nn.functional
    with (
        mock.patch.object(masking_utils, "is_tracing", lambda *args, **kwargs: True),
        mock.patch.object(functional, "scaled_dot_product_attention", _sdpa_on(device)),
    ):
        yield
