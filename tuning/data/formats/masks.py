"""Mask keys of rows, messages and content parts: whether they are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuning.data.formats.cells import truth
from tuning.data.formats.values import Fault, Row, Shape, quoted, type_name

ROW_MASKS = ("weight", "train", "training", "train_on_turn")  # OpenAI, Axolotl
MASK_KEYS = (*ROW_MASKS, "loss", "loss_weight")  # ms-swift; of a row they may be measurements
UNCLEAR_KEYS = ("mask", "masked", "loss_mask")  # 1 is trained for some, hidden for others
TOKEN_MASKS = ("completion_mask", "assistant_masks", "loss_mask")  # trl: 1 is trained
UNTRAINED = "untrained"  # marks an assistant message until its conversation is complete


def row_mask(row: Row, shape: Shape) -> dict[str, bool]:
    """The mask keys of a whole row, each with whether the row is trained."""
    used = {column for _, column in shape.columns}
    read = {key: truth(row[key]) for key in ROW_MASKS if key in row and key not in used}
    return {key: value for key, value in read.items() if value is not None}


def left_out(row: Row, shape: Shape) -> str | None:
    """Why a whole row is not trained: the mask key that says so; None if it is."""
    hidden = (key for key, trained in row_mask(row, shape).items() if not trained)
    return next((f"{key} says that they are not trained" for key in hidden), None)


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
    for key in UNCLEAR_KEYS:
        if holder.get(key) is not None:
            what = f"{where}.{key} does not say whether what it marks is trained"
            faults.append(Fault("DATA-255", what, "write weight: 0 for a turn that is not trained"))
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
