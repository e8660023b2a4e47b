"""Linear layers and parameters of a decoder whose layers are all alike, in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tuning.presets.architecture import Matrix

Layout = Literal["llama", "phi3", "phi", "falcon"]


@dataclass(frozen=True)
class Dense:
    """The sizes of such a decoder."""

    layout: Layout  # how a decoder layer's linear layers are named and fused
    hidden: int
    intermediate: int
    layers: int
    queries: int  # width of the queries of all heads
    keys: int
    head_dim: int
    vocab: int
    tied: bool  # the output embedding is the input embedding
    qkv_bias: bool
    output_bias: bool  # of the projection that ends attention
    mlp_bias: bool
    head_bias: bool
    norm: Literal["rms", "layer"]  # a layer norm has a bias, too
    norms: int  # of hidden size, in each decoder layer
    qk_norm: Literal["none", "head", "full"]  # over one head, or over all heads

    @property
    def linears(self) -> tuple[Matrix, ...]:
        """Every linear layer but the head."""
        return tuple(
            Matrix(name, inputs, outputs, bias, self.layers)
            for name, inputs, outputs, bias in (*self._attention(), *self._feed_forward())
        )

    @property
    def parameters(self) -> int:
        """Elements of the model."""
        width = 2 if self.norm == "layer" else 1
        norms = self.norms * self.hidden
        if self.qk_norm == "head":
            norms += 2 * self.head_dim
        elif self.qk_norm == "full":
            norms += self.queries + self.keys
        biases = sum(linear.outputs for linear in self.linears if linear.bias)
        weights = sum(linear.elements for linear in self.linears)
        embeddings = (1 if self.tied else 2) * self.vocab * self.hidden
        head_bias = self.vocab if self.head_bias else 0
        layers = weights + self.layers * (biases + norms * width)
        return embeddings + head_bias + layers + self.hidden * width

    def _attention(self) -> tuple[tuple[str, int, int, bool], ...]:
        fused = self.queries + 2 * self.keys
        match self.layout:
            case "falcon":
                return (
                    ("self_attention.query_key_value", self.hidden, fused, self.qkv_bias),
                    ("self_attention.dense", self.queries, self.hidden, self.output_bias),
                )
            case "phi3":
                return (
                    ("self_attn.qkv_proj", self.hidden, fused, self.qkv_bias),
                    ("self_attn.o_proj", self.queries, self.hidden, self.output_bias),
                )
        output = "self_attn.dense" if self.layout == "phi" else "self_attn.o_proj"
        return (
            ("self_attn.q_proj", self.hidden, self.queries, self.qkv_bias),
            ("self_attn.k_proj", self.hidden, self.keys, self.qkv_bias),
            ("self_attn.v_proj", self.hidden, self.keys, self.qkv_bias),
            (output, self.queries, self.hidden, self.output_bias),
        )

    def _feed_forward(self) -> tuple[tuple[str, int, int, bool], ...]:
        wide = (self.hidden, self.intermediate, self.mlp_bias)
        narrow = (self.intermediate, self.hidden, self.mlp_bias)
        match self.layout:
            case "falcon":
                return ("mlp.dense_h_to_4h", *wide), ("mlp.dense_4h_to_h", *narrow)
            case "phi":
                return ("mlp.fc1", *wide), ("mlp.fc2", *narrow)
            case "phi3":
                both = ("mlp.gate_up_proj", self.hidden, 2 * self.intermediate, self.mlp_bias)
                return both, ("mlp.down_proj", *narrow)
        return ("mlp.gate_proj", *wide), ("mlp.up_proj", *wide), ("mlp.down_proj", *narrow)
