"""One row of any known shape -> what is trained: a conversation, a pair, a text or token ids.

Pure functions of plain values. `detect` names the shape of a row and says why; `to_example` reads a
row of that shape or raises BadRow with every fault it found, so that a person can repair them all
at once. Shapes, in the order in which they are looked for:

    options             DatasetConfig's messages_column, context_column, response_column
    tokens              input_ids [labels]
    messages            messages | conversation(s) | ... = [{role, content}], a column tools
    sharegpt            the same columns, [{from, value}]
    prompt-completion   prompt and completion, both text or both lists of messages
    alpaca              instruction [+ input | context] and output | response
    pair                question/answer, query/response, input/output, ...
    text                text
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Name = Literal["tokens", "messages", "sharegpt", "prompt-completion", "alpaca", "pair", "text"]
Row = Mapping[str, Any]

MESSAGE_COLUMNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
PAIR_COLUMNS = (
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("prompt", "response"),
    ("problem", "solution"),
    ("input", "output"),
    ("user", "assistant"),
    ("human", "assistant"),
)
SYSTEM_COLUMNS = ("system", "system_prompt")
LEADING_COLUMNS = frozenset(MESSAGE_COLUMNS) | {name for pair in PAIR_COLUMNS for name in pair}
LEADING_COLUMNS |= {"prompt", "completion", "instruction", "text", "input_ids"}
KNOWN_COLUMNS = LEADING_COLUMNS | set(SYSTEM_COLUMNS) | {"context", "tools", "labels"}
ROLES = ("system", "user", "assistant", "tool")
_ROLE = {role: role for role in ROLES} | {"developer": "system", "function": "tool"}
_SHAREGPT_ROLE = _ROLE | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "function_response": "tool",
    "observation": "tool",
}
_PLAIN = {"role", "content"}
_CARRIED = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Columns:
    """The column options of DatasetConfig; None means unset."""

    messages: str | None = None
    context: str | None = None
    response: str | None = None


@dataclass(frozen=True)
class Shape:
    """What the rows are: `columns` maps what a value is for to the column that holds it."""

    name: Name
    columns: tuple[tuple[str, str], ...]
    reason: str
    required: frozenset[str] = field(default_factory=frozenset)

    def column(self, use: str) -> str:
        """The column for `use`, one of messages, prompt, completion, context, text, input_ids."""
        return dict(self.columns)[use]

    def same_as(self, other: Shape) -> bool:
        """Whether rows of both shapes are read the same way."""
        return (self.name, self.columns) == (other.name, other.columns)


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a row or a set of columns; the reader adds the place."""

    code: str
    what: str
    change: str


class BadRow(Exception):
    """A row that cannot be trained on, with everything that is wrong with it."""

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

    `bare` is the prompt for a model without a chat template. `raw` pairs were written as running
    text by their author, so nothing may stand between the two.
    """

    prompt: str
    completion: str
    bare: str
    system: str = ""
    raw: bool = False

    def as_conversation(self) -> Conversation:
        """The pair as a user turn and an assistant turn."""
        turns = [
            {"role": "user", "content": self.prompt},
            {"role": "assistant", "content": self.completion},
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
    """Token ids made elsewhere; `trained` holds [start, end) index pairs, flat."""

    input_ids: list[int]
    trained: tuple[int, ...]


Example = Conversation | Pair | Text | Tokens


def quoted(value: Any) -> str:
    """`value` for a message to a person: at most 80 characters, control characters escaped."""
    text = value if isinstance(value, str) else json.dumps(value, default=type_name)
    if len(text) > 80:
        text = text[:77] + "..."
    plain = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)
    return f'"{plain}"' if isinstance(value, str) else plain


def type_name(value: Any) -> str:
    """What a person calls the type of `value`."""
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
    kind = type(value)
    return next((name for of, name in names if isinstance(value, of)), f"a {kind.__name__}")


def detect(row: Row, options: Columns) -> Shape:
    """The shape of `row`, from its columns and the look of their values.

    Raises BadRow when the columns fit no shape, or an option names a column that is not there.
    """
    if options.messages or options.context or options.response:
        return _by_options(row, options)
    if "input_ids" in row:
        return _shape("tokens", "it has a column input_ids", input_ids="input_ids")
    for column in MESSAGE_COLUMNS:
        if column in row and (column == "messages" or _is_chat(row[column])):
            return _chat_shape(row, column, f'it has a column "{column}"')
    if "prompt" in row and "completion" in row:
        return _pair_shape("prompt-completion", "prompt", "completion")
    if "instruction" in row:
        for answer in ("output", "response"):
            if answer in row:
                return _alpaca_shape(row, answer)
    for prompt, completion in PAIR_COLUMNS:
        if prompt in row and completion in row:
            return _pair_shape("pair", prompt, completion)
    if "text" in row:
        return _shape("text", 'it has a column "text" and none of the others', text="text")
    raise BadRow([_no_shape(row)])


def _shape(name: Name, reason: str, **columns: str) -> Shape:
    return Shape(name, tuple(columns.items()), reason, frozenset(columns.values()))


def _pair_shape(name: Name, prompt: str, completion: str) -> Shape:
    reason = f'it has the columns "{prompt}" and "{completion}"'
    return _shape(name, reason, prompt=prompt, completion=completion)


def _alpaca_shape(row: Row, answer: str) -> Shape:
    context = next((column for column in ("input", "context") if column in row), None)
    reason = f'it has the columns "instruction" and "{answer}"'
    columns = {"prompt": "instruction", "completion": answer}
    required = frozenset(columns.values())
    if context:
        columns["context"] = context
    return Shape("alpaca", tuple(columns.items()), reason, required)


def _is_chat(value: Any) -> bool:
    value = _from_json(value)
    return isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value)


def _chat_shape(row: Row, column: str, reason: str) -> Shape:
    turns = _from_json(row[column])
    first = turns[0] if isinstance(turns, list) and turns else None
    if isinstance(first, Mapping) and "from" in first and "role" not in first:
        return _shape("sharegpt", f"{reason} of from/value turns", messages=column)
    return _shape("messages", f"{reason} of role/content turns", messages=column)


def _by_options(row: Row, options: Columns) -> Shape:
    named = {
        "messages_column": options.messages,
        "context_column": options.context,
        "response_column": options.response,
    }
    missing = [_missing(row, f"{option} is", column) for option, column in named.items() if column]
    if faults := [fault for fault in missing if fault]:
        raise BadRow(faults)
    if options.messages:
        return _chat_shape(row, options.messages, f'messages_column is "{options.messages}"')
    if options.context and options.response:
        reason = f'context_column is "{options.context}", response_column "{options.response}"'
        return _shape("pair", reason, prompt=options.context, completion=options.response)
    if options.response:
        reason = f'response_column is "{options.response}" and context_column is unset'
        return _shape("text", reason, text=options.response)
    raise BadRow.of(
        "DATA-212",
        f'context_column is "{options.context}" but response_column is unset',
        "set DatasetConfig.response_column to the column that holds the answer",
    )


def _missing(row: Row, intro: str, column: str) -> Fault | None:
    if column in row:
        return None
    shown = ", ".join(quoted(name) for name in list(row)[:12])
    near = next((name for name in row if name.lower() == column.lower()), None)
    if near is not None:
        what = f'{intro} "{column}", but the column is written {quoted(near)}'
        return Fault("DATA-213", what, f"write {quoted(near)} exactly as in the data")
    what = f'{intro} "{column}", and there is no such column; there are {shown}'
    return Fault("DATA-212", what, "name a column that is there")


def _no_shape(row: Row) -> Fault:
    shown = ", ".join(quoted(name) for name in list(row)[:12]) or "none"
    for name in row:
        if name not in LEADING_COLUMNS and name.strip().lower() in LEADING_COLUMNS:
            return Fault(
                "DATA-213",
                f'column {quoted(name)} is not written "{name.strip().lower()}"',
                f'rename it to "{name.strip().lower()}", or name it in DatasetConfig '
                "(messages_column, or context_column and response_column)",
            )
    return Fault(
        "DATA-212",
        f"the columns ({shown}) fit no known shape",
        "use messages, prompt/completion, instruction/output, question/answer or text, or name "
        "yours in DatasetConfig: messages_column, or context_column and response_column",
    )


def to_example(row: Row, shape: Shape) -> Example:
    """What is trained of `row`, which is of `shape`. Raises BadRow with all faults of the row."""
    for column in shape.required:
        if column not in row:
            raise BadRow([_lost_column(row, shape, column)])
    if shape.name in ("messages", "sharegpt"):
        column = shape.column("messages")
        return _conversation(row, column, sharegpt=shape.name == "sharegpt")
    if shape.name == "text":
        column = shape.column("text")
        return Text(_filled(row, column, "DATA-227"))
    if shape.name == "tokens":
        return _tokens(row)
    if shape.name == "prompt-completion" and not isinstance(row["prompt"], str):
        return _prompt_messages(row)
    return _pair(row, shape)


def _lost_column(row: Row, shape: Shape, column: str) -> Fault:
    try:
        other = detect(row, Columns())
    except BadRow:
        missing = _missing(row, "this row has no", column)
        assert missing is not None
        return missing
    return Fault(
        "DATA-214",
        f"the row is of shape {other.name} ({other.reason}), but the data began as {shape.name}",
        "train on one shape at a time: give every row the same columns",
    )


def _conversation(row: Row, column: str, *, sharegpt: bool) -> Conversation:
    turns = _from_json(row[column])
    if not isinstance(turns, list):
        raise BadRow.of(
            "DATA-216",
            f"{column} is {type_name(turns)}, not a list of messages",
            'write [{"role": ..., "content": ...}, ...]',
        )
    messages, faults = _messages(turns, column, sharegpt=sharegpt)
    if not faults:
        faults = _order_faults(messages, column)
    tools, more = _tools(row)
    if faults or more:
        raise BadRow([*faults, *more])
    system = next((row[name] for name in SYSTEM_COLUMNS if row.get(name)), None)
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(messages, _weighted(messages), tools)


def _messages(
    turns: list[Any], column: str, *, sharegpt: bool
) -> tuple[list[dict[str, Any]], list[Fault]]:
    messages: list[dict[str, Any]] = []
    faults: list[Fault] = []
    for index, turn in enumerate(turns):
        where = f"{column}[{index}]"
        if not isinstance(turn, Mapping):
            what = f"{where} is {type_name(turn)}, not a message"
            faults.append(Fault("DATA-216", what, 'write {"role": ..., "content": ...}'))
            continue
        message, wrong = _message(turn, where, sharegpt=sharegpt)
        messages.append(message)
        faults += wrong
    return messages, faults


def _message(
    turn: Mapping[str, Any], where: str, *, sharegpt: bool
) -> tuple[dict[str, Any], list[Fault]]:
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    if not sharegpt and turn.get("role") is None and "from" in turn:
        what = f"{where} is a from/value turn, but the data began with role/content turns"
        return {}, [Fault("DATA-214", what, "write all conversations in one of the two ways")]
    faults: list[Fault] = []
    roles = _SHAREGPT_ROLE if sharegpt else _ROLE
    said = turn.get(role_key)
    role = roles.get(said, "") if isinstance(said, str) else ""
    if said is None:
        what = f"{where} has no {role_key}"
        faults.append(Fault("DATA-218", what, f"add one of {', '.join(ROLES)}"))
    elif not role:
        allowed = ", ".join(("human", "gpt", *ROLES) if sharegpt else ROLES)
        what = f"{where}.{role_key} is {quoted(said)}; allowed: {allowed}"
        faults.append(Fault("DATA-207", what, "change the role"))
    calls = _from_json(turn.get("tool_calls")) or None
    content = turn.get(content_key)
    if content is None and calls and role == "assistant":
        text: str = ""
    else:
        text, wrong = _content(turn, content_key, where)
        faults += wrong
        if not wrong and role == "assistant" and not text.strip() and not calls:
            what = f"{where}.{content_key} of the assistant is empty"
            faults.append(Fault("DATA-225", what, "write the answer, or remove the conversation"))
    message: dict[str, Any] = {"role": role, "content": text}
    if len(turn) > 2 or not _PLAIN >= turn.keys():
        extra = {key: turn[key] for key in _CARRIED if turn.get(key) is not None}
        if calls:
            extra["tool_calls"] = _calls(calls)
        else:
            extra.pop("tool_calls", None)
        message |= extra
        if turn.get("weight") is not None:
            message["weight"] = turn["weight"]
    return message, faults


def _content(turn: Mapping[str, Any], key: str, where: str) -> tuple[str, list[Fault]]:
    if key not in turn:
        return "", [Fault("DATA-219", f"{where} has no {key}", f"add its {key}")]
    content = turn[key]
    if isinstance(content, list):
        return _parts(content, f"{where}.{key}")
    if content is None:
        return "", [Fault("DATA-220", f"{where}.{key} is null", "write a text")]
    if not isinstance(content, str):
        what = f"{where}.{key} is {type_name(content)}: {quoted(content)}"
        return "", [Fault("DATA-221", what, "write a text, in quotes")]
    return content, _text_faults(content, f"{where}.{key}")


def _parts(parts: list[Any], where: str) -> tuple[str, list[Fault]]:
    texts: list[str] = []
    for index, part in enumerate(parts):
        text = part.get("text") if isinstance(part, Mapping) else part
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind != "text" or not isinstance(text, str):
            what = f"{where}[{index}] is a part of type {quoted(kind)}, and only text is trained"
            change = "leave out images, audio and files, or remove the row"
            return "", [Fault("DATA-222", what, change)]
        texts.append(text)
    joined = "\n".join(texts)
    return joined, _text_faults(joined, where)


def _calls(calls: Any) -> list[Any]:
    """Tool calls with their arguments as objects, which is what chat templates print."""
    fixed: list[Any] = []
    for call in calls if isinstance(calls, list) else [calls]:
        if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
            function = dict(call["function"])
            if isinstance(function.get("arguments"), str):
                function["arguments"] = _from_json(function["arguments"])
            call = {k: v for k, v in call.items() if v is not None} | {"function": function}
        fixed.append(call)
    return fixed


def _order_faults(messages: list[dict[str, Any]], column: str) -> list[Fault]:
    if not messages:
        return [Fault("DATA-217", f"{column} is empty", "write the conversation or remove the row")]
    roles = [message["role"] for message in messages]
    faults: list[Fault] = []
    if roles.count("system") > 1:
        second = roles.index("system", roles.index("system") + 1)
        what = f"{column}[{second}] is a second system message"
        faults.append(Fault("DATA-226", what, "join the two into one at the beginning"))
    if "assistant" not in roles:
        what = f"{column} has no assistant turn, so there is nothing to learn"
        faults.append(Fault("DATA-223", what, "add the answer, or remove the row"))
    elif roles[-1] != "assistant":
        what = f"{column}[{len(roles) - 1}], the last message, is of role {roles[-1]}"
        change = "end with an assistant turn: add the answer, or remove the last message"
        faults.append(Fault("DATA-224", what, change))
    return faults


def _weighted(messages: list[dict[str, Any]]) -> tuple[int, ...]:
    """The assistant turns whose `weight`, if any, is not 0; the key is taken out."""
    return tuple(
        index
        for index, message in enumerate(messages)
        if message.pop("weight", 1) not in (0, "0") and message["role"] == "assistant"
    )


def _tools(row: Row) -> tuple[list[Any] | None, list[Fault]]:
    tools = _from_json(row.get("tools"))
    if not tools:
        return None, []
    if isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools):
        return [dict(tool) for tool in tools], []
    what = f"tools is {type_name(tools)}, not a list of JSON schemas"
    return None, [Fault("DATA-216", what, 'write [{"type": "function", "function": {...}}]')]


def _prompt_messages(row: Row) -> Conversation:
    parts: list[dict[str, Any]] = []
    faults: list[Fault] = []
    before = 0
    for column in ("prompt", "completion"):
        turns = _from_json(row[column])
        if not isinstance(turns, list):
            what = f"{column} is {type_name(turns)}; prompt and completion are of different kinds"
            raise BadRow.of("DATA-221", what, "write both as texts, or both as lists of messages")
        messages, wrong = _messages(turns, column, sharegpt=False)
        parts += messages
        faults += wrong
        if column == "prompt":
            before = len(messages)
    if not faults:
        faults = _order_faults(parts, "prompt + completion")
    tools, more = _tools(row)
    if faults or more:
        raise BadRow([*faults, *more])
    return Conversation(parts, tuple(i for i in _weighted(parts) if i >= before), tools)


def _pair(row: Row, shape: Shape) -> Pair:
    uses = dict(shape.columns)
    faults: list[Fault] = []
    values: dict[str, str] = {}
    for use, code in (("prompt", "DATA-221"), ("completion", "DATA-227")):
        try:
            values[use] = _filled(row, uses[use], code, empty=use == "prompt")
        except BadRow as bad:
            faults += bad.faults
    extra = {}
    for use, column in (
        ("context", uses.get("context")),
        ("system", next((c for c in SYSTEM_COLUMNS if row.get(c)), None)),
    ):
        value = row.get(column) if column else None
        if isinstance(value, str) and value.strip():
            faults += _text_faults(value, str(column))
            extra[use] = value
    if faults:
        raise BadRow(faults)
    prompt, context, system = values["prompt"], extra.get("context"), extra.get("system", "")
    if context:
        prompt = f"{prompt}\n\n{context}"
    if shape.name == "prompt-completion":
        return Pair(prompt, values["completion"], prompt, system, raw=True)
    return Pair(prompt, values["completion"], _bare(prompt, system), system)


def _bare(prompt: str, system: str) -> str:
    """The prompt as base models without a chat template have seen it most."""
    head = f"{system}\n\n" if system else ""
    return f"{head}### Instruction:\n{prompt}\n\n### Response:\n"


def _filled(row: Row, column: str, code: str, *, empty: bool = False) -> str:
    value = row[column]
    if value is None:
        raise BadRow.of("DATA-220", f"{column} is null", "write a text, or remove the row")
    if isinstance(value, list):
        value, faults = _parts(value, column)
        if faults:
            raise BadRow(faults)
    if not isinstance(value, str):
        what = f"{column} is {type_name(value)}: {quoted(value)}"
        raise BadRow.of("DATA-221", what, "write a text, in quotes")
    if not empty and not value.strip():
        raise BadRow.of(code, f"{column} is empty", "write it, or remove the row")
    if faults := _text_faults(value, column):
        raise BadRow(faults)
    return value


def _text_faults(text: str, where: str) -> list[Fault]:
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


def _tokens(row: Row) -> Tokens:
    ids, labels = row["input_ids"], row.get("labels")
    for name, value in (("input_ids", ids), ("labels", labels)):
        if value is None and name == "labels":
            continue
        if not isinstance(value, list) or any(type(token) is not int for token in value):
            what = f"{name} is {type_name(value)}, not a list of whole numbers"
            raise BadRow.of("DATA-247", what, "write token ids, as the base model's tokenizer does")
    if not ids:
        raise BadRow.of("DATA-247", "input_ids is empty", "remove the row")
    if labels is None:
        return Tokens(ids, (0, len(ids)))
    if len(labels) != len(ids):
        what = f"labels has {len(labels)} entries and input_ids {len(ids)}"
        raise BadRow.of("DATA-247", what, "give each token one label: itself, or -100 for no loss")
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


def _from_json(value: Any) -> Any:
    """`value`, or what it says if it is JSON written into a text, as CSV files have it."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value
