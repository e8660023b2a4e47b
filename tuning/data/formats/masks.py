"""Mask keys of messages and content parts: whether a turn is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuning.data.formats.values import Fault, quoted, type_name

MASK_KEYS = ("weight", "train", "training", "train_on_turn")  # OpenAI, Axolotl
UNTRAINED = "untrained"  # marks an assistant message until its conversation is complete


def is_untrained(turn: Mapping[str, Any], role: str, where: str, parts: Any) -> tuple[bool, Any]:
    """Whether mask keys of the turn, or of its content parts, exclude it; and their faults.

    0, 1, true and false are masks; null is none. The parts of a turn are trained together.
    """
    faults: list[Fault] = []
    own = _mask(turn, where, faults)
    inner: list[bool | None] = []
    if isinstance(parts, list):
        inner = [
            _mask(part, f"{where}.content[{index}]", faults) if isinstance(part, Mapping) else None
            for index, part in enumerate(parts)
        ]
    if role != "assistant":
        if True in (own, *inner):
            what = f"{where} is to be trained, but its role is {role or 'unknown'}"
            change = "remove the mask key: assistant turns are trained (train_on: all trains all)"
            faults.append(Fault("DATA-255", what, change))
        return False, faults
    if False in inner and own is not False and any(each is not False for each in inner):
        what = f"{where} has parts that are trained and parts that are not"
        change = "mask the whole turn, or write the parts as turns of their own"
        faults.append(Fault("DATA-255", what, change))
    return own is False or False in inner, faults


def _mask(holder: Mapping[str, Any], where: str, faults: list[Fault]) -> bool | None:
    """The mask in `holder`; None without one. Appends to `faults`."""
    masks: dict[str, bool] = {}
    for key in MASK_KEYS:
        if (value := holder.get(key)) is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            what = f"{where}.{key} is {type_name(value)}: {quoted(value)}"
            faults.append(Fault("DATA-221", what, "write 1 or true to train, 0 or false to not"))
        else:
            masks[key] = bool(value)
    if len({*masks.values()}) > 1:
        what = f"{where} has mask keys that disagree: {', '.join(masks)}"
        faults.append(Fault("DATA-255", what, "keep one of them"))
    return next(iter(masks.values()), None)
