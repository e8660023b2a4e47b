"""What a GPU must show, written once for any device: real sizes on a card, tiny ones on a CPU.

Each function asserts what must hold and returns what it measured, for the record. `Sizes` says how
large. tests/gpu runs them on a GPU, tests/fake_cuda on the fake device (the code, no kernel of
NVIDIA's).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F

from tuning.models.kernels import attention, head, norm

Record = dict[str, Any]
HALF = 0.02  # relative: roundings of bfloat16 are a third of it, another function is tenths off


@dataclass(frozen=True)
class Sizes:
    """How large the checks are."""

    device: str
    lengths: tuple[int, ...]  # tokens of the packed documents
    heads: tuple[tuple[int, int, int], ...]  # of queries, of keys, and their width
    width: int
    vocabulary: int
    model: Record  # changes to a tiny Phi-3
    steps: int  # of the run from YAML to image
    rows: int  # chats that it reads
    batch: int  # rows at once that are too many for the limited memory
    row_tokens: int
    methods: tuple[str, ...] = ("lora", "qlora")  # that are stopped and resumed


CARD = Sizes(
    "cuda",
    lengths=(1, 700, 2048, 37, 1310),
    heads=((32, 32, 96), (32, 8, 128), (32, 32, 80), (16, 4, 64), (8, 4, 256)),
    width=4096,
    vocabulary=32064,
    model={
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "sliding_window": 2047,
    },
    steps=12,
    rows=600,
    batch=64,
    row_tokens=1024,
)
TINY = Sizes(
    "cuda",
    lengths=(1, 7, 20, 5),
    heads=((4, 4, 16), (4, 2, 16)),
    width=64,
    vocabulary=300,
    model={},
    steps=20,
    rows=60,
    batch=8,
    row_tokens=64,
    methods=("qlora",),
)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative difference, in float32 on the CPU."""
    found, expected = found.detach().float().cpu(), expected.detach().float().cpu()
    return float((found - expected).norm() / expected.norm())


def _differentiated(
    function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], grad: torch.Tensor
) -> list[torch.Tensor]:
    """The function's value and its gradients for `inputs`."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.device, out.dtype))]


def _compared(
    ours: Callable[..., torch.Tensor],
    theirs: Callable[..., torch.Tensor],
    inputs: list[torch.Tensor],
    shape: tuple[int, ...],
) -> float:
    """The largest relative error of the value and the gradients; `theirs` is run in float32."""
    grad = torch.randn(shape)
    found = _differentiated(ours, inputs, grad)
    expected = _differentiated(theirs, [t.float() for t in inputs], grad)
    return max(map(_error, found, expected))


# Kernels.


def varlen(sizes: Sizes) -> Record:
    """torch's variable-length flash kernel against attention document by document in float32.

    Forward and gradients, for the head shapes of the presets, with and without a window.
    """
    torch.manual_seed(0)
    offsets = torch.tensor([0, *sizes.lengths]).cumsum(0).to(sizes.device, torch.int32)
    tokens, longest, errors = sum(sizes.lengths), max(sizes.lengths), {}
    for (heads, kv, width), window in [(h, w) for h in sizes.heads for w in (None, 4)]:
        shapes = [(tokens, n, width) for n in (heads, kv, kv)]
        inputs = [torch.randn(s, device=sizes.device).to(torch.bfloat16) for s in shapes]
        reach = None if window is None else longest // window

        def kernel(q: Any, k: Any, v: Any, reach: int | None = reach) -> torch.Tensor:
            return attention.by_kernel(q, k, v, offsets, longest=longest, scale=None, window=reach)

        def documents(q: Any, k: Any, v: Any, reach: int | None = reach) -> torch.Tensor:
            return attention.by_document(q, k, v, offsets, scale=None, window=reach)

        key = f"{heads}/{kv} heads of {width}, window {reach}"
        errors[key] = _compared(kernel, documents, inputs, shapes[0])
    assert max(errors.values()) < HALF, errors
    return {"errors": errors}


def sdpa(sizes: Sizes) -> Record:
    """torch's own attention, which picks its kernel, with and without a mask."""
    torch.manual_seed(0)
    length, errors = max(sizes.lengths), {}
    for heads, kv, width in sizes.heads:
        shapes = [(2, n, length, width) for n in (heads, kv, kv)]
        inputs = [torch.randn(s, device=sizes.device).to(torch.bfloat16) for s in shapes]
        seen = torch.ones(length, length, dtype=torch.bool, device=sizes.device).tril()
        grouped = kv != heads

        def attend(q: Any, k: Any, v: Any, grouped: bool = grouped, **mask: Any) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **mask)

        def by_hand(q: Any, k: Any, v: Any, seen: torch.Tensor = seen) -> torch.Tensor:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v

        for name, mask in (("causal", {"is_causal": True}), ("mask", {"attn_mask": seen})):
            key = f"{heads}/{kv} heads of {width}, {name}"

            def ours(q: Any, k: Any, v: Any, mask: Record = mask) -> torch.Tensor:
                return attend(q, k, v, **mask)

            errors[key] = _compared(ours, by_hand, inputs, shapes[0])
    assert max(errors.values()) < HALF, errors
    return {"errors": errors}


def rms_norm(sizes: Sizes) -> Record:
    """The norm that the card runs, and Gemma's, against the formula in float32."""
    torch.manual_seed(0)
    errors = {}
    for lifted in (False, True):
        x = torch.randn(3, 50, sizes.width, device=sizes.device).to(torch.bfloat16) * 4
        weight = torch.randn(sizes.width, device=sizes.device).to(torch.bfloat16)

        def ours(x: Any, weight: torch.Tensor = weight, lifted: bool = lifted) -> torch.Tensor:
            return norm.rms_norm(x, weight, 1e-6, lifted=lifted)

        def formula(x: Any, weight: torch.Tensor = weight, lifted: bool = lifted) -> torch.Tensor:
            scaled = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
            return scaled * (weight.float() + lifted)

        errors["1 + w" if lifted else "w"] = _compared(ours, formula, [x], tuple(x.shape))
    assert max(errors.values()) < HALF, errors
    return {"errors": errors}


def one_pass_head(sizes: Sizes) -> Record:
    """The loss in tiles and its gradient against cross-entropy on all logits."""
    torch.manual_seed(0)
    length, device = 4 * sum(sizes.lengths), sizes.device
    weight = torch.randn(sizes.vocabulary, sizes.width, device=device) * 0.02
    labels = torch.randint(sizes.vocabulary, (1, length), device=device)
    labels[:, ::3] = head.IGNORED
    hidden = torch.randn(1, length, sizes.width, device=device)
    errors = {}
    for dtype in (torch.bfloat16, torch.float16):

        def ours(x: Any, dtype: torch.dtype = dtype) -> torch.Tensor:
            return head.loss(x, weight.to(dtype), None, labels)

        def plain(x: Any, dtype: torch.dtype = dtype) -> torch.Tensor:
            logits = (x[:, :-1] @ weight.to(dtype).float().t()).flatten(0, 1)
            targets = labels[0, 1:]
            return F.cross_entropy(logits, targets, ignore_index=head.IGNORED, reduction="sum")

        errors[str(dtype)] = _compared(ours, plain, [hidden.to(dtype)], ())
    assert max(errors.values()) < HALF, errors
    return {"errors": errors}


def nf4(sizes: Sizes) -> Record:
    """Weights packed on the CPU are those packed on the card, and unpack to the same numbers.

    But for a few: the mean of all scales, which bitsandbytes takes off before it rounds them to
    eight bits, is summed in another order, so that a scale in ten thousand may round the other way.
    """
    torch.manual_seed(0)
    found = {}
    for dtype in (torch.bfloat16, torch.float16):
        weight = (torch.randn(sizes.width, 3 * sizes.width) * 0.02).to(dtype)
        packed = []
        for device in ("cpu", sizes.device):
            values, state = bnb.functional.quantize_4bit(
                weight.to(device), compress_statistics=True, quant_type="nf4"
            )
            unpacked = bnb.functional.dequantize_4bit(values, state)
            packed.append([t.cpu() for t in (values, state.absmax, state.offset, unpacked)])
        found[str(dtype)] = differences = four_bit_differences(*packed)
        for name, most in FOUR_BIT_DIFFERENCES.items():
            assert differences[name] <= most, found
    return {"differences": found}


# Shares of codes and of numbers, and of the mean of the scales, relative.
FOUR_BIT_DIFFERENCES = {"packed": 1e-4, "absmax": 1e-4, "offset": 1e-6, "unpacked": 1e-3}


def four_bit_differences(
    one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]
) -> dict[str, float]:
    """How two packings of the same weight differ: codes, scales, their mean, numbers unpacked.

    A number that differs by no more than a rounding of its type counts as the same.
    """
    packed, absmax = (float((one[n] != other[n]).float().mean()) for n in (0, 1))
    offset = float((one[2] - other[2]).abs() / other[2].abs())
    a, b = one[3].float(), other[3].float()
    rounding = 2 * torch.finfo(one[3].dtype).eps * b.abs()
    unpacked = float(((a - b).abs() > rounding).float().mean())
    return {"packed": packed, "absmax": absmax, "offset": offset, "unpacked": unpacked}
