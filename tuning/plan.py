"""spec + model + GPU + lengths -> Plan: recipe, placement, reasons."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tuning import files


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the adapter's bytes. Its hash is the run id. No path, host or clock."""

    base_model: str  # hub id, preset's hub id, or "local"
    base_revision: str  # commit of the hub, or "sha256:..." of a local folder's files
    data: tuple[str, ...]  # sha256 of each file, in order
    method: Literal["lora", "qlora"]
    precision: Literal["bfloat16", "float16", "float32"]  # weights and compute
    quantisation: dict[str, Any] | None  # {"type": "nf4", "double": true, "compute": "bfloat16"}
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...] | None  # None: every attention and MLP projection of the model
    exclude: tuple[str, ...]
    layers: tuple[int, ...] | None
    rslora: bool
    dora: bool
    optimizer: str  # a name transformers knows: adamw_torch_fused, adamw_torch, ...
    learning_rate: float
    schedule: str
    warmup_steps: int
    weight_decay: float
    betas: tuple[float, float]
    epsilon: float
    max_grad_norm: float
    neftune_alpha: float | None
    max_length: int
    packing: bool
    train_on: Literal["assistant", "all"]
    chat_template: str | None  # sha256 of a user's template
    columns: dict[str, str]  # messages_column, context_column, response_column as set
    shuffle: bool
    train_share: float
    global_batch: int  # rows (packed rows when packing) an optimizer step
    epochs: float
    steps: int
    seed: int
    eval_steps: int | None
    versions: dict[str, str] = field(default_factory=dict)  # torch, transformers, trl, peft, bitsandbytes

    @property
    def run_id(self) -> str:
        """sha256 of the canonical recipe, 64 hexadecimal digits."""
        return files.digest(files.canonical(asdict(self)))


@dataclass(frozen=True)
class Placement:
    """How this machine carries the recipe out; derived again at will."""

    device: Literal["cuda", "cpu"]
    ranks: int
    micro_batch: int  # rows at once on one rank
    accumulation: int  # global_batch == micro_batch * accumulation * ranks
    checkpointing: bool
    attention: str
    threads: int | None = None  # intra-op threads on a CPU; None leaves torch's choice
