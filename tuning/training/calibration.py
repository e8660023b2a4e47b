"""What the card of a run sustains, measured in a few seconds before the first step.

The plan's speed is a roofline from a datasheet. Here its rates are measured on the card itself
(matrix products of the model's shapes, its attention by document, a copy), and the roofline is
computed again from them: the report then tells a wrong rate from a wrong model of the step. Kept as
`speed.json` in the run directory, so that a resumed run measures nothing again. It changes nothing
of the training, draws from no global random generator, and a failure is a line of the log.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tuning import files
from tuning.errors import Stopped
from tuning.models.load import DTYPES
from tuning.plan import Placement, Recipe
from tuning.plan.backends import BY_OFFSETS
from tuning.plan.speed import ATTENTION, GEMM, Rates, seconds_per_token
from tuning.plan.values import DDP_EFFICIENCY
from tuning.presets import Facts, config

logger = logging.getLogger(__name__)

NAME = "speed.json"
SECONDS = 20.0  # most that it takes
EACH = 0.15  # of one measurement
MOST_TOKENS = 16_384  # of a product; its rate grows no more
COPIED = 1 << 28  # bytes


def timed(function: Callable[[], Any], device: str, *, seconds: float = EACH) -> float:
    """Median seconds of a call: of three, on a card of up to twenty, after two that warm up."""
    found: list[float] = []
    most = 22 if device == "cuda" else 5
    while len(found) < 5 or (sum(found[2:]) < seconds and len(found) < most):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found[2:])


class _Draw:
    """Random tensors of one device and type; zeros would be multiplied faster."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int) -> torch.Tensor:
        made = torch.empty(shape, device=self.device, dtype=self.dtype)
        return made.normal_(generator=self.generator)


def copy_rate(device: str, size: int = COPIED) -> float:
    """Bytes read and written a second by a copy of `size` bytes."""
    one = torch.empty(size, dtype=torch.uint8, device=device)
    two = torch.empty_like(one)
    return 2 * size / timed(lambda: two.copy_(one), device)


def product_rate(
    shapes: Sequence[tuple[int, int, float]], tokens: int, device: str, dtype: torch.dtype
) -> float:
    """Operations a second of frozen layers, forward and input gradient, over all `shapes`.

    Each is (outputs, inputs, how often a token meets it).
    """
    draw = _Draw(device, dtype)
    work = seconds = 0.0
    for outputs, inputs, times in shapes:
        x, grad, weight = draw(tokens, inputs), draw(tokens, outputs), draw(outputs, inputs)
        taken = timed(lambda x=x, g=grad, w=weight: (x @ w.t(), g @ w), device)  # type: ignore[misc]
        seconds += times * taken
        work += times * 4.0 * tokens * outputs * inputs
    return work / seconds


def attention_rate(
    base: Any, facts: Facts, documents: Sequence[int], device: str, dtype: torch.dtype
) -> float:
    """Operations a second of the model's own attention, forward and backward, by document."""
    module = next(m for m in base.modules() if type(m).__name__.endswith("Attention"))
    attend = ALL_ATTENTION_FUNCTIONS[base.config._attn_implementation]
    draw, tokens = _Draw(device, dtype), sum(documents)
    offsets = torch.tensor([0, *documents]).cumsum(0).to(device, torch.int32)
    longest = max(documents)
    q, k, v = (
        draw(1, heads, tokens, facts.head_dim).requires_grad_()
        for heads in (facts.heads, facts.kv_heads, facts.kv_heads)
    )
    grad = draw(1, tokens, facts.heads, facts.head_dim)

    def both() -> None:
        out, _ = attend(
            module, q, k, v, None, scaling=facts.head_dim**-0.5,
            cu_seq_lens_q=offsets, cu_seq_lens_k=offsets,
            max_length_q=longest, max_length_k=longest,
        )  # fmt: skip
        torch.autograd.grad(out, (q, k, v), grad)

    # forward 2, backward 5 times the products of a token with those that it sees, of which the
    # upper half is left out: as `plan.speed` counts them
    work = 7.0 * sum(n * n for n in documents) * facts.queries
    return work / timed(both, device)


def rates(
    base: Any,
    facts: Facts,
    *,
    tokens: int,
    documents: Sequence[int],
    device: str,
    dtype: torch.dtype,
    seconds: float = SECONDS,
) -> Rates:
    """The rates of this device for the model `base`; what is out of time keeps the usual share."""
    began, tokens = time.monotonic(), min(tokens, MOST_TOKENS)
    shapes = {(m.outputs, m.inputs): 0.0 for m in facts.linears}
    for matrix in facts.linears:
        shapes[matrix.outputs, matrix.inputs] += matrix.layers * matrix.used
    copied = copy_rate(device, COPIED if device == "cuda" else 1 << 20)
    products = product_rate([(*s, n) for s, n in shapes.items()], tokens, device, dtype)
    scores = products * ATTENTION / GEMM
    if base.config._attn_implementation in BY_OFFSETS and time.monotonic() - began < seconds / 2:
        scores = attention_rate(base, facts, documents, device, dtype)
    return Rates(products, scores, copied)


def calibrate(
    tuned: Any, recipe: Recipe, placement: Placement, rows: Any, *, base: Path, run: Path
) -> dict[str, Any] | None:
    """Rates and the speed of all ranks that they give, kept in the folder `run`.

    What an earlier start measured with the same placement is taken up. `base` is the folder of the
    model, `rows` are those of the training. None where nothing can be said of the model, several
    ranks share it, or something failed.
    """
    placed = files.parse_json(files.canonical(asdict(placement)))
    about = {"device": _device(placement), "placement": placed}
    kept = _kept(run / NAME)
    if kept and about.items() <= kept.items():
        return kept
    if placement.shards > 1 or recipe.precision == "float32":
        return None
    before = torch.cuda.max_memory_allocated() if placement.device == "cuda" else 0
    try:
        made = _measured(tuned.get_base_model(), recipe, placement, rows, base)
    except Stopped:
        raise
    except Exception as error:
        logger.warning("the card was not calibrated: %s: %s", type(error).__name__, error)
        return None
    finally:
        if placement.device == "cuda":
            torch.cuda.empty_cache()
            if torch.cuda.max_memory_allocated() > before:
                torch.cuda.reset_peak_memory_stats()
    if made is not None:
        made |= about
        files.write_json(run / NAME, made)
    return made


def _measured(
    base: Any, recipe: Recipe, placement: Placement, rows: Any, folder: Path
) -> dict[str, Any] | None:
    facts = config.facts(files.read_json(folder / "config.json"))
    if facts is None or not facts.linears:
        return None
    began = time.monotonic()
    tokens = placement.micro_batch * recipe.max_length * recipe.answers
    documents = list(_documents(rows, tokens)) or [recipe.max_length]
    span = sum(n * n for n in documents) / sum(documents)
    by_offsets = base.config._attn_implementation in BY_OFFSETS
    found = rates(
        base,
        facts,
        tokens=tokens,
        documents=documents,
        device=placement.device,
        dtype=DTYPES[recipe.precision],
    )
    seconds = seconds_per_token(
        facts,
        found,
        method=recipe.method,
        checkpointing=placement.checkpointing,
        tokens=tokens,
        effective_length=span if by_offsets else tokens,
        rank=recipe.rank,
        attention="varlen" if by_offsets else "sdpa",
        fused=bool(placement.kernels),
        offload=placement.activation_offloading,
        tiled=placement.tiled_mlp,
    )
    assert seconds is not None
    ranks = placement.ranks * (DDP_EFFICIENCY if placement.ranks > 1 else 1.0)
    return {
        "rates": asdict(found),
        "tokens_per_second": ranks / seconds,
        "seconds": time.monotonic() - began,
    }


def _documents(rows: Any, tokens: int) -> Iterator[int]:
    """Lengths of the first documents, `tokens` of them together at most."""
    packed = "seq_lengths" in rows.column_names
    name = "seq_lengths" if packed else "input_ids"
    if name not in rows.column_names:
        return
    left = tokens
    for value in rows.select_columns(name).take(min(len(rows), 1000))[name]:
        for length in value if packed else [len(value)]:
            if length > left:
                return
            left -= length
            yield length


def _device(placement: Placement) -> str:
    return torch.cuda.get_device_name() if placement.device == "cuda" else "cpu"


def _kept(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = files.read_json(path)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
