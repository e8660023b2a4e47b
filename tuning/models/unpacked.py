"""A checkpoint of 8-bit or 4-bit floats, read as the 16-bit one that it stands for.

Each weight is unpacked when transformers asks for it, one after the other, so that disk and memory
hold no second copy: its classes, their conversions and 4-bit packing see an ordinary checkpoint.
A weight is its numbers times their scales, computed in float32 and rounded once. That is exact and
the same on any device, so the published revision decides it, and a recipe need not say more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tuning import safetensors
from tuning.errors import SpecError
from tuning.presets import quantised
from tuning.presets.quantised import Weight
from tuning.safetensors import Tensor
from tuning.sources import verify

CHUNK = 1 << 24  # numbers that are float32 at one time


class _Held(NamedTuple):
    """Where a tensor is stored."""

    path: Path
    file: Any  # safetensors' own handle


class Lazy:
    """A tensor that is read, and unpacked, when it is indexed, as safetensors' slices are."""

    def __init__(
        self,
        held: Mapping[str, _Held],
        name: str,
        weight: Weight | None,
        dtype: torch.dtype,
        to: str,
    ) -> None:
        self._held, self._name, self._weight = held, name, weight
        self._dtype, self._to = dtype, to

    @property
    def where(self) -> str:
        """File and name, for messages."""
        data = self._weight.data if self._weight else self._name
        return f"{self._held[data].path} {data}"

    def __getitem__(self, index: Any) -> torch.Tensor:
        if self._weight is None:
            plain: torch.Tensor = self._read(self._name)[index]
            return plain
        data, scale = self._read(self._weight.data), self._read(self._weight.scale)
        data, scale = data.to(self._to), scale.to(self._to)
        if self._weight.kind == "mxfp4":
            return _mxfp4(data, scale, self._weight, self._dtype)[index]
        return _fp8(data, scale, self._weight, self._dtype)[index]

    def _read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._held[name].file.get_tensor(name)
        return tensor


def tensors(
    base: Path, config: Mapping[str, Any], dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Lazy]:
    """The tensors of the model in `base`, whose parsed config.json is `config`, by their names.

    Quantised ones are unpacked to `dtype` on `device`. Raises SpecError for a checkpoint that does
    not hold together.
    """
    held: dict[str, _Held] = {}
    headers: dict[str, Tensor] = {}
    for path in paths(base):
        header = safetensors.read_header(path)
        headers.update(header)
        held.update(dict.fromkeys(header, _Held(path, safe_open(path, framework="pt"))))
    try:
        named = quantised.weights(headers, config)
    except ValueError as error:
        change = "download the model again, or use its 16-bit weights"
        raise SpecError.at("BASE-113", str(base), str(error), change) from None
    return {name: Lazy(held, name, weight, dtype, device) for name, weight in named.items()}


def paths(base: Path) -> list[Path]:
    """The files of the weights that transformers would read."""
    names, _ = verify.needed(path.name for path in base.iterdir())
    return [base / name for name in names if name.endswith(".safetensors")]


def _fp8(
    data: torch.Tensor, scale: torch.Tensor, weight: Weight, dtype: torch.dtype
) -> torch.Tensor:
    if scale.dtype == torch.uint8:  # an exponent, as float8_e8m0fnu
        scale = scale.view(torch.float8_e8m0fnu)
    scale = scale.to(torch.float32).reshape(quantised.grid_of(weight.shape, tuple(scale.shape)))
    scale = scale.expand(*data.shape[:-2], *scale.shape[-2:])
    result = torch.empty(data.shape, dtype=dtype, device=data.device)
    rows, columns = weight.block
    step = max(1, CHUNK // max(1, data.shape[-1]))
    matrices = zip(
        *(t.reshape(-1, *t.shape[-2:]) for t in (data, scale)),
        result.view(-1, *data.shape[-2:]),
        strict=True,
    )
    for numbers, scales, target in matrices:
        for first in range(0, len(numbers), step):
            part = numbers[first : first + step].to(torch.float32)
            of_row = torch.arange(first, first + len(part), device=data.device) // rows
            scale = scales[of_row]
            if part.shape[1] % columns:  # the last block is cut
                part.mul_(scale.repeat_interleave(columns, dim=1)[:, : part.shape[1]])
            else:
                part.unflatten(1, (-1, columns)).mul_(scale[..., None])
            target[first : first + step] = part
    return result


def _mxfp4(
    blocks: torch.Tensor, scales: torch.Tensor, weight: Weight, dtype: torch.dtype
) -> torch.Tensor:
    result = torch.empty(weight.shape, dtype=dtype, device=blocks.device)
    for expert in range(len(blocks)):  # else it takes several times the memory of all of them
        one = slice(expert, expert + 1)
        result[one] = convert_moe_packed_tensors(blocks[one], scales[one], dtype=torch.float32)
    return result
