"""A model's shape, as numbers to size its training with; without torch or weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Matrix:
    """A weight of the decoder layers, y = x W^T + b with W of [outputs, inputs]."""

    name: str  # within the decoder layer, such as "self_attn.qkv_proj"
    inputs: int
    outputs: int
    bias: bool
    layers: int  # decoder layers that have it
    copies: int = 1  # in each of them: experts
    used: int = 1  # copies that a token passes through

    @property
    def elements(self) -> int:
        """Numbers of W, in all layers and copies."""
        return self.inputs * self.outputs * self.layers * self.copies

    @property
    def active(self) -> int:
        """Those that a token is multiplied with."""
        return self.inputs * self.outputs * self.layers * self.used

    @property
    def adapter(self) -> int:
        """Numbers of a LoRA adapter on it, for each unit of rank."""
        return (self.inputs + self.outputs) * self.layers * self.copies


@dataclass(frozen=True)
class Facts:
    """The shape of a text model. Counts are elements, not bytes."""

    model_type: str  # of the text model: "llama", "phi3", "gemma3_text", ...
    architecture: str  # transformers' class of the text model
    wrapper: str | None  # the class around it, where config.json describes more than text
    hidden: int
    intermediate: int  # width of the MLP, or of all experts that a token passes through
    layers: int
    attending: int  # layers with attention over all tokens; the others are recurrent
    heads: int
    kv_heads: int
    head_dim: int  # the widest
    vocab: int
    context: int  # longest sequence, in tokens
    norms: int  # of hidden size, in each decoder layer
    window: int | None  # tokens that a windowed layer sees
    windowed_layers: int
    rotary: float  # share of each head that is rotated
    softcap: bool  # attention scores are capped
    sinks: bool  # attention has a learned sink for each head
    linears: tuple[Matrix, ...]
    experts: tuple[Matrix, ...]  # of a mixture, one parameter for all of a layer's
    parameters: int  # of the text model
    active: int  # without the experts that a token does not pass through
    tower: int  # parameters outside the text model (vision tower and projector), all frozen
    stored: str  # how the checkpoint holds its weights: "16-bit", "fp8", "mxfp4", ...
    packing_safe: bool  # packed rows do not attend to each other
    packing_reason: str
    tied: bool = True  # the output layer is the embedding

    @property
    def queries(self) -> int:
        """Width of the queries of all heads."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of the keys (and of the values) of all heads."""
        return self.kv_heads * self.head_dim

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """What LoRA adapts and 4-bit loading packs."""
        return self.linears + self.experts

    @property
    def packed(self) -> int:
        """Numbers that 4-bit loading packs."""
        return sum(matrix.elements for matrix in self.matrices)

    @property
    def multiplied(self) -> int:
        """Numbers of the decoder layers that a token is multiplied with."""
        return sum(matrix.active for matrix in self.matrices)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the text model's weights in 16 bits."""
        return 2 * self.parameters

    def adapter(self, targets: Iterable[str] | None = None) -> int:
        """Numbers of LoRA on all of them, or those of these short names, for a unit of rank."""
        return sum(
            matrix.adapter
            for matrix in self.matrices
            if targets is None or matrix.name.rpartition(".")[2] in targets
        )

    def to_json(self) -> dict[str, Any]:
        """JSON for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Facts:
        """The facts in a record of `to_json`."""
        matrices = {
            key: tuple(Matrix(**matrix) for matrix in record[key]) for key in ("linears", "experts")
        }
        return cls(**{**record, **matrices})
