"""What a card can do, shape by shape: products, attention, norms, losses, a copy.

The probes of `gpu_ladder ceilings`; peft's and trl's way beside ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from benchmarks import gpu_plan
from benchmarks.gpu_plan import Case, shape
from benchmarks.gpu_rungs import PRESETS, Sizes, rate
from tuning import presets
from tuning.models.kernels import attention, head, linear, norm
from tuning.plan.coefficients import Variant
from tuning.presets.config import facts
from tuning.training.calibration import copy_rate, timed


def probes(sizes: Sizes) -> Iterator[tuple[str, dict[str, float]]]:
    """Every measurement, by name."""
    yield "large product", {"flops": rate(sizes)}
    yield (
        "copy",
        {"bytes_per_second": copy_rate(sizes.device, 1 << (31 if sizes.device == "cuda" else 13))},
    )
    for preset in PRESETS:
        known = facts(shape(Case(preset, Variant(device=sizes.device), 1, 1)))  # type: ignore[arg-type]
        assert known is not None
        for layer in known.linears:
            yield from linear_probes(f"{preset} {layer.name}", layer.outputs, layer.inputs, sizes)
        yield from mlp_probes(preset, known.hidden, known.intermediate, sizes)
        yield from loss_probes(preset, known.hidden, known.vocab, sizes)
        yield from norm_probes(preset, known.hidden, sizes)
        yield from attention_probes(preset, known, sizes)


def frozen(outputs: int, inputs: int, sizes: Sizes, *, packed: bool) -> Any:
    """A linear layer of random weights without bias, in 16 or in 4 bits."""
    layer = torch.nn.Linear(inputs, outputs, bias=False, device=sizes.device, dtype=torch.bfloat16)
    layer.requires_grad_(False)
    return gpu_plan.pack(layer, Variant(device=sizes.device)) if packed else layer  # type: ignore[arg-type]


def projection(outputs: int, inputs: int, sizes: Sizes, *, packed: bool) -> linear.Projection:
    """The same with an adapter of rank 16."""
    a, b = (
        torch.nn.Parameter(torch.randn(*size, device=sizes.device) * 0.01)
        for size in ((16, inputs), (outputs, 16))
    )
    return linear.Projection(frozen(outputs, inputs, sizes, packed=packed), a, b, 2.0)


def peft_linear(x: torch.Tensor, part: linear.Projection) -> torch.Tensor:
    """What peft computes, operator by operator."""
    result = part.base(x)
    low = F.linear(x.to(part.a.dtype), part.a)
    return result + F.linear(low, part.b) * part.scale  # type: ignore[no-any-return]


def linear_probes(
    name: str, outputs: int, inputs: int, sizes: Sizes
) -> Iterator[tuple[str, dict[str, float]]]:
    """A projection's bare products, peft's way and ours, in 16 and 4 bits; unpacking alone."""
    for tokens in sizes.tokens:
        yield f"{name} {tokens} tokens", linear_probe(outputs, inputs, tokens, sizes)


def linear_probe(outputs: int, inputs: int, tokens: int, sizes: Sizes) -> dict[str, float]:
    """The same at one number of tokens."""
    x = random_rows(tokens, inputs, sizes)
    grad = torch.randn(tokens, outputs, device=sizes.device, dtype=torch.bfloat16)
    weight = frozen(outputs, inputs, sizes, packed=False).weight
    bare = timed(lambda: (x.detach() @ weight.t(), grad @ weight), sizes.device)
    found = {"products": bare, "flops": 4 * tokens * outputs * inputs / bare}
    for bits, packed in (("16", False), ("4", True)):
        part = projection(outputs, inputs, sizes, packed=packed)
        theirs = partial(peft_linear, x, part)
        ours = partial(linear.linears, x, [part], dtype=torch.bfloat16)
        found[f"peft {bits}"] = both_ways(theirs, grad, sizes)
        found[f"ours {bits}"] = both_ways(lambda ours=ours: ours()[0], grad, sizes)
    found["unpack"] = timed(partial(linear.weight, part.base, torch.bfloat16), sizes.device)
    return found


def random_rows(tokens: int, width: int, sizes: Sizes) -> torch.Tensor:
    """Random numbers that want a gradient."""
    x = torch.randn(tokens, width, device=sizes.device, dtype=torch.bfloat16)
    return x.requires_grad_()


def both_ways(forward: Callable[[], torch.Tensor], grad: torch.Tensor, sizes: Sizes) -> float:
    """Seconds of a forward and a backward under autocast."""

    def once() -> None:
        with torch.autocast(sizes.device, torch.bfloat16):
            out = forward()
        out.backward(grad)

    return timed(once, sizes.device)


def mlp_probes(
    name: str, hidden: int, inner: int, sizes: Sizes
) -> Iterator[tuple[str, dict[str, float]]]:
    """A gated MLP with adapters: peft's way, projections fused, the whole fused."""
    gate, up = (projection(inner, hidden, sizes, packed=False) for _ in range(2))
    down = projection(hidden, inner, sizes, packed=False)
    whole = linear.Mlp((gate, up), down, linear.ACTIVATIONS["SiLU"], gated=True)
    for tokens in sizes.tokens[:2]:
        x = random_rows(tokens, hidden, sizes)
        grad = torch.randn(tokens, hidden, device=sizes.device, dtype=torch.bfloat16)

        def eager(x: torch.Tensor = x) -> torch.Tensor:
            return peft_linear(F.silu(peft_linear(x, gate)) * peft_linear(x, up), down)

        def parts(x: torch.Tensor = x) -> torch.Tensor:
            one, two = linear.linears(x, [gate, up], dtype=torch.bfloat16)
            return linear.linears(F.silu(one) * two, [down], dtype=torch.bfloat16)[0]

        def ours(x: torch.Tensor = x) -> torch.Tensor:
            return linear.mlp(x, whole, dtype=torch.bfloat16)

        ways = {"peft": eager, "projections": parts, "whole": ours}
        yield (
            f"{name} MLP {tokens} tokens",
            {way: both_ways(function, grad, sizes) for way, function in ways.items()},
        )


def loss_probes(
    name: str, hidden: int, vocabulary: int, sizes: Sizes
) -> Iterator[tuple[str, dict[str, float]]]:
    """The loss of a step's tokens, forward and backward: trl's head and ours."""
    tokens = sizes.tokens[1]
    weight = torch.randn(vocabulary, hidden, device=sizes.device, dtype=torch.bfloat16) * 0.02
    x = random_rows(tokens, hidden, sizes)
    labels = torch.randint(0, vocabulary, (1, tokens), device=sizes.device)
    one = torch.ones((), device=sizes.device)

    def theirs() -> torch.Tensor:
        found = ChunkedLogProbFunction.apply(
            x, weight, None, labels[0], 1.0, 32768, None, 1.0, ("entropy", "is_top1")
        )
        return -found[0].sum()  # type: ignore[no-any-return]

    def ours() -> torch.Tensor:
        return head.loss(x[None], weight, None, labels)

    ways = {"trl": theirs, "ours": ours}
    yield (
        f"{name} loss {tokens} tokens",
        {way: both_ways(function, one, sizes) for way, function in ways.items()},
    )


def norm_probes(name: str, hidden: int, sizes: Sizes) -> Iterator[tuple[str, dict[str, float]]]:
    """RMSNorm of a step's tokens: transformers' operators and ours."""
    layer = transformers.models.llama.modeling_llama.LlamaRMSNorm(hidden)
    layer = layer.to(sizes.device, torch.bfloat16).requires_grad_(False)
    x = random_rows(sizes.tokens[1], hidden, sizes)
    grad = torch.randn_like(x)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "transformers": lambda: layer(x),
        "ours": lambda: norm.rms_norm(x, layer.weight, 1e-6),
    }
    yield (
        f"{name} norm {len(x)} tokens",
        {way: both_ways(function, grad, sizes) for way, function in ways.items()},
    )


def attention_probes(
    name: str, known: presets.Facts, sizes: Sizes
) -> Iterator[tuple[str, dict[str, float]]]:
    """Attention of a step's tokens as documents of one length, and as one."""
    for length in (sizes.length, sizes.length * sizes.rows):
        tokens = sizes.length * sizes.rows
        offsets = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=sizes.device)
        q, k, v = (
            torch.randn(tokens, heads, known.head_dim, device=sizes.device, dtype=torch.bfloat16)
            .requires_grad_()
            for heads in (known.heads, known.kv_heads, known.kv_heads)
        )  # fmt: skip
        grad = torch.randn_like(q)

        def varlen(q: Any = q, k: Any = k, v: Any = v, at: Any = offsets, n: int = length) -> Any:
            if sizes.device == "cpu":
                return attention.by_document(q, k, v, at, scale=None, window=None)
            return attention.by_kernel(q, k, v, at, longest=n, scale=None, window=None)

        def sdpa(q: Any = q, k: Any = k, v: Any = v, n: int = length) -> Any:
            rows = [t.view(-1, n, t.shape[1], t.shape[2]).transpose(1, 2) for t in (q, k, v)]
            out = F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2).reshape(q.shape)

        ways = {"varlen": varlen, "sdpa, a row a document": sdpa}
        found = {way: both_ways(function, grad, sizes) for way, function in ways.items()}
        work = 7 * tokens * length * known.queries  # forward 2, backward 5, of the lower half
        found["varlen_flops"] = work / found["varlen"]
        yield f"{name} attention {tokens // length} x {length}", found
