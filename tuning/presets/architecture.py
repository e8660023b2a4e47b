"""A model's shape and the sizes computed from it, without torch or weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Layout = Literal["llama", "phi3", "phi", "falcon", "gpt_oss"]


@dataclass(frozen=True)
class Linear:
    """One linear layer of a decoder layer: y = x W^T + b, with W of [outputs, inputs]."""

    name: str  # within the decoder layer, such as "self_attn.qkv_proj"
    inputs: int
    outputs: int
    bias: bool

    @property
    def parameters(self) -> int:
        """Elements of W and b."""
        return self.inputs * self.outputs + self.bias * self.outputs


@dataclass(frozen=True)
class Facts:
    """The shape of a text model, enough to size its training. Counts are elements, not bytes."""

    model_type: str  # of the text model: "llama", "phi3", "gemma3_text", ...
    architecture: str  # transformers' class of the text model
    wrapper: str | None  # the class around it, where config.json describes more than text
    layout: Layout  # how a decoder layer's linear layers are named and fused
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int  # longest sequence, in tokens
    tied: bool  # the output embedding is the input embedding
    activation: str
    qkv_bias: bool
    output_bias: bool  # of the projection that ends attention
    mlp_bias: bool
    head_bias: bool
    norm: Literal["rms", "layer"]  # a layer norm has a bias, too
    norms: int  # of hidden size, in each decoder layer
    qk_norm: Literal["none", "head", "full"]  # over one head, or over all heads
    parallel: bool  # attention and MLP read the same input
    window: int | None  # tokens that a windowed layer sees
    windowed_layers: int
    rotary: float  # share of each head that is rotated
    softcap: bool  # attention scores are capped
    sinks: bool  # attention has a learned sink for each head
    experts: int  # 0 for a dense model
    tower: int  # parameters outside the text model (vision tower and projector), all frozen
    stored: str  # how the checkpoint holds its weights: "16-bit", "fp8", "mxfp4", ...
    packing_safe: bool  # packed rows do not attend to each other
    packing_reason: str

    @property
    def queries(self) -> int:
        """Width of the queries of all heads."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of the keys (and of the values) of all heads."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers of one decoder layer: what LoRA adapts and 4-bit loading packs.

        Without embeddings, output head, routers and experts (which are not linear layers).
        """
        return _attention(self) + _feed_forward(self)

    @property
    def layer_parameters(self) -> int:
        """Elements of one decoder layer."""
        norms = self.norms * self.hidden * self._norm_width
        if self.qk_norm == "head":
            norms += 2 * self.head_dim * self._norm_width
        elif self.qk_norm == "full":
            norms += (self.queries + self.keys) * self._norm_width
        sinks = self.heads if self.sinks else 0
        return sum(linear.parameters for linear in self.linears) + norms + sinks + _experts(self)

    @property
    def embedding_parameters(self) -> int:
        """Elements of the input embedding and of the output head, which tied models share."""
        head = 0 if self.tied else self.vocab * self.hidden
        return self.vocab * self.hidden + head + self.head_bias * self.vocab

    @property
    def parameters(self) -> int:
        """Elements of the text model."""
        final_norm = self.hidden * self._norm_width
        return self.embedding_parameters + self.layers * self.layer_parameters + final_norm

    @property
    def weight_bytes(self) -> int:
        """Bytes of the text model's weights in 16 bits."""
        return 2 * self.parameters

    @property
    def _norm_width(self) -> int:
        return 2 if self.norm == "layer" else 1


def _attention(f: Facts) -> tuple[Linear, ...]:
    fused = f.queries + 2 * f.keys
    match f.layout:
        case "falcon":
            return (
                Linear("self_attention.query_key_value", f.hidden, fused, f.qkv_bias),
                Linear("self_attention.dense", f.queries, f.hidden, f.output_bias),
            )
        case "phi3":
            return (
                Linear("self_attn.qkv_proj", f.hidden, fused, f.qkv_bias),
                Linear("self_attn.o_proj", f.queries, f.hidden, f.output_bias),
            )
    output = "self_attn.dense" if f.layout == "phi" else "self_attn.o_proj"
    return (
        Linear("self_attn.q_proj", f.hidden, f.queries, f.qkv_bias),
        Linear("self_attn.k_proj", f.hidden, f.keys, f.qkv_bias),
        Linear("self_attn.v_proj", f.hidden, f.keys, f.qkv_bias),
        Linear(output, f.queries, f.hidden, f.output_bias),
    )


def _feed_forward(f: Facts) -> tuple[Linear, ...]:
    wide, narrow = (f.hidden, f.intermediate, f.mlp_bias), (f.intermediate, f.hidden, f.mlp_bias)
    match f.layout:
        case "gpt_oss":
            return ()
        case "falcon":
            return Linear("mlp.dense_h_to_4h", *wide), Linear("mlp.dense_4h_to_h", *narrow)
        case "phi":
            return Linear("mlp.fc1", *wide), Linear("mlp.fc2", *narrow)
        case "phi3":
            both = Linear("mlp.gate_up_proj", f.hidden, 2 * f.intermediate, f.mlp_bias)
            return both, Linear("mlp.down_proj", *narrow)
    gate, up = Linear("mlp.gate_proj", *wide), Linear("mlp.up_proj", *wide)
    return gate, up, Linear("mlp.down_proj", *narrow)


def _experts(f: Facts) -> int:
    """Elements of one layer's router and experts; each has two matrices, with biases."""
    if not f.experts:
        return 0
    inner = 2 * f.intermediate * (f.hidden + 1) + f.hidden * (f.intermediate + 1)
    return f.experts * (f.hidden + 1) + f.experts * inner
