"""One row of any known shape -> a training example: conversation, pair, text or token ids.

Pure functions of plain values. `detect` returns the shape of a row and the reason; `to_example`
reads a row of that shape or raises BadRow with all faults, so that a person can repair them at
once. Shapes, the last two of them detected first:

    options             DatasetConfig's messages_column, context_column, response_column
    tokens              input_ids [labels, attention_mask]
    messages            messages | conversation(s) | ... = [{role, content}], a column tools
    sharegpt            the same columns, [{from, value}]
    prompt-completion   prompt and completion, both text or both lists of messages
    alpaca              instruction [+ input | context] and output | response [history, system]
    pair                question/answer, query/response, input/output, ...
    text                text
    preference          chosen and rejected answers, with or without a column of their prompt
    rated               prompt, completion and label (good or not)

Each row of a file is detected by itself and must be of the file's shape (`example_of`).
"""

from tuning.data.formats.detect import KNOWN_COLUMNS, detect, unused
from tuning.data.formats.example import example_of, to_example
from tuning.data.formats.masks import left_out
from tuning.data.formats.values import (
    UNREAD,
    BadRow,
    Columns,
    Conversation,
    Example,
    Fault,
    Objective,
    Pair,
    Plain,
    Preference,
    Rated,
    Row,
    Shape,
    Text,
    Tokens,
    documents,
    objective_of,
    quoted,
    texts_in,
    type_name,
)

__all__ = [
    "KNOWN_COLUMNS",
    "UNREAD",
    "BadRow",
    "Columns",
    "Conversation",
    "Example",
    "Fault",
    "Objective",
    "Pair",
    "Plain",
    "Preference",
    "Rated",
    "Row",
    "Shape",
    "Text",
    "Tokens",
    "detect",
    "documents",
    "example_of",
    "left_out",
    "objective_of",
    "quoted",
    "texts_in",
    "to_example",
    "type_name",
    "unused",
]
