"""A row of a known shape -> a training example."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tuning.data.formats.cells import holds_chat
from tuning.data.formats.detect import detect, missing_column
from tuning.data.formats.masks import TOKEN_MASKS
from tuning.data.formats.messages import conversation, prompt_messages, required_text
from tuning.data.formats.pairs import pair
from tuning.data.formats.preferences import is_good, preference
from tuning.data.formats.values import (
    BadRow,
    Columns,
    Conversation,
    Example,
    Fault,
    Preference,
    Rated,
    Row,
    Shape,
    Text,
    Tokens,
    type_name,
)


def example_of(row: Row, shape: Shape, options: Columns) -> Example:
    """The training example in `row` of a file of `shape`. Raises BadRow with all its faults.

    A row that by itself would be read otherwise is refused, so that no order of the rows decides
    what is trained of one: it may bring a rating, another prompt, or another kind of answer.
    """
    example = to_example(row, shape)
    own = detect(row, options)
    if (own.name, own.columns, own.answer) != (shape.name, shape.columns, shape.answer):
        raise BadRow([_other_shape(own, shape)])
    return example


def to_example(row: Row, shape: Shape) -> Example:
    """The training example in `row` of `shape`. Raises BadRow with all faults of the row."""
    for column in shape.required:
        if column not in row:
            raise BadRow([_column_fault(row, shape, column)])
    if shape.name in ("messages", "sharegpt"):
        column = shape.column("messages")
        return conversation(row, column, sharegpt=shape.name == "sharegpt")
    if shape.name == "text":
        column = shape.column("text")
        return Text(required_text(row, column, "DATA-227"))
    if shape.name == "tokens":
        return _tokens(row)
    if shape.name == "preference":
        return preference(row, shape)
    if shape.name == "rated":
        return _rated(row, shape)
    if shape.name == "prompt-completion" and (
        not isinstance(row["prompt"], str)
        or any(holds_chat(row[column], column) for column in ("prompt", "completion"))
    ):
        return prompt_messages(row)
    return pair(row, shape)


def _rated(row: Row, shape: Shape) -> Rated:
    """A rated answer: of a conversation it is the last one."""
    assert shape.answer is not None
    answer = to_example(row, replace(shape, name=shape.answer))
    good = is_good(row, shape)
    if isinstance(answer, Conversation):
        last = len(answer.messages) - 1  # if a mask key excludes it, no other one is rated
        answer = replace(answer, trained=(last,) if last in answer.trained else ())
    assert not isinstance(answer, (Preference, Rated))
    return Rated(answer, good)


def _column_fault(row: Row, shape: Shape, column: str) -> Fault:
    """A missing column, or a row of another shape."""
    try:
        other = detect(row, Columns())
    except BadRow:
        other = shape
    if other.name == shape.name:
        missing = missing_column(row, "this row has no", column)
        assert missing is not None
        return missing
    return _other_shape(other, shape)


def _other_shape(other: Shape, shape: Shape) -> Fault:
    what = f"the row is of shape {other.name} ({other.reason}), but the data began as {shape.name}"
    if other.name == shape.name:
        what += f" ({shape.reason})"
    return Fault(
        "DATA-214",
        what,
        "train on one shape at a time: fill the same columns in every row, or name them in "
        "DatasetConfig (messages_column, context_column, response_column, objective)",
    )


def _tokens(row: Row) -> Tokens:
    ids, labels = row["input_ids"], row.get("labels")
    masks = {name: row[name] for name in TOKEN_MASKS if row.get(name) is not None}
    for name, value in (("input_ids", ids), ("labels", labels)):
        if value is None and name == "labels":
            continue
        if not isinstance(value, list) or any(type(token) is not int for token in value):
            what = f"{name} is {type_name(value)}, not a list of whole numbers"
            raise BadRow.of("DATA-247", what, "write token ids, as the base model's tokenizer does")
    if labels is not None and len(labels) != len(ids):
        what = f"labels has {len(labels)} entries and input_ids {len(ids)}"
        raise BadRow.of("DATA-247", what, "give each token one label: itself, or -100 for no loss")
    if masks:
        labels = _masked(ids, ids if labels is None else labels, masks)
    if (mask := row.get("attention_mask")) is not None:
        first, last = _unmasked(mask, len(ids))
        ids, labels = ids[first:last], labels[first:last] if labels is not None else None
    if not ids:
        raise BadRow.of("DATA-247", "input_ids is empty", "remove the row")
    if (lowest := min(ids)) < 0:
        change = "write token ids, from 0; what is not trained keeps its id and has the label -100"
        raise BadRow.of("DATA-247", f"input_ids holds {lowest}", change)
    if labels is None:
        return Tokens(ids, (0, len(ids)))
    flat: list[int] = []
    inside = False
    for index, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (token, -100):
            what = f"labels[{index}] is {label}, neither -100 nor the token {token}"
            raise BadRow.of("DATA-247", what, "give each token one label: itself, or -100")
        if (label != -100) != inside:
            flat.append(index)
            inside = not inside
    return Tokens(ids, tuple([*flat, len(ids)] if inside else flat))


def _masked(ids: list[int], labels: list[int], masks: dict[str, Any]) -> list[int]:
    """`labels` without those that one of `masks` hides, as trl has them. Raises BadRow."""
    for name, mask in masks.items():
        _check_mask(mask, name, len(ids))
        labels = [label if kept else -100 for label, kept in zip(labels, mask, strict=True)]
    return labels


def _check_mask(mask: Any, name: str, size: int) -> None:
    is_mask = isinstance(mask, list) and all(type(each) in (int, bool) for each in mask)
    if not is_mask or len(mask) != size or not {*mask} <= {0, 1}:
        what = f"{name} is not a list of {size} zeros and ones, as many as input_ids"
        raise BadRow.of("DATA-247", what, "give each token one, or remove the column")


def _unmasked(mask: Any, size: int) -> tuple[int, int]:
    """Where the tokens without padding begin and end. Raises BadRow."""
    _check_mask(mask, "attention_mask", size)
    if 1 not in mask:
        return 0, 0
    first, last = mask.index(1), size - mask[::-1].index(1)
    if 0 in mask[first:last]:
        what = f"attention_mask hides tokens in the middle: entry {first + mask[first:].index(0)}"
        raise BadRow.of("DATA-247", what, "mask padding alone, or remove the column")
    return first, last
