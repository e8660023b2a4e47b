"""What was measured of each class of model that transformers knows: `configs/classes.yaml`.

Made by tools/write_classes.py on tiny random models of the real classes; read without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from tuning.presets.load import CONFIGS, table


@dataclass(frozen=True)
class Class:
    """One class of causal language models."""

    architecture: str = ""  # transformers' name; empty where no tiny model could be built
    attention: str = "sdpa"  # the fastest with which it computes right: torch_varlen, sdpa, eager
    packing: bool = False  # packed rows do not attend to each other
    refused: str = ""  # why it cannot be trained; empty where it can
    four_bit: str = ""  # why it cannot be trained in 4 bits, where it can in 16
    unmeasured: str = ""  # why nothing is known of it
    own_head: bool = False  # its logits are more than the last hidden states by its output layer
    reach: str = ""  # what LoRA reaches of its default config, and what is left
    share: float = 1.0  # of the weights of its layers, there

    @property
    def packs(self) -> tuple[bool, str]:
        """Whether packed rows stay apart, and why."""
        if not self.architecture:
            return False, "attention across packed rows is not verified for this family"
        apart = "stay apart" if self.packing else "do not stay apart"
        return self.packing, f"measured on this class: packed documents {apart}"


@cache
def _all() -> dict[str, Class]:
    return {name: Class(**record) for name, record in table(CONFIGS / "classes.yaml").items()}


def names() -> tuple[str, ...]:
    """Every `model_type` in the table."""
    return tuple(_all())


def of(config: Mapping[str, Any]) -> Class | None:
    """The class of the model that a parsed config.json describes; None if nothing is known."""
    return _all().get(str(config.get("model_type")))
