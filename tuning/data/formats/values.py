"""Shapes of rows, faults in rows, and training examples."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Name = Literal[
    "tokens", "messages", "sharegpt", "prompt-completion", "alpaca", "pair", "text",
    "preference", "rated",
]  # fmt: skip
Objective = Literal["sft", "dpo", "kto"]
Row = Mapping[str, Any]


class _Unread:
    """Stands for the value of a column that is not read because nothing uses it."""

    def __repr__(self) -> str:
        return "a value that was not read"


UNREAD = _Unread()
EMPTY_VALUES: tuple[Any, ...] = (None, "", [], {})


@dataclass(frozen=True)
class Columns:
    """The options of DatasetConfig about columns and what they are for; None means unset."""

    messages: str | None = None
    context: str | None = None
    response: str | None = None
    objective: Objective | None = None  # None: the shape of the rows decides

    @property
    def named(self) -> frozenset[str]:
        """The columns that are set."""
        return frozenset(filter(None, (self.messages, self.context, self.response)))


@dataclass(frozen=True)
class Shape:
    """The shape of rows: `columns` maps the use of a value to the column that holds it."""

    name: Name
    columns: tuple[tuple[str, str], ...]
    reason: str
    required: frozenset[str] = field(default_factory=frozenset)
    answer: Name | None = None  # shape of an answer with its prompt in a preference or rated row

    def column(self, use: str) -> str:
        """The column for `use`: messages, prompt, completion, text, chosen, label, ..."""
        return dict(self.columns)[use]


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a row or a set of columns; the reader adds the place."""

    code: str
    what: str
    change: str


class BadRow(Exception):
    """A row that cannot be trained on, with all its faults."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(fault.what for fault in self.faults))

    @classmethod
    def of(cls, code: str, what: str, change: str) -> BadRow:
        """A row with a single fault."""
        return cls([Fault(code, what, change)])


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template, and the indices of the assistant turns that are trained."""

    messages: list[dict[str, Any]]
    trained: tuple[int, ...]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Pair:
    """A prompt and the completion that is trained.

    `bare` is the prompt for a model without a chat template. A `raw` pair is running text: nothing
    may be inserted between prompt and completion.
    """

    prompt: str
    completion: str
    bare: str
    system: str = ""
    raw: bool = False

    def as_conversation(self) -> Conversation:
        """The pair as a user turn and an assistant turn.

        White space that joined running text is removed: the chat template separates the turns.
        """
        prompt, completion = self.prompt, self.completion
        if self.raw:
            prompt, completion = prompt.strip(), completion.strip()
        turns = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": completion},
        ]
        if self.system:
            turns.insert(0, {"role": "system", "content": self.system})
        return Conversation(turns, (len(turns) - 1,))


@dataclass(frozen=True)
class Text:
    """Running text; all of it is trained."""

    text: str


@dataclass(frozen=True)
class Tokens:
    """Token ids from the data; `trained` holds [start, end) index pairs, flat."""

    input_ids: list[int]
    trained: tuple[int, ...]


Plain = Conversation | Pair | Text | Tokens


@dataclass(frozen=True)
class Preference:
    """Two answers to the same prompt, of which the chosen one is better."""

    chosen: Conversation | Pair
    rejected: Conversation | Pair


@dataclass(frozen=True)
class Rated:
    """An answer, and whether it is a good one."""

    answer: Plain
    good: bool


Example = Plain | Preference | Rated


def objective_of(shape: Shape, asked: Objective | None) -> Objective:
    """What rows of `shape` are trained for, unless DatasetConfig has `asked` otherwise."""
    usual: dict[str, Objective] = {"preference": "dpo", "rated": "kto"}
    return asked or usual.get(shape.name, "sft")


def documents(example: Example, objective: Objective) -> list[tuple[list[Plain], bool]]:
    """The training rows that `example` makes: the documents of each, and whether it is good.

    For dpo the chosen and the rejected answer; for sft good answers alone.
    """
    if isinstance(example, Rated):
        return [([example.answer], example.good)] if example.good or objective == "kto" else []
    if not isinstance(example, Preference):
        return [([example], True)]
    if objective == "dpo":
        return [([example.chosen, example.rejected], True)]
    rows: list[tuple[list[Plain], bool]] = [([example.chosen], True), ([example.rejected], False)]
    return rows if objective == "kto" else rows[:1]


def quoted(value: Any) -> str:
    """`value` for an error message: at most 80 characters, control characters escaped."""
    text = value if isinstance(value, str) else json.dumps(value, default=type_name)
    if len(text) > 80:
        text = text[:77] + "..."
    printable = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)
    return f'"{printable}"' if isinstance(value, str) else printable


def type_name(value: Any) -> str:
    """The type of `value` for an error message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names: tuple[tuple[Any, str], ...] = (
        (str, "a text"),
        ((int, float), "a number"),
        (Mapping, "an object"),
        ((list, tuple), "a list"),
        (bytes, "binary data"),
    )
    other = f"a {type(value).__name__}"
    return next((name for types, name in names if isinstance(value, types)), other)


def text_faults(text: str, where: str) -> list[Fault]:
    """Faults in the characters of `text`, whose place is `where`."""
    if "\0" in text:
        what = f"{where} holds a NUL character at {text.index(chr(0))}"
        return [Fault("DATA-234", what, "remove it")]
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            what = f"{where} holds half of a character (a lone surrogate) at {error.start}"
            return [Fault("DATA-234", what, "write the whole character, or remove it")]
    return []


def texts_in(value: Any) -> Iterator[str]:
    """Every text in `value`, at any depth, keys included."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple)):
            stack += item
