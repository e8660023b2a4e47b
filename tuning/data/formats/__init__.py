"""One row of any known shape -> what is trained: a conversation, a pair, a text or token ids.

Pure functions of plain values. `detect` names the shape of a row and says why; `to_example` reads a
row of that shape or raises BadRow with every fault it found, so that a person can repair them all
at once. Shapes, in the order in which they are looked for:

    options             DatasetConfig's messages_column, context_column, response_column
    tokens              input_ids [labels, attention_mask]
    messages            messages | conversation(s) | ... = [{role, content}], a column tools
    sharegpt            the same columns, [{from, value}]
    prompt-completion   prompt and completion, both text or both lists of messages
    alpaca              instruction [+ input | context] and output | response [history, system]
    pair                question/answer, query/response, input/output, ...
    text                text
"""

from tuning.data.formats.detect import KNOWN_COLUMNS, detect, unused
from tuning.data.formats.example import to_example
from tuning.data.formats.values import (
    UNREAD,
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
    "Pair",
    "Row",
    "Shape",
    "Text",
    "Tokens",
    "detect",
    "quoted",
    "texts_in",
    "to_example",
    "type_name",
    "unused",
]
