"""Traces of a few small steps -> the moments at which any step's memory can be highest.

Steps of the same variant run the same operators, whatever their sizes, and a layer more adds the
same operators once more. So the live bytes after each operator are linear in the sizes, and for an
operator of the first or of the last layer in the number of layers, too. Solving that for each, and
keeping those that are highest somewhere, gives the closed formula; between the first and the last
layer memory changes linearly, so that no instant in the middle can be higher than both ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tuning.models.survey import REPEATED, TOWER, survey
from tuning.plan.coefficients import KINDS, SIZES, Coefficients, Moment, Variant, measures
from tuning.training.simulate import standins
from tuning.training.simulate.memory import COLUMNS
from tuning.training.simulate.step import Phase, Point, Stage, build, read

SHALLOW, DEEPER = 2, 3  # layers from which all others follow
TOLERANCE = 3e-4  # a moment that raises no peak by more than this share is dropped
RANK = 37  # no other dimension of any model: a tensor with it is one of the adapters'
# Steps to run: one for each size that counts, and apart enough to tell them from each other.
PACKED = tuple(Point(*shape, RANK) for shape in ((1, 2048), (2, 1024), (1, 4096)))
PADDED = tuple(Point(*shape, RANK) for shape in ((2, 1024), (4, 1024), (8, 512), (2, 2048)))
SINGLE = tuple(Point(*shape, RANK) for shape in ((1, 512), (1, 1024), (1, 2048)))
GRID = tuple(  # where the highest moments are looked for
    {"tokens": tokens, "rows": rows, "rank": rank}
    for tokens in (64, 256, 1024, 2048, 4096, 6144, 8192, 16384, 65536, 262144)
    for rows in (1, 4, 64)
    for rank in (4, 16, 64, 256)
)
_RANKED = {"constant": "rank", "tokens": "rank_tokens"}
_NAMES = {
    ("forward", "first"): "forward of the first layer",
    ("forward", "last"): "forward of the last layer and the loss",
    ("backward", "first"): "backward of the loss and the last layer",
    ("backward", "last"): "backward of the first layer",
    ("forward", "all"): "forward",
    ("backward", "all"): "backward",
}
Forms = NDArray[np.float64]  # [sizes, operators, kinds]


def coefficients(config: Any, *, variants: Iterable[Variant]) -> Coefficients:
    """What `memory.predict` needs for the model of `config` (parsed config.json, or transformers').

    Runs on a CPU, without weights: about 2 s for each variant.
    """
    found = _with_single_rows(config, dict.fromkeys(variant.stored for variant in variants))
    whole = build(config, variant=Variant(attention="eager"))
    packing = build(config, variant=Variant(method="qlora", attention="eager"))
    packed = [m for m in packing.modules() if isinstance(m, standins.PackedLinear)]
    elements = sum(m.in_features * m.out_features for m in packed)
    adapters: dict[str, int] = {}
    modules = dict(whole.named_modules())
    reached = survey(whole)
    for name in reached.linears:
        linear, short = modules[name], name.rpartition(".")[2]
        adapters[short] = adapters.get(short, 0) + linear.in_features + linear.out_features
    for name in reached.experts:
        count, inputs, outputs = whole.get_parameter(name).shape
        short = name.rpartition(".")[2]
        adapters[short] = adapters.get(short, 0) + count * (inputs + outputs)
    return Coefficients(
        layers=read(config).get_text_config().num_hidden_layers,
        kept=sum(p.numel() for p in whole.parameters()) - elements,
        packed=elements,
        packed_modules=len(packed),
        buffers=sum(b.numel() * b.element_size() for b in whole.buffers()),
        adapters=adapters,
        moments={v: moments(config, variant=v, uniform=uniform(whole)) for v in found},
    )


def _with_single_rows(config: Any, variants: Iterable[Variant]) -> Iterator[Variant]:
    """`variants`, and a second one for steps of one row where those run other operators."""
    other: bool | None = None  # unknown
    for variant in variants:
        yield variant
        if variant.attention == "varlen":
            continue
        if other is None:
            stage = Stage(config, variant=variant, rank=RANK, layers=1)
            one, two = (stage.run(Point(rows, 256, RANK)) for rows in (1, 2))
            other = one.forward.operators != two.forward.operators
        if other:
            yield replace(variant, single_row=True)


def uniform(model: torch.nn.Module) -> bool:
    """Whether every decoder layer of `model` holds weights of the same shapes."""
    shapes: dict[str, set[tuple[str, tuple[int, ...]]]] = {}
    for name, parameter in model.named_parameters():
        match = REPEATED.search(name)
        if match and not TOWER.search(name):
            shapes.setdefault(match[1], set()).add((name[match.end() :], tuple(parameter.shape)))
    return len({frozenset(layer) for layer in shapes.values()}) == 1


def moments(config: Any, *, variant: Variant, uniform: bool = True) -> tuple[Moment, ...]:
    """The moments of `variant`. Where layers differ (`uniform` False), all of them are run."""
    depth = read(config).get_text_config().num_hidden_layers
    points, used = _design(variant)
    depths = (SHALLOW, DEEPER) if uniform and depth > DEEPER else (depth,)
    stages = [Stage(config, variant=variant, rank=RANK, layers=layers) for layers in depths]
    traces = {point: [stage.run(point) for stage in stages] for point in points}
    found: list[tuple[str, Forms]] = []
    for phase in ("forward", "backward"):
        runs = {point: [getattr(trace, phase) for trace in run] for point, run in traces.items()}
        _same_operators(runs)
        found += [(_NAMES[phase, end], form) for end, form in _windows(runs, depth, used, variant)]
    return envelope(found, variant)


def _design(variant: Variant) -> tuple[tuple[Point, ...], tuple[str, ...]]:
    """The steps to run, and those of SIZES that they tell apart."""
    if variant.attention == "varlen":
        return PACKED, ("constant", "tokens", "rows")
    if variant.single_row:
        return SINGLE, ("constant", "tokens", "pairs")
    return PADDED, ("constant", "tokens", "pairs", "square")


def _same_operators(runs: Mapping[Point, list[Phase]]) -> None:
    if len({tuple(phase.operators for phase in run) for run in runs.values()}) != 1:
        raise ValueError("steps of different sizes run different operators: no formula holds")


def _windows(
    runs: Mapping[Point, list[Phase]], depth: int, used: tuple[str, ...], variant: Variant
) -> list[tuple[str, Forms]]:
    """Forms of the operators near either end of a phase, for all `depth` layers."""
    phases = next(iter(runs.values()))
    if len(phases) == 1:
        every = {p: run[0].bytes.astype(float) for p, run in runs.items()}
        return [("all", _solve(every, used, variant))]
    shallow, deeper = phases
    ends = {"first": slice(0, shallow.head), "last": slice(-shallow.tail, None)}
    if any(shallow.operators[end] != deeper.operators[end] for end in ends.values()):
        raise ValueError("a layer more runs other operators: no formula holds")
    forms = []
    for end, window in ends.items():
        values = {}
        for point, run in runs.items():
            low, high = (phase.bytes[window] for phase in run)
            values[point] = low + (depth - SHALLOW) * (high - low).astype(float)
        forms.append((end, _solve(values, used, variant)))
    return forms


def _solve(
    values: Mapping[Point, NDArray[np.float64]], used: tuple[str, ...], variant: Variant
) -> Forms:
    """Coefficients by SIZES for each operator and each of `memory.KINDS`, from its bytes at points.

    All are whole bytes: rounding takes off what tensors rounded up to a block add to the others.
    """
    stacked = np.stack(list(values.values()))  # [points, operators, columns]
    forms = np.zeros((len(SIZES), stacked.shape[1], len(KINDS)))
    for column in range(stacked.shape[2]):
        index, proportional = column % len(COLUMNS), column >= len(COLUMNS)
        name = COLUMNS[index]
        sizes = used
        if name == "tile":  # of the one-pass head it is full at every point, and nothing else
            sizes = ("tile",) if variant.fused else ("constant", "tile")
        if proportional:
            sizes = tuple(size for size in sizes if size in _RANKED)
        solution = _least_squares(values, sizes, stacked[:, :, column], variant)
        kind = KINDS.index("loss" if name == "tile" else name)
        for size, coefficient in zip(sizes, solution, strict=True):
            target = _RANKED[size] if proportional else size
            share = coefficient / RANK if proportional else coefficient
            forms[SIZES.index(target), :, kind] += np.round(share)
    return forms


def _least_squares(
    points: Iterable[Point],
    sizes: tuple[str, ...],
    values: NDArray[np.float64],
    variant: Variant,
) -> NDArray[np.float64]:
    """For each operator (a column of `values`) the coefficients [sizes, operators]."""
    places = [SIZES.index(size) for size in sizes]
    every = [measures(tokens=p.tokens, rows=p.rows, rank=p.rank, tile=variant.tile) for p in points]
    matrix = np.array(every)[:, places]
    scale = matrix.max(axis=0)
    solution: NDArray[np.float64] = np.linalg.lstsq(matrix / scale, values, rcond=None)[0]
    scaled: NDArray[np.float64] = solution / scale[:, None]
    return scaled


def envelope(found: list[tuple[str, Forms]], variant: Variant) -> tuple[Moment, ...]:
    """The fewest operators that are highest, within TOLERANCE, everywhere on GRID.

    With and without an earlier micro-batch's gradients, which hide those of this one.
    """
    names = [name for name, forms in found for _ in range(forms.shape[1])]
    forms = np.concatenate([forms for _, forms in found], axis=1)
    grid = np.array([measures(**sizes, tile=variant.tile) for sizes in GRID])
    bytes_ = np.einsum("gs,sok->gok", grid, forms)
    gradients = bytes_[:, :, KINDS.index("gradients")]
    totals = np.concatenate([bytes_.sum(axis=2), bytes_.sum(axis=2) - gradients])
    enough = totals >= totals.max(axis=1, keepdims=True) * (1 - TOLERANCE)
    chosen: list[int] = []
    left = np.ones(len(totals), dtype=bool)
    while left.any():
        chosen.append(int(enough[left].sum(axis=0).argmax()))
        left &= ~enough[:, chosen[-1]]
    seen: dict[str, int] = {}
    result = []
    for operator in sorted(chosen):
        name = names[operator]
        seen[name] = seen.get(name, 0) + 1
        name += f" ({seen[name]})" if seen[name] > 1 else ""
        shares = {
            kind: tuple(forms[:, operator, index].tolist())
            for index, kind in enumerate(KINDS)
            if forms[:, operator, index].any()
        }
        result.append(Moment(name, shares))
    return tuple(result)
