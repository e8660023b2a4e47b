"""Adapter folders for tests of images and registries: real safetensors, a few hundred KiB."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

from tuning.oci.layout.package import Built, build_adapter

CONFIG = {
    "base_model_name_or_path": "org/base",
    "lora_alpha": 16,
    "peft_type": "LORA",
    "r": 8,
    "target_modules": ["k_proj", "q_proj"],
    "task_type": "CAUSAL_LM",
}


def adapter(folder: Path, *, size: int = 200_000, seed: int = 0) -> Path:
    """An adapter folder whose weights have about `size` bytes."""
    folder.mkdir(parents=True)
    tensors, data = {}, random.Random(seed).randbytes(size // 32 * 32)
    for part, shape in (("lora_A", [8, len(data) // 32]), ("lora_B", [0, 8])):
        span = [0, len(data)] if part == "lora_A" else [len(data), len(data)]
        name = f"base_model.model.model.layers.0.self_attn.q_proj.{part}.weight"
        tensors[name] = {"dtype": "F32", "shape": shape, "data_offsets": span}
    header = json.dumps(tensors).encode()
    weights = struct.pack("<Q", len(header)) + header + data
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("# An adapter\n")
    (folder / "tuning.json").write_text('{"steps": 8}')
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def build(folder: Path, *, run_id: str = "run-1", seed: int = 0, **more: Any) -> Built:
    """An image of an adapter of its own in the layout `folder`/image."""
    source = folder / "adapter"
    if not source.exists():
        adapter(source, seed=seed, size=more.pop("size", 200_000))
    settings = {"preset": "phi-3-mini-4k-instruct", "annotations": {"a": "b"}} | more
    return build_adapter(source, folder / "image", run_id=run_id, **settings)
