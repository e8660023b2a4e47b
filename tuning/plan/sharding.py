"""How ranks share copies of a model (FSDP2), and what is whole on each of them at once.

Every decoder layer is gathered before its forward and again before its backward, and freed after;
the next one is gathered meanwhile. An untied embedding is gathered for its forward, an untied
output layer while the loss is computed. Constants of the 4-bit blocks, tied or trained embeddings
and whatever lies outside of these stay whole on each rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tuning.plan.coefficients import Coefficients, Method, Precision
from tuning.presets import Facts
from tuning.spec import Sharding

GATHERED_LAYERS = 2  # whole ones at once: that which is computed with, and the next
# Further copies of the largest layer: FSDP2 gathers into one buffer and copies the weights out of
# it; gradients of adapters are whole while they are reduced, those of the layer before meanwhile.
GATHER_BUFFERS, REDUCED_LAYERS = 1, 2
UNEVEN = 1.5  # the largest layer, in mean ones, of a model whose layers are not known


@dataclass(frozen=True)
class Layout:
    """How the ranks of some machines hold a model: `shards` of them share one copy of it."""

    ranks: int = 1  # processes of all machines
    nodes: int = 1
    shards: int = 1  # 1: each holds it whole; ranks: all share one
    offload: bool = False  # what is shared lies in host memory

    @property
    def copies(self) -> int:
        """Copies of the model (replicas)."""
        return self.ranks // self.shards

    @property
    def each(self) -> int:
        """Ranks of one machine."""
        return self.ranks // self.nodes

    @property
    def process_groups(self) -> int:
        """Groups in which a rank talks to others: of its copy, and of the same share of others."""
        if self.ranks == 1:
            return 0
        return 2 if 1 < self.shards < self.ranks else 1

    @property
    def spanned(self) -> int:
        """Machines that one copy lies on."""
        return max(1, self.shards // self.each)

    def text(self, things: str) -> str:
        """In words, such as "16 GPUs on 2 machines: each holds 1/8 of the weights, 2 replicas"."""
        where = f" on {self.nodes} machines" if self.nodes > 1 else ""
        share = f"1/{self.shards} of the weights" if self.shards > 1 else "all weights"
        if self.offload:
            share += ", in host memory"
        copies = f", {self.copies} replicas" if 1 < self.copies < self.ranks else ""
        return f"{self.ranks} {things}{where}: each holds {share}{copies}"


ALONE = Layout()
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "sgd")  # whose state is shared as weights are
SHARE_LAYERS = ("zamba", "zamba2")  # classes whose layers share weights, which FSDP2 cannot cut


def whole_only(model_type: str | None, *, dora: bool, optimizer: str) -> str:
    """All that trains only with the whole model on each rank, if anything."""
    obstacles = {
        "DoRA (LoraConfig.use_dora)": dora,
        f"the optimizer {optimizer} (TrainingArguments.optim)": optimizer not in OPTIMIZERS,
        f"the class {model_type}": model_type in SHARE_LAYERS,
    }
    return " and ".join(name for name, there in obstacles.items() if there)


def layouts(ranks: int, nodes: int, wanted: Sharding | None = None) -> list[Layout]:
    """The layouts of `ranks` on `nodes` machines, that of the fewest shards first.

    A copy lies on a part of a machine, or on whole machines. With one that is `wanted`, that.
    """
    each = ranks // nodes
    if wanted is not None:
        chosen = {"full_shard": ranks, "hybrid_shard": each, "no_shard": 1}[wanted]
        return [Layout(ranks, nodes, chosen)]
    parts = [shards for shards in range(1, each + 1) if each % shards == 0]
    wholes = [each * count for count in range(2, nodes + 1) if nodes % count == 0]
    return [Layout(ranks, nodes, shards) for shards in parts + wholes]


@dataclass(frozen=True)
class Shared:
    """Bytes of what the ranks of a layout share, each by its purpose; the rest is whole."""

    layout: Layout
    layers: int  # projections of all decoder layers, as they are stored
    layer: int  # of the largest one, with its adapters
    embedding: int  # 0 where it is tied
    head: int
    lora: int  # LoRA weights of all layers
    layer_lora: int  # of the largest one

    def part(self, size: float) -> int:
        """What each rank holds of `size` bytes."""
        return math.ceil(size / self.layout.shards)

    def resident(self, weights: int, *, optimizer: float) -> dict[str, int]:
        """Bytes in memory all the time, of base `weights` and state of the `optimizer`.

        `host` counts what lies in host memory instead, with the adapters' gradients.
        """
        shared = self.layers + self.embedding + self.head if self.layout.shards > 1 else 0
        parts = {
            "weights": self.part(shared),
            "adapters": self.part(self.lora),
            "optimizer": self.part(optimizer),
            "host": 0,
        }
        if self.layout.offload:
            host = sum(parts.values()) + self.part(self.lora)
            parts = dict.fromkeys(parts, 0) | {"host": host}
        parts["weights"] += weights - shared
        return parts

    def gradients(self, size: int) -> int:
        """Bytes for `size` bytes of gradients.

        DDP's buckets hold them a second time. A shared copy's are reduced layer by layer.
        """
        if self.layout.shards == 1:
            return size + (self.lora if self.layout.ranks > 1 else 0)
        kept = 0 if self.layout.offload else self.part(size)
        return min(size, kept + REDUCED_LAYERS * self.layer_lora)

    def gathered(self, moment: str) -> dict[str, int]:
        """Bytes that are whole at a moment of a step, and of buffers then."""
        if self.layout.shards == 1 or moment == "optimizer step":
            return {"gathered": 0, "buffers": 0}
        head = 0 if moment.startswith("backward of the first layer") else self.head
        buffers = GATHER_BUFFERS * self.layer + self.part(self.layer)
        return {"gathered": GATHERED_LAYERS * self.layer + head, "buffers": buffers}


def share(
    coefficients: Coefficients,
    facts: Facts | None,
    layout: Layout,
    *,
    method: Method,
    precision: Precision,
    lora: int,
    new_tokens: bool = False,
) -> Shared:
    """What the ranks of `layout` share of a model with `lora` bytes of adapters.

    With rows for `new_tokens` to train, its embeddings stay whole, and without `facts` they count
    as whole: an upper bound. Beside shares in host memory the embedding is on the GPU.
    """
    width = 4 if precision == "float32" else 2
    packed = coefficients.packed
    if facts is None:
        layer, table = min(packed, round(UNEVEN * packed / coefficients.layers)), 0
    else:
        layer = min(packed, sum(m.elements // m.layers for m in facts.matrices))
        table = width * facts.vocab * facts.hidden
        if new_tokens or facts.tied or width * (coefficients.kept - facts.tower) < 2 * table:
            table = 0
    stored = -(-packed // 2) if method == "qlora" else width * packed
    of_layer = layer / max(1, packed)
    layer_lora = math.ceil(of_layer * lora)
    layer_bytes = math.ceil(of_layer * stored) + layer_lora
    embedding = 0 if layout.offload else table
    return Shared(layout, stored, layer_bytes, embedding, table, lora, layer_lora)
