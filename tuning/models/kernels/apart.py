"""Do packed documents stay apart? The question is asked of the loaded model itself, before a step.

Some attention code ignores where documents begin (Falcon, gpt-oss), without a word; a kernel may
not run on this card or in this type. What fails the question is not used.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from tuning.errors import SpecError, Stopped
from tuning.models.kernels import attention
from tuning.plan.backends import FLASH, VARLEN

logger = logging.getLogger(__name__)

LENGTH = 16  # tokens of a document
LEAK = 0.1  # of what a word of its own changes: words before a document must change nothing
DRIFT = 0.05  # relative: kernels of 16 bits differ by a few thousandths, a wrong mask by tenths


def settle(model: Any, name: str, *, precision: torch.dtype, packing: bool = True) -> str:
    """The attention that trains packed rows: the first of `ways` that keeps documents apart.

    Raises SpecError if none does, unless there is no `packing`: then sdpa gets padded rows.
    """
    base = model.get_base_model()
    library = plain(base)
    for way in dict.fromkeys((*ways(name), library)):
        if way == library and not packing:
            attend(base, way)
            return way
        found = fault(model, way, precision)
        if found is None:
            return way
        logger.warning("%s attention is not used: %s", way, found)
    kind = model.config.model_type
    what = f"is on, but with {way} attention in {kind} {found}"
    raise SpecError.at("MODEL-116", "packing", what, "set packing: false")


def ways(name: str) -> tuple[str, ...]:
    """`name`, and torch's own kernel after that of a package."""
    return (name, VARLEN) if name in FLASH else (name,)


def attend(base: Any, name: str) -> None:
    """Have the loaded model `base` compute with the attention `name`."""
    if base.config._attn_implementation != name:
        base.set_attn_implementation(name)


def plain(base: Any) -> str:
    """The library's own attention of a loaded model: sdpa, or eager where its class has no sdpa."""
    eager = base.config._attn_implementation == "eager" or not getattr(base, "_supports_sdpa", True)
    return "eager" if eager else "sdpa"


def fault(model: Any, name: str, precision: torch.dtype) -> str | None:
    """What is wrong with packed rows under the attention `name`; None if nothing is.

    The model has it afterwards, unless it cannot: a package's kernels fail in ways of their own.
    """
    first, other, second = (torch.arange(n * LENGTH, (n + 1) * LENGTH) for n in range(3))
    training = model.training
    model.eval()
    try:
        attend(model.get_base_model(), name)
        packed, again = (
            _logits(model, [start, second], name, precision)[LENGTH:] for start in (first, other)
        )
        alone = _logits(model, [second], name, precision)
        with torch.random.fork_rng():  # a class may have dropout that a kernel lacks
            _logits(model.train(), [second], name, precision)
        model.eval()
        touched = _logits(model, [torch.cat([first[:1], second[1:]])], name, precision)
    except Stopped:
        raise
    except Exception as error:
        if is_of_card(error):
            raise  # no other attention mends it
        return f"packed rows fail ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
    finally:
        model.train(training)
    moved = (touched - alone)[1:].norm()  # by a word of its own
    if not (packed - again)[1:].norm() <= LEAK * moved:
        return "packed documents see each other"
    if not (packed - alone).norm() <= DRIFT * alone.norm():
        return "packed documents differ from separate ones"
    return None


def is_of_card(error: Exception) -> bool:
    """Whether memory, the driver or a library of the card failed; then every later call does."""
    return isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)) or any(
        sign in str(error) for sign in ("CUDA error", "CUDA driver error", "_STATUS_")
    )


@torch.no_grad()
def _logits(
    model: Any, documents: list[torch.Tensor], name: str, precision: torch.dtype
) -> torch.Tensor:
    """Logits [tokens, vocabulary] of documents laid end to end, as training lays them."""
    inputs = attention.packed(documents, device=model.device, name=name)
    with torch.autocast(model.device.type, precision, enabled=precision != torch.float32):
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
    return logits[0].float()
