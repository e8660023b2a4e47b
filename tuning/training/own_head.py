"""Whether trl's head scores a model as the model itself does, and the loss of its own logits.

trl multiplies the last hidden states by the output layer's weight, and scales or caps by names of
the config that it knows (trl 1.16, `add_fused_lm_head`). A model may do more in between: a dense
layer, GELU and a norm as in BERT, a cap of another name. Its loss would be that of another model.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.nn import functional

from tuning import presets
from tuning.errors import Stopped
from tuning.models.kernels import apart, whole
from tuning.training.batches import IGNORED

logger = logging.getLogger(__name__)


def needed(tuned: Any, precision: torch.dtype) -> bool:
    """Whether the model's own logits are to be scored, and not what trl's head makes of it.

    By what was measured of its class in float32, or else by a comparison in `precision`.
    """
    kind = presets.class_of(tuned.get_base_model().config.to_dict())
    return bool(kind and kind.own_head) or differs(tuned, precision, whole.TOLERANCE[precision])


def differs(tuned: Any, precision: torch.dtype, tolerance: float) -> bool:
    """Whether trl's head, which `tuned` has, gives other log-probabilities than its own logits.

    On random tokens; the difference is relative to how far these spread.
    """
    ids, training = whole.documents(tuned), tuned.training
    tuned.eval()
    try:
        with (
            torch.no_grad(),
            torch.autocast(tuned.device.type, precision, enabled=precision != torch.float32),
        ):
            logits = tuned(input_ids=ids, use_cache=False).logits[:, :-1].float()
            own = -functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            theirs = tuned(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.float()
    except Stopped:
        raise
    except Exception as error:
        if apart.is_of_card(error):
            raise
        logger.warning("trl's head does not fit this model: %s: %s", type(error).__name__, error)
        return True
    finally:
        tuned.train(training)
    spread = (own - own.mean()).norm().clamp(min=1e-30)
    found = float((own - theirs).norm() / spread)
    if found <= tolerance:
        return False
    logger.warning("trl's head gives other log-probabilities, by %.2f %%", 100 * found)
    return True


def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed loss of `labels` [rows, length] by `logits` [rows, length, vocabulary], in float32."""
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        labels[:, 1:].flatten(),
        reduction="sum",
        ignore_index=IGNORED,
    )
