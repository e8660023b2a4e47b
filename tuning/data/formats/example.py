"""A row of a known shape -> a training example."""

from __future__ import annotations

from typing import Any

from tuning.data.formats.detect import (
    CONTEXT_COLUMNS,
    HISTORY_COLUMN,
    SYSTEM_COLUMNS,
    detect,
    first_nonempty,
    missing_column,
)
from tuning.data.formats.messages import conversation, prompt_messages, required_text
from tuning.data.formats.values import (
    BadRow,
    Columns,
    Conversation,
    Example,
    Fault,
    Pair,
    Row,
    Shape,
    Text,
    Tokens,
    from_json,
    text_faults,
    type_name,
)


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
    if shape.name == "prompt-completion" and not isinstance(row["prompt"], str):
        return prompt_messages(row)
    return _pair(row, shape)


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
    return Fault(
        "DATA-214",
        f"the row is of shape {other.name} ({other.reason}), but the data began as {shape.name}",
        "train on one shape at a time: give every row the same columns",
    )


def _pair(row: Row, shape: Shape) -> Pair | Conversation:
    uses = dict(shape.columns)
    faults: list[Fault] = []
    values: dict[str, str] = {}
    for use, code in (("prompt", "DATA-221"), ("completion", "DATA-227")):
        try:
            values[use] = required_text(row, uses[use], code, empty=use == "prompt")
        except BadRow as bad:
            faults += bad.faults
    extra = {}
    for use, column in (
        ("context", first_nonempty(row, CONTEXT_COLUMNS) if shape.name == "alpaca" else None),
        ("system", first_nonempty(row, SYSTEM_COLUMNS)),
    ):
        if column is None:
            continue
        try:
            value = required_text(row, column, "", empty=True)
        except BadRow as bad:
            faults += bad.faults
            continue
        if value.strip():
            extra[use] = value
    earlier = from_json(row.get(HISTORY_COLUMN)) if shape.name == "alpaca" else None
    if earlier:
        faults += _history_faults(earlier)
    if faults:
        raise BadRow(faults)
    prompt, context, system = values["prompt"], extra.get("context"), extra.get("system", "")
    if context:
        prompt = f"{prompt}\n\n{context}"
    if earlier:
        return _continued(earlier, Pair(prompt, values["completion"], prompt, system))
    if shape.name == "prompt-completion":
        return Pair(prompt, values["completion"], prompt, system, raw=True)
    return Pair(prompt, values["completion"], _bare(prompt, system), system)


def _history_faults(earlier: Any) -> list[Fault]:
    """Faults in the earlier turns of an Alpaca row: [[question, answer], ...]."""
    change = 'write [["question", "answer"], ...], or remove the column'
    if not isinstance(earlier, list):
        what = f"{HISTORY_COLUMN} is {type_name(earlier)}, not a list of pairs"
        return [Fault("DATA-216", what, change)]
    faults: list[Fault] = []
    for index, turn in enumerate(earlier):
        where = f"{HISTORY_COLUMN}[{index}]"
        if not isinstance(turn, list) or [type(text) for text in turn] != [str, str]:
            faults.append(Fault("DATA-216", f"{where} is not [question, answer]", change))
        elif not turn[1].strip():
            faults.append(Fault("DATA-225", f"the answer of {where} is empty", "write it"))
        else:
            faults += [fault for text in turn for fault in text_faults(text, where)]
    return faults


def _continued(earlier: list[list[str]], pair: Pair) -> Conversation:
    """The earlier turns and `pair` as one conversation, of which every answer is trained."""
    last = pair.as_conversation().messages
    turns = last[:-2]
    for question, answer in earlier:
        turns += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    turns += last[-2:]
    trained = tuple(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    return Conversation(turns, trained)


def _bare(prompt: str, system: str) -> str:
    """The prompt in the Alpaca format, the most common one without a chat template."""
    head = f"{system}\n\n" if system else ""
    return f"{head}### Instruction:\n{prompt}\n\n### Response:\n"


def _tokens(row: Row) -> Tokens:
    ids, labels = row["input_ids"], row.get("labels")
    for name, value in (("input_ids", ids), ("labels", labels)):
        if value is None and name == "labels":
            continue
        if not isinstance(value, list) or any(type(token) is not int for token in value):
            what = f"{name} is {type_name(value)}, not a list of whole numbers"
            raise BadRow.of("DATA-247", what, "write token ids, as the base model's tokenizer does")
    if labels is not None and len(labels) != len(ids):
        what = f"labels has {len(labels)} entries and input_ids {len(ids)}"
        raise BadRow.of("DATA-247", what, "give each token one label: itself, or -100 for no loss")
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


def _unmasked(mask: Any, size: int) -> tuple[int, int]:
    """Where the tokens without padding begin and end. Raises BadRow."""
    is_mask = isinstance(mask, list) and all(type(each) in (int, bool) for each in mask)
    if not is_mask or len(mask) != size or not {*mask} <= {0, 1}:
        what = f"attention_mask is not a list of {size} zeros and ones, as many as input_ids"
        raise BadRow.of("DATA-247", what, "give each token one, or remove the column")
    if 1 not in mask:
        return 0, 0
    first, last = mask.index(1), size - mask[::-1].index(1)
    if 0 in mask[first:last]:
        what = f"attention_mask hides tokens in the middle: entry {first + mask[first:].index(0)}"
        raise BadRow.of("DATA-247", what, "mask padding alone, or remove the column")
    return first, last
