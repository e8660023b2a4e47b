"""Which tensors of an fp8 or mxfp4 checkpoint make one weight together, from headers alone.

fp8 (DeepSeek, Qwen, Ministral 3): `NAME` in 8-bit floats and its scale, one for the tensor, a row,
or a block of `weight_block_size`. mxfp4 (gpt-oss): `NAME_blocks` with two 4-bit floats a byte, 32
of which share a byte of `NAME_scales`, experts x outputs x groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tuning import safetensors
from tuning.presets import stored
from tuning.safetensors import Tensor

EIGHT_BIT = frozenset({"F8_E4M3", "F8_E5M2"})
_SCALES = frozenset({"F32", "BF16", "F16", "F8_E8M0", "U8"})
_ACTIVATIONS = ("activation_scale", "input_scale", "qscale_act")  # only fp8 arithmetic needs them
_GROUP = 16  # bytes that share a scale in mxfp4


@dataclass(frozen=True)
class Weight:
    """A weight of the 16-bit checkpoint, by the tensors that hold it."""

    kind: Literal["fp8", "mxfp4"]
    data: str  # name of the tensor with the numbers
    scale: str
    shape: tuple[int, ...]
    block: tuple[int, int]  # rows and columns that share a scale


def weights(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Weight | None]:
    """The names of the 16-bit checkpoint; None stands for a tensor that is stored as it is.

    `tensors` are those of all files, `config` the parsed config.json. Raises ValueError (a
    predicate about the checkpoint) for numbers without scales, or with such as do not fit.
    """
    kind = stored.of(config)
    if kind == "mxfp4":
        found = _mxfp4(tensors)
    elif kind == "fp8":
        found = _fp8(tensors, stored.section(config))
    else:
        found = {}
    spent = {part for weight in found.values() for part in (weight.data, weight.scale)}
    held = {weight.data.rpartition(".")[0] for weight in found.values()}
    plain = [
        name
        for name in tensors
        if name not in spent
        and not (name.endswith(_ACTIVATIONS) and name.rpartition(".")[0] in held)
    ]
    if bare := [name for name in plain if tensors[name].dtype.startswith(("F8", "F6", "F4"))]:
        raise ValueError(f"has no scale for {bare[0][:80]} ({tensors[bare[0]].dtype.lower()})")
    return {**dict.fromkeys(plain, None), **found}


def loaded_bytes(paths: Iterable[Path], config: Mapping[str, Any]) -> int:
    """Bytes of the weights in the files `paths` as they are held: 16 bits for what is unpacked."""
    if stored.of(config) not in stored.UNPACKED:
        return sum(path.stat().st_size for path in paths)
    tensors = {k: v for path in paths for k, v in safetensors.read_header(path).items()}
    return sum(
        2 * math.prod(weight.shape if weight else tensors[name].shape)
        for name, weight in weights(tensors, config).items()
    )


def _fp8(tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> dict[str, Weight]:
    found = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in EIGHT_BIT:
            continue
        stem = name.removesuffix("weight")
        names = (f"{name}_scale_inv", f"{name}_scale", f"{stem}scale", f"{stem}qscale_weight")
        scale = next((each for each in names if each in tensors), None)
        if scale is not None:
            block = _block(name, tensor.shape, tensors[scale], said.get("weight_block_size"))
            found[name] = Weight("fp8", name, scale, tensor.shape, block)
    return found


def _block(name: str, shape: tuple[int, ...], scale: Tensor, said: Any) -> tuple[int, int]:
    """Rows and columns of a weight of `shape` that share a scale."""
    grid, fits = grid_of(shape, scale.shape), scale.dtype in _SCALES
    if fits and len(shape) >= 2 and len(grid) == len(shape):
        (rows, columns), leading = shape[-2:], zip(grid[:-2], shape[:-2], strict=True)
        fits = all(own in (1, whole) for own, whole in leading)
        sizes = said if isinstance(said, list) and len(said) == 2 else ()
        if fits and sizes and all(type(n) is int and n > 0 for n in sizes):
            blocks = (math.ceil(rows / sizes[0]), math.ceil(columns / sizes[1]))
            if blocks == grid[-2:]:
                return sizes[0], sizes[1]
        if fits and all(grid[-2:]) and not rows % grid[-2] and not columns % grid[-1]:
            return rows // grid[-2], columns // grid[-1]
    what = f"scales of shape {list(scale.shape)} ({scale.dtype.lower()})"
    raise ValueError(f"has {what} that do not fit {name[:80]} of shape {list(shape)}")


def grid_of(weight: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a scale with as many dimensions as its weight: one number, or one a row, too."""
    if math.prod(scale) == 1:
        return (1,) * len(weight)
    return scale + (1,) * (len(weight) - len(scale))


def _mxfp4(tensors: Mapping[str, Tensor]) -> dict[str, Weight]:
    found = {}
    for name, blocks in tensors.items():
        scale = name.removesuffix("_blocks") + "_scales"
        if not name.endswith("_blocks") or scale not in tensors:
            continue
        shape, scales = blocks.shape, tensors[scale]
        kinds = {blocks.dtype, scales.dtype}
        if kinds != {"U8"} or len(shape) != 4 or shape[3] != _GROUP or scales.shape != shape[:3]:
            what = f"has scales of shape {list(scales.shape)} that do not fit {name[:80]}"
            raise ValueError(f"{what} of shape {list(shape)}")
        experts, outputs, groups = shape[:3]
        whole = (experts, 2 * _GROUP * groups, outputs)  # inputs before outputs, as in 16 bits
        found[name.removesuffix("_blocks")] = Weight("mxfp4", name, scale, whole, (1, 2 * _GROUP))
    return found
