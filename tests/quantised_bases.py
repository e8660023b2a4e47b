"""Tiny bases in the published formats of quantised checkpoints, and the 16-bit ones they stand for.

fp8 as DeepSeek and Qwen publish it (blocks of 128 x 128, float32 scales), as Mistral does (a scale
for a tensor, another for its activations), mxfp4 as gpt-oss. Written tensor by tensor from the
formats, without the library that reads them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
BLOCK = 128
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the eight magnitudes; bit 3 is the sign


def of(base: Path, folder: Path, quantise: Callable[[Tensors], Tensors], said: Any) -> Path:
    """`base` with the tensors that `quantise` makes of its own, and `said` in its config.json."""
    shutil.copytree(base, folder)
    tensors = load_file(base / "model.safetensors")
    made = {name: tensor.contiguous() for name, tensor in quantise(tensors).items()}
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config.pop("quantization_config", None)
    if said:
        config["quantization_config"] = said
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def is_projection(name: str) -> bool:
    """What makers quantise: projections, not embeddings, norms, head, routers and towers."""
    kept = ("norm", "embed", "lm_head", "vision", "projector", "mlp.gate.")
    return name.endswith(".weight") and not any(part in name for part in kept)


def block_fp8(tensors: Tensors) -> Tensors:
    """Each projection in F8_E4M3 with a float32 scale for each block, cut at the edges."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        if not is_projection(name) or tensor.ndim != 2:
            made[name] = tensor
            continue
        rows, columns = (-(-size // BLOCK) for size in tensor.shape)
        scale = torch.empty(rows, columns)
        whole = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
        for row in range(rows):
            for column in range(columns):
                place = (
                    slice(row * BLOCK, (row + 1) * BLOCK),
                    slice(column * BLOCK, (column + 1) * BLOCK),
                )
                part = tensor[place].float()
                scale[row, column] = part.abs().max() / 448
                whole[place] = (part / scale[row, column]).to(torch.float8_e4m3fn)
        made[name], made[f"{name}_scale_inv"] = whole, scale
    return made


def from_block_fp8(tensors: Tensors, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """The 16-bit tensors that `block_fp8` ones stand for, by the format's definition."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        made[name] = tensor
        if tensor.dtype == torch.float8_e4m3fn:
            scale, whole = tensors[f"{name}_scale_inv"], tensor.float()
            for row in range(whole.shape[0]):
                for column in range(0, whole.shape[1], BLOCK):
                    whole[row, column : column + BLOCK] *= scale[row // BLOCK, column // BLOCK]
            made[name] = whole.to(dtype)
    return made


def tensor_fp8(tensors: Tensors) -> Tensors:
    """Each projection in F8_E4M3 with one bfloat16 scale, and one for its activations."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        made[name] = tensor
        if is_projection(name):
            scale = (tensor.float().abs().max() / 448).to(torch.bfloat16)
            made[name] = (tensor.float() / scale.float()).to(torch.float8_e4m3fn)
            made[f"{name}_scale_inv"] = scale
            made[f"{name.removesuffix('weight')}activation_scale"] = torch.tensor(
                0.02, dtype=torch.bfloat16
            )
    return made


def from_tensor_fp8(tensors: Tensors, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """The 16-bit tensors that `tensor_fp8` ones stand for."""
    return {
        name: (tensor.float() * tensors[f"{name}_scale_inv"].float()).to(dtype)
        if tensor.dtype == torch.float8_e4m3fn
        else tensor
        for name, tensor in tensors.items()
        if not name.endswith(("_scale_inv", "activation_scale"))
    }


def mxfp4(tensors: Tensors) -> Tensors:
    """Each expert matrix as blocks and scales: two numbers a byte, the lower four bits first."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            made[name] = tensor
            continue
        groups = tensor.float().transpose(1, 2).unflatten(-1, (-1, 32))  # experts, outputs, groups
        exponent = torch.floor(torch.log2(groups.abs().amax(-1).clamp(min=2.0**-60))) - 2
        scaled = groups / torch.exp2(exponent)[..., None]
        steps = torch.tensor(FP4)
        code = (scaled.abs()[..., None] - steps).abs().argmin(-1) + 8 * (scaled < 0)
        pairs = code.to(torch.uint8).unflatten(-1, (16, 2))
        made[f"{name}_blocks"] = pairs[..., 0] | pairs[..., 1] << 4
        made[f"{name}_scales"] = (exponent + 127).to(torch.uint8)
    return made


def from_mxfp4(tensors: Tensors, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """The 16-bit tensors that `mxfp4` ones stand for."""
    values = torch.tensor([*FP4, *(-value for value in FP4)])
    made: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith("_blocks"):
            pairs = torch.stack([values[(tensor & 15).long()], values[(tensor >> 4).long()]], -1)
            scales = torch.exp2(tensors[name.replace("_blocks", "_scales")].float() - 127)
            whole = pairs.flatten(-2) * scales[..., None]
            made[name.removesuffix("_blocks")] = whole.flatten(-2).transpose(1, 2).to(dtype)
        elif not name.endswith("_scales"):
            made[name] = tensor
    return made


BLOCKED = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
STATIC = {
    "activation_scheme": "static",
    "dequantize": False,
    "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    "quant_method": "fp8",
    "weight_block_size": None,
}
MXFP4 = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}
FORMATS = {
    "block": (block_fp8, from_block_fp8, BLOCKED),
    "tensor": (tensor_fp8, from_tensor_fp8, STATIC),
    "mxfp4": (mxfp4, from_mxfp4, MXFP4),
}


def pair(base: Path, folder: Path, form: str) -> tuple[Path, Path]:
    """A base in the format `form`, and the 16-bit base that it stands for."""
    quantise, back, said = FORMATS[form]
    held = of(base, folder / "quantised", quantise, said)
    return held, of(base, folder / "plain", lambda tensors: back(quantise(tensors)), None)
