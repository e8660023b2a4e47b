"""What a step keeps on a GPU beside the layers' weights: the choices, their bytes and their time.

Coefficients are simulated for steps that keep all of them, and for steps that keep the inputs of
layers and compute the rest again. What lies between and beyond follows:

- *Some layers recomputed.* The last layers keep their activations. If layers are alike, bytes are
  linear in how many do at every moment, so the peak is convex in it, and the line between none and
  all lies above it.
- *Inputs in host memory.* At most HELD inputs [tokens, hidden] are on the GPU: that of the layer
  which computes, one that is copied, and the embeddings, which autograd holds as a leaf.
- *Input embeddings in host memory.* The rows of a step's tokens are looked up there. Only where
  they are frozen and not the output layer's weights, too.
"""

from __future__ import annotations

from dataclasses import dataclass

TILES = 4  # parts that an MLP's tokens are computed in
HELD = 3  # layer inputs on the device at once, of those that are offloaded


@dataclass(frozen=True)
class Activations:
    """What is kept of the activations of the decoder layers."""

    checkpointing: bool = False  # only the layers' inputs are
    recomputed: int | None = None  # of the first so many layers; None: of all
    offload: bool = False  # in host memory
    tiled: bool = False  # MLPs are computed in TILES parts
    host_embeddings: bool = False  # the input embeddings lie in host memory
    unpacked: bool = False  # 4-bit weights of a layer that is computed again, until its backward

    @property
    def text(self) -> str:
        """In words, such as "the first 12 layers are computed again"."""
        if not self.checkpointing:
            return "off"
        words = "on" if self.recomputed is None else f"of the first {self.recomputed} layers"
        words += ", inputs in host memory" if self.offload else ""
        words += ", MLPs in tiles" if self.tiled else ""
        return words + (", input embeddings in host memory" if self.host_embeddings else "")


ALL = Activations()
INPUTS = Activations(True)
OFFLOADED = Activations(True, offload=True)
TILED = Activations(True, offload=True, tiled=True)
LOOKED_UP = Activations(True, offload=True, tiled=True, host_embeddings=True)


def on_host(layers: int, tokens: int, hidden: int, width: int) -> int:
    """Bytes of pinned host memory for the inputs of all layers.

    torch's pinned allocator rounds each up to a power of two (`CachingHostAllocator`).
    """
    one = tokens * hidden * width
    return layers * (1 << (one - 1).bit_length())


def off_device(moment: str, layers: int, tokens: int, hidden: int, width: int) -> int:
    """Bytes that offload takes off the GPU at a moment of a step that keeps all inputs there.

    Negative in the backward of the first layers, where an input is fetched ahead.
    """
    one = tokens * hidden * width
    if "last layer" in moment:  # the inputs of all layers are alive
        return (layers - HELD) * one
    return (1 - HELD) * one if moment.startswith("backward of the first layer") else 0
