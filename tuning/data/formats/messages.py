"""Lists of messages -> conversations, with all their faults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuning.data.formats.cells import (
    PRINTED,
    ROLE,
    ROLES,
    SHAREGPT_ROLE,
    from_json,
    text_or_turns,
    turns_of,
)
from tuning.data.formats.detect import CARRIED, SYSTEM_COLUMNS, first_nonempty
from tuning.data.formats.masks import UNTRAINED, is_untrained
from tuning.data.formats.values import (
    BadRow,
    Conversation,
    Fault,
    Row,
    quoted,
    text_faults,
    texts_in,
    type_name,
)

_PLAIN = {"role", "content"}
_REASONING = ("reasoning_content", "thinking", "reasoning")


def conversation(row: Row, column: str, *, sharegpt: bool) -> Conversation:
    """The conversation in `column` of `row`. Raises BadRow with all faults."""
    turns = turns_of(row[column])
    if isinstance(turns, str) and not PRINTED.match(turns):
        text_or_turns(turns, column)  # says what is wrong with JSON
    if not isinstance(turns, list):
        what, change = "not a list of messages", 'write [{"role": ..., "content": ...}, ...]'
        if isinstance(turns, str) and PRINTED.match(turns):
            what, change = "Python's print of a list, not JSON", "write it with json.dumps"
        raise BadRow.of("DATA-216", f"{column} is {type_name(turns)}, {what}", change)
    messages, faults = read_messages(turns, column, sharegpt=sharegpt)
    if not faults:
        faults = order_faults(messages, column)
    tools, tool_faults = read_tools(row)
    system, system_faults = read_system(row)
    faults = [*faults, *tool_faults, *system_faults] or prepend_system(messages, system)
    if faults:
        raise BadRow(faults)
    return Conversation(messages, trained_turns(messages), tools)


def read_system(row: Row) -> tuple[str, list[Fault]]:
    """The system message in a column of its own; "" if there is none."""
    column = first_nonempty(row, SYSTEM_COLUMNS)
    if column is None:
        return "", []
    try:
        return required_text(row, column, "", empty=True), []
    except BadRow as bad:
        return "", list(bad.faults)


def prepend_system(messages: list[dict[str, Any]], system: str) -> list[Fault]:
    """Insert a system message, unless the conversation has the same; the fault of another one."""
    own = [message["content"] for message in messages if message["role"] == "system"]
    if not system.strip() or own == [system]:
        return []
    if own:
        what = "a column holds a system message, and the conversation another one"
        return [Fault("DATA-226", what, "join the two into one at the beginning")]
    messages.insert(0, {"role": "system", "content": system})
    return []


def read_messages(
    turns: list[Any], column: str, *, sharegpt: bool
) -> tuple[list[dict[str, Any]], list[Fault]]:
    """The messages in `turns` of `column`, and their faults."""
    messages: list[dict[str, Any]] = []
    faults: list[Fault] = []
    for index, turn in enumerate(turns):
        if not sharegpt and _is_plain(turn):
            messages.append(turn)
            continue
        where = f"{column}[{index}]"
        if not isinstance(turn, Mapping):
            what = f"{where} is {type_name(turn)}, not a message"
            faults.append(Fault("DATA-216", what, 'write {"role": ..., "content": ...}'))
            continue
        message, message_faults = _message(turn, where, sharegpt=sharegpt)
        messages.append(message)
        faults += message_faults
    return messages, faults


def _is_plain(turn: Any) -> bool:
    """Whether `turn` is a valid message of role and content only, like nearly all."""
    if type(turn) is not dict or len(turn) != 2:
        return False
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES or type(content) is not str:
        return False
    if role == "assistant" and (not content or content.isspace()):
        return False
    return "\0" not in content and (content.isascii() or not text_faults(content, ""))


def _message(
    turn: Mapping[str, Any], where: str, *, sharegpt: bool
) -> tuple[dict[str, Any], list[Fault]]:
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    if not sharegpt and turn.get("role") is None and "from" in turn:
        what = f"{where} is a from/value turn, but the data began with role/content turns"
        return {}, [Fault("DATA-214", what, "write all conversations in one of the two ways")]
    faults: list[Fault] = []
    roles = SHAREGPT_ROLE if sharegpt else ROLE
    written_role = turn.get(role_key)
    role = roles.get(written_role, "") if isinstance(written_role, str) else ""
    if written_role is None:
        what = f"{where} has no {role_key}"
        faults.append(Fault("DATA-218", what, f"add one of {', '.join(ROLES)}"))
    elif not role:
        allowed = ", ".join(("human", "gpt", *ROLES) if sharegpt else ROLES)
        what = f"{where}.{role_key} is {quoted(written_role)}; allowed: {allowed}"
        faults.append(Fault("DATA-207", what, "change the role"))
    calls, wrong_calls = _calls(turn, where, sharegpt=sharegpt)
    faults += wrong_calls
    if calls and role != "assistant":
        what = f"{where} calls a tool, but its role is {role or 'unknown'}"
        faults.append(Fault("DATA-216", what, "write the call into an assistant turn"))
    if calls and written_role == "function_call":
        turn = {key: value for key, value in turn.items() if key != content_key}
        turn[content_key] = None
    content = turn.get(content_key)
    if content is None and (calls or wrong_calls) and role == "assistant":
        text: str = ""
    else:
        text, wrong = _content(turn, content_key, where)
        faults += wrong
        if not (wrong or wrong_calls or calls) and role == "assistant" and not text.strip():
            what = f"{where}.{content_key} of the assistant is empty"
            faults.append(Fault("DATA-225", what, "write the answer, or remove the conversation"))
    message: dict[str, Any] = {"role": role, "content": text}
    if len(turn) > 2 or not _PLAIN >= turn.keys() or isinstance(content, list):
        extra = {key: turn[key] for key in CARRIED if turn.get(key) is not None}
        if calls:
            extra["tool_calls"] = calls
        else:
            extra.pop("tool_calls", None)
        faults += _extra_faults(extra, where)
        message |= extra
        untrained, wrong = is_untrained(turn, role, where, content)
        faults += wrong
        if untrained:
            message[UNTRAINED] = True
    return message, faults


def message(turn: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[Fault]]:
    """One message as chat templates take it, in training and in serving, and its faults."""
    return _message(turn, where, sharegpt=False)


def _extra_faults(extra: Mapping[str, Any], where: str) -> list[Fault]:
    """Faults in the keys of a message beside its content."""
    faults: list[Fault] = []
    for key, value in extra.items():
        if key in _REASONING and not isinstance(value, str):
            what = f"{where}.{key} is {type_name(value)}: {quoted(value)}"
            faults.append(Fault("DATA-221", what, "write a text, in quotes"))
        for text in texts_in(value):
            faults += text_faults(text, f"{where}.{key}")
    return faults


def _content(turn: Mapping[str, Any], key: str, where: str) -> tuple[str, list[Fault]]:
    if key not in turn:
        return "", [Fault("DATA-219", f"{where} has no {key}", f"add its {key}")]
    content = turn[key]
    if isinstance(content, list):
        return text_of_parts(content, f"{where}.{key}")
    if content is None:
        return "", [Fault("DATA-220", f"{where}.{key} is null", "write a text")]
    if not isinstance(content, str):
        what = f"{where}.{key} is {type_name(content)}: {quoted(content)}"
        return "", [Fault("DATA-221", what, "write a text, in quotes")]
    return content, text_faults(content, f"{where}.{key}")


def required_text(row: Row, column: str, code: str, *, empty: bool = False) -> str:
    """The text in `column`, which may be content parts.

    Raises BadRow, with `code` for an empty text unless `empty` allows it.
    """
    value = row[column]
    if value is None:
        raise BadRow.of("DATA-220", f"{column} is null", "write a text, or remove the row")
    if isinstance(value, list):
        plain = any(isinstance(part, str) for part in value)
        if len(value) > 1 and plain and all(isinstance(part, (str, Mapping)) for part in value):
            what = f"{column} is a list of {len(value)} texts: several answers, or parts of one"
            raise BadRow.of("DATA-221", what, "choose one of them, or join them into one text")
        value, faults = text_of_parts(value, column)
        if faults:
            raise BadRow(faults)
    if not isinstance(value, str):
        what = f"{column} is {type_name(value)}: {quoted(value)}"
        raise BadRow.of("DATA-221", what, "write a text, in quotes")
    if not empty and not value.strip():
        raise BadRow.of(code, f"{column} is empty", "write it, or remove the row")
    if faults := text_faults(value, column):
        raise BadRow(faults)
    return value


def text_of_parts(parts: list[Any], where: str) -> tuple[str, list[Fault]]:
    """The text of a list of content parts, and their faults."""
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
    return joined, text_faults(joined, where)


def _calls(turn: Mapping[str, Any], where: str, *, sharegpt: bool) -> tuple[list[Any], list[Fault]]:
    """A turn's tool calls with their arguments as objects, which is what chat templates print.

    Also reads calls without the object `function` around name and arguments, OpenAI's older
    `function_call`, and a ShareGPT turn of that name.
    """
    key = "tool_calls"
    calls = from_json(turn.get(key))
    if not calls and sharegpt and turn.get("from") == "function_call":
        key, calls = "value", from_json(turn.get("value"))
    elif not calls and not sharegpt and turn.get("function_call"):
        key, calls = "function_call", from_json(turn["function_call"])
    if not calls:
        return [], []
    read = [
        _call(call, f"{where}.{key}") for call in (calls if isinstance(calls, list) else [calls])
    ]
    faults = [each for each in read if isinstance(each, Fault)]
    return ([], faults[:1]) if faults else (read, [])


def _call(written: Any, where: str) -> dict[str, Any] | Fault:
    """One call as {"type": "function", "function": {"name": ..., "arguments": {...}}}."""
    call = from_json(written)
    change = 'write {"name": "...", "arguments": {...}}'
    if not isinstance(call, Mapping):
        return Fault("DATA-216", f"{where} is not a function call: {quoted(written)}", change)
    call = {key: value for key, value in call.items() if value is not None}
    function = from_json(call.get("function", call))
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name.strip():
        return Fault("DATA-216", f"{where} is not a function call with a name", change)
    if "function" not in call:  # its keys stand in the call itself
        function = {k: v for k, v in call.items() if k not in ("id", "index", "type")}
        call = {"type": "function", **{k: call[k] for k in ("id", "index") if k in call}}
    arguments = function.get("arguments")
    if arguments is None and (others := function.keys() - {"name", "arguments"}):
        what = f"{where} has no arguments, and {', '.join(map(quoted, sorted(others)))} beside name"
        return Fault("DATA-216", what, change)
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    if not isinstance(from_json(arguments), Mapping):
        what = f"{where} has arguments that are not a JSON object: {quoted(arguments)}"
        return Fault("DATA-216", what, 'write {"name": value, ...}, each name once, and no NaN')
    return call | {"function": {**function, "arguments": from_json(arguments)}}


def order_faults(messages: list[dict[str, Any]], column: str) -> list[Fault]:
    """Faults in the order of the roles."""
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


def trained_turns(messages: list[dict[str, Any]]) -> tuple[int, ...]:
    """The assistant turns that no mask key excludes; removes the mark of those that are."""
    return tuple(
        index
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
        and (len(message) == 2 or not message.pop(UNTRAINED, False))
    )


def read_tools(row: Row) -> tuple[list[Any] | None, list[Fault]]:
    """The tools of a conversation, and their faults."""
    tools = from_json(row.get("tools"))
    if not tools:
        return None, []
    if isinstance(tools, list):
        tools = [from_json(tool) for tool in tools]
    if isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools):
        faults = [fault for text in texts_in(tools) for fault in text_faults(text, "tools")]
        return [_schema(tool) for tool in tools], faults
    what = f"tools is {type_name(tools)}, not a list of JSON schemas"
    return None, [Fault("DATA-216", what, 'write [{"type": "function", "function": {...}}]')]


def _schema(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool for chat templates; LLaMA-Factory's data hold only the function."""
    if "function" not in tool and "name" in tool and {"parameters", "description"} & tool.keys():
        return {"type": "function", "function": dict(tool)}
    return dict(tool)


def prompt_messages(row: Row) -> Conversation:
    """A prompt and a completion that are both lists of messages. Raises BadRow."""
    messages: list[dict[str, Any]] = []
    faults: list[Fault] = []
    prompts = 0
    for column in ("prompt", "completion"):
        turns = text_or_turns(row[column], column)
        if not isinstance(turns, list):
            what = f"{column} is {type_name(turns)}; prompt and completion are of different kinds"
            raise BadRow.of("DATA-221", what, "write both as texts, or both as lists of messages")
        part, part_faults = read_messages(turns, column, sharegpt=False)
        messages += part
        faults += part_faults
        if column == "prompt":
            prompts = len(part)
    if not faults:
        faults = order_faults(messages, "prompt + completion")
    tools, tool_faults = read_tools(row)
    system, system_faults = read_system(row)
    size = len(messages)
    faults = [*faults, *tool_faults, *system_faults] or prepend_system(messages, system)
    if faults:
        raise BadRow(faults)
    prompts += len(messages) - size
    return Conversation(messages, tuple(i for i in trained_turns(messages) if i >= prompts), tools)
