"""How a base model is held, and how much it may have in mind at once: arithmetic, no torch.

The weights are the plan's (`plan.memory`); what training would add to them, an answer's cache and
one forward pass take here. The first way that leaves room for a decent context is taken: as the
weights are published, in 16 bits (float32 on a processor without bfloat16 arithmetic, where it is
faster), then in 4 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tuning.plan as plan
from tuning import presets
from tuning.errors import SpecError
from tuning.plan import memory, sizing
from tuning.plan.coefficients import Coefficients, Method
from tuning.plan.device import Device
from tuning.presets import quantised, stored

Precision = Literal["auto", "float32", "bfloat16", "float16", "4bit"]

DECENT = 4096  # tokens of context that a way must leave room for, where the model has so many
PAGE = 32  # tokens of a page of the cache
SPARE = 2 * PAGE  # of the cache, that the longest request leaves: pages are taken whole
BATCH = {"cuda": 1024, "cpu": 256}  # tokens of one forward pass: long prompts come in such pieces
SMALL = 1 << 30  # bytes of weights, below which a CPU is faster in float32 whatever it has
AT_MOST = 4096  # tokens of the cache for each request on a CPU, whose memory others need, too
NF4 = {"type": "nf4", "double": True}


@dataclass(frozen=True)
class Room:
    """How much a runner may take on at once."""

    cache_tokens: int  # prompts and answers of all requests under way
    batch_tokens: int  # tokens of one forward pass
    requests: int


@dataclass(frozen=True)
class Holding:
    """How the base model is loaded, and the room beside it."""

    precision: Literal["float32", "bfloat16", "float16"]  # of the arithmetic
    quantisation: dict[str, Any] | None  # as a recipe says it
    context: int  # tokens of a prompt with its answer
    room: Room
    weights: int  # bytes
    threads: int | None  # of one operator on a CPU; None leaves the choice to torch
    reason: str


@dataclass(frozen=True)
class _Shape:
    """What of a model the memory of an answer depends on."""

    coefficients: Coefficients
    context: int
    cached: int  # numbers that a token leaves in the cache
    spread: int  # numbers that attention to it takes in one layer
    hidden: int
    inner: int  # widest of the numbers that a token is in the middle of a layer
    vocab: int
    heads: int  # whose scores are written out (eager attention); 0 if none are
    packs: bool  # 4 bits are worth it
    packed: bool  # published in 4 bits, and held so


def hold(
    base: Path,
    config: Mapping[str, Any],
    here: Device,
    *,
    precision: Precision = "auto",
    context: int | None = None,
    requests: int = 32,
    adapter_numbers: int = 0,
) -> Holding:
    """How to hold the model in `base`, whose parsed config.json is `config`, on this machine.

    `context` None: as much as the model and the memory have. Raises SpecError if nothing fits.
    """
    return _hold(_shape(base, config), here, precision, context, requests, adapter_numbers)


def planned(
    facts: presets.Facts,
    here: Device,
    *,
    requests: int = 32,
    adapter_numbers: int = 0,
    precision: Precision = "auto",
) -> Holding:
    """The same for a model of which only the facts are known. Raises SpecError if none fits."""
    return _hold(_known(facts), here, precision, None, requests, adapter_numbers)


def _hold(
    shape: _Shape,
    here: Device,
    precision: Precision,
    context: int | None,
    requests: int,
    adapter_numbers: int,
) -> Holding:
    wanted = min(context or shape.context, shape.context)
    numbers = shape.coefficients.kept + shape.coefficients.packed
    tried = []
    for kind, method, bits, why in _ways(shape, here, precision):
        weights = sum(memory.weight_bytes(shape.coefficients, method=method, precision=kind))
        width = 4 if kind == "float32" else 2
        left = _left(shape, here, weights + 4 * adapter_numbers, width, requests, bits)
        each = (shape.cached + shape.spread) * width + BATCH[here.kind] * (width + 8 * shape.heads)
        share = left if here.kind == "cuda" else left // 2
        usual = wanted if here.kind == "cuda" else min(wanted, AT_MOST)
        tokens = min(share // each, max(requests * usual, wanted) + SPARE)
        enough = wanted if context else min(wanted, DECENT)
        tried.append(f"{bits} needs {(weights + each * enough) / 2**30:.1f} GiB and working memory")
        if tokens >= enough + SPARE:
            room = Room(tokens, BATCH[here.kind], requests)
            quantisation = NF4 | {"compute": kind} if bits == "4 bits" else None
            few = here.kind == "cpu" and numbers < plan.SMALL_ON_CPU
            threads = 1 if few else None
            return Holding(
                kind, quantisation, min(wanted, tokens - SPARE), room, weights, threads, why
            )
    free = f"{here.memory_bytes / 2**30:.1f} GiB are free"
    what = f"fits in no way for {wanted:,} tokens of context: {free}; {'; '.join(tried)}"
    change = "use a smaller model, a larger machine, or a smaller --context"
    raise SpecError.at("SERVE-110", "--base", what, change)


_Way = tuple[Literal["float32", "bfloat16", "float16"], Method, str, str]


def _ways(shape: _Shape, here: Device, precision: Precision) -> Iterator[_Way]:
    half: Literal["bfloat16", "float16"] = "bfloat16"
    if here.kind == "cuda" and not here.bf16:
        half = "float16"
    if shape.packed:
        kind = precision if precision in ("float32", "bfloat16", "float16") else half
        yield kind, "qlora", "4 bits", "4 bits, as published"
    elif precision == "auto":
        small = (
            sum(memory.weight_bytes(shape.coefficients, method="lora", precision="float32")) < SMALL
        )
        if here.kind == "cpu" and (small or not here.bf16):
            why = "a small model" if small else "this processor has no bfloat16 arithmetic"
            yield "float32", "lora", "32 bits", f"float32: {why}"
        yield half, "lora", "16 bits", f"{half}: fits as published"
        if shape.packs:
            yield half, "qlora", "4 bits", "4 bits (NF4): 16 bits do not fit"
    elif precision == "4bit":
        yield half, "qlora", "4 bits", "4 bits (NF4), as asked"
    else:
        bits = "32 bits" if precision == "float32" else "16 bits"
        yield precision, "lora", bits, f"{precision}, as asked"


def _left(shape: _Shape, here: Device, held: int, width: int, requests: int, bits: str) -> int:
    """Bytes for the cache, after weights, libraries and one forward pass."""
    fixed = memory.CONTEXT_BYTES if here.kind == "cuda" else memory.PROCESS_BYTES
    token = (8 * shape.hidden + 3 * shape.inner) * max(width, 4)
    logits = 4 * 4 * requests * shape.vocab  # as they come, in float32, chosen from, sorted
    unpacked = 2 * shape.hidden * shape.inner if bits == "4 bits" else 0
    copied = 0  # a weight that oneDNN repacks for a product, see `memory.repacked`
    if here.kind == "cpu" and here.bf16 and width == 2:
        copied = 2 * shape.hidden * max(shape.vocab, 2 * shape.inner)
    step = BATCH[here.kind] * token + logits + unpacked + copied
    free = int(here.memory_bytes * (1 - sizing.HEADROOM))
    return max(0, free - fixed - held - step)


def _shape(base: Path, config: Mapping[str, Any]) -> _Shape:
    facts = presets.facts(config)
    if facts is None:
        return _guess(base, config)
    return _known(facts)


def _known(facts: presets.Facts) -> _Shape:
    known = sizing.model(facts)
    return _Shape(
        coefficients=known.coefficients if known else _coefficients(facts),
        context=facts.context,
        cached=2 * facts.attending * facts.keys,
        spread=2 * facts.queries,
        hidden=facts.hidden,
        inner=max(facts.intermediate, facts.queries),
        vocab=facts.vocab,
        heads=facts.heads if facts.softcap or facts.sinks else 0,
        packs=presets.support(facts, "qlora").supported,
        packed=facts.stored == stored.FOUR_BIT,
    )


def _coefficients(facts: presets.Facts) -> Coefficients:
    """The weights of a shape that nobody has simulated, counted."""
    return Coefficients(
        layers=facts.layers,
        kept=facts.parameters + facts.tower - facts.packed,
        packed=facts.packed,
        packed_modules=sum(matrix.layers for matrix in facts.matrices),
        buffers=0,
        adapters={},
        moments={},
    )


def _guess(base: Path, config: Mapping[str, Any]) -> _Shape:
    """A shape nobody has read: the weights as their files have them, every head cached."""
    text = config.get("text_config") or config
    size = quantised.loaded_bytes(base.glob("*.safetensors"), config)
    hidden = int(text.get("hidden_size") or text.get("n_embd") or 4096)
    layers = int(text.get("num_hidden_layers") or text.get("n_layer") or 32)
    return _Shape(
        coefficients=Coefficients(layers, size // 2, 0, 0, 0, {}, {}),
        context=int(text.get("max_position_embeddings") or 2048),
        cached=2 * layers * hidden,
        spread=2 * hidden,
        hidden=hidden,
        inner=4 * hidden,
        vocab=int(text.get("vocab_size") or 50_000),
        heads=0,
        packs=False,
        packed=stored.of(config) == stored.FOUR_BIT,
    )
