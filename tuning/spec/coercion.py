"""A value from YAML -> the type that its configuration key declares."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from tuning.errors import redact
from tuning.spec.findings import nearest, shown
from tuning.spec.keys import Key, same

_DTYPES = {
    "bfloat16": "bfloat16", "bf16": "bfloat16", "torch.bfloat16": "bfloat16",
    "float16": "float16", "fp16": "float16", "half": "float16", "torch.float16": "float16",
    "float32": "float32", "fp32": "float32", "float": "float32", "torch.float32": "float32",
    "auto": "auto",
}  # fmt: skip
_NUMBER = re.compile(r"\s*[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?\s*", re.A)
MOST_TOKENS = 1000  # new ones; each is a row to train in the embedding and the output layer
MAX_ADDRESS = 500  # characters
_HEADS = ("lm_head", "embed_out", "embed_tokens", "wte", "word_embeddings")


class Invalid(Exception):
    """A value that its key does not allow: what is wrong and what to change."""

    def __init__(self, what: str, change: str, *, code: str = "SPEC-113") -> None:
        self.what, self.change, self.code = what, change, code


def coerce(key: Key, value: Any) -> Any:
    """`value` in the type of `key`. Raises Invalid."""
    match key.type:
        case "number" | "count":
            return _number(key, value)
        case "switch":
            if isinstance(value, bool):
                return value
            raise Invalid(f"is {shown(value)}, expected true or false", "write true or false")
        case "names":
            return _names(key, value)
        case "numbers":
            items = value if isinstance(value, list) else [value]
            return tuple(_number(key, each) for each in items)
        case "tokens":
            return _tokens(value)
        case "dtype":
            return _choice(key, value, _DTYPES)
        case "sharding":
            return _sharding(key, value)
        case "trackers":
            names = {each: each for each in key.values}
            return tuple(dict.fromkeys(_choice(key, each, names) for each in items_of(value)))
        case "address":
            return server_address(value)
        case "choice":
            return _choice(key, value, {each: each for each in key.values})
        case _:
            return _text(key, value)


def _number(key: Key, value: Any) -> float | int:
    whole = key.type != "number"
    expected = "a whole number" if whole else "a number"
    number = value
    if isinstance(value, str) and len(value) < 40 and _NUMBER.fullmatch(value):
        number = float(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise Invalid(f"is {shown(value)}, expected {expected}", f"write {expected}")
    if any(same(number, each) for each in key.unset):
        return number
    if bounds := _out_of_bounds(key, number):
        raise Invalid(
            f"is {shown(value)}, must be {bounds}", f"write {expected} {bounds}", code="SPEC-104"
        )
    if number == int(number) and (whole or key.setting == "warmup") and key.name != "warmup_ratio":
        return int(number)
    if whole or (key.setting == "warmup" and number > 1):
        raise Invalid(f"is {number:g}, expected a whole number", "write a whole number")
    return float(number)


def _out_of_bounds(key: Key, number: float | int) -> str | None:
    bounds: tuple[tuple[str, float | None, Callable[[float, float], bool]], ...] = (
        ("above", key.above, operator.gt),
        ("at least", key.min, operator.ge),
        ("below", key.below, operator.lt),
        ("at most", key.max, operator.le),
    )
    limits = [(word, bound, holds) for word, bound, holds in bounds if bound is not None]
    if all(holds(number, bound) for _, bound, holds in limits):
        return None
    return " and ".join(f"{word} {bound:,}" for word, bound, _ in limits)


def _names(key: Key, value: Any) -> tuple[str, ...]:
    items = value if isinstance(value, list) else [value]
    for each in items:
        if not isinstance(each, str) or not each:
            raise Invalid(f"holds {shown(each)}, expected names", "write a list of names")
        if not re.fullmatch(r"[A-Za-z0-9_.:/-]{1,200}", each):
            what = f"{shown(each)} is a pattern, or not a name"
            raise Invalid(what, "list the names of the layers, such as [q_proj, v_proj]")
        if key.setting == "target_modules" and each.rpartition(".")[2] in _HEADS:
            what = (
                f"{each} is not supported: servers load adapters of attention and MLP layers only"
            )
            raise Invalid(what, f"remove {each}", code="SPEC-118")
    if not items:
        raise Invalid("is an empty list", "name at least one, or remove the key")
    return tuple(dict.fromkeys(items))


def _tokens(value: Any) -> tuple[str, ...]:
    """Texts that become tokens: printable, no two the same."""
    items = value if isinstance(value, list) else [value]
    if not 0 < len(items) <= MOST_TOKENS:
        what = f"lists {len(items):,} tokens"
        change = f"list 1 to {MOST_TOKENS}, or remove the key"
        raise Invalid(what, change, code="SPEC-104")
    for each in items:
        if not isinstance(each, str):
            raise Invalid(f"holds {shown(each)}, expected texts", "write each in quotes")
        if not each.strip():
            what = f"holds {shown(each)}, which is empty or white space"
            raise Invalid(what, "remove it, or write a text such as <|order|>", code="SPEC-104")
        if each != each.strip():
            what = f"holds {shown(each)}, with white space at an end, which templates trim"
            raise Invalid(what, f"write {shown(each.strip())}", code="SPEC-104")
        if len(each) > 100 or not each.isprintable():
            what = f"holds {shown(each)}, which is too long or holds control characters"
            change = "write at most 100 printable characters a token"
            raise Invalid(what, change, code="SPEC-104")
        if items.count(each) > 1:
            what = f"lists {shown(each)} {items.count(each)} times"
            raise Invalid(what, "list each token once", code="SPEC-104")
    return tuple(items)


def _choice(key: Key, value: Any, options: dict[str, str]) -> str:
    if isinstance(value, str) and value.strip().lower() in options:
        return options[value.strip().lower()]
    listed = ["bfloat16", "float16", "float32"] if key.type == "dtype" else list(options)
    meant = nearest(value, options) if isinstance(value, str) else None
    hint = f'; did you mean "{options[meant]}"?' if meant else ""
    change = f"use one of {', '.join(listed)}{hint}"
    if key.name == "objective":  # ORPO, SimPO, GRPO, reward models ...
        change += "; others are trl's own: https://huggingface.co/docs/trl"
    raise Invalid(f"is {shown(value)}, which is not known", change, code="SPEC-104")


def _sharding(key: Key, value: Any) -> str:
    """transformers' `fsdp`: true, one word or several, as a list or a text."""
    if value is True:
        return key.values[0]
    words = value.split() if isinstance(value, str) else value
    if isinstance(words, list) and "offload" in words:
        what = 'has "offload", which the plan chooses where nothing else fits'
        raise Invalid(what, "remove that word", code="SPEC-104")
    if isinstance(words, list) and len(words) > 1:
        words = [word for word in words if word != "auto_wrap"]  # layers always are on their own
    one = words[0] if isinstance(words, list) and len(words) == 1 else value
    return _choice(key, one, {each: each for each in key.values})


def items_of(value: Any) -> list[Any]:
    """The items of a list, or of a text with commas."""
    return (
        value.split(",")
        if isinstance(value, str)
        else value
        if isinstance(value, list)
        else [value]
    )


def server_address(value: Any) -> str:
    """The address of a server: http or https, without a login or a query. Raises Invalid."""
    url = value.strip() if isinstance(value, str) else ""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    bare = not any(c in url for c in "@?#\\ ") and url.isascii() and url.isprintable()
    if not sound or not bare or len(url) > MAX_ADDRESS:
        change = "write http:// or https:// and a host, without a login or a query"
        what = f"is {shown(redact(f'{value}'))}, not the address of a server"
        raise Invalid(what, change, code="SPEC-104")
    return url.rstrip("/")


def _text(key: Key, value: Any) -> str | None:
    if not isinstance(value, str):
        raise Invalid(f"is {shown(value)}, expected a string", "write a string, in quotes")
    if not value.strip():
        raise Invalid("is empty", "give it a value, or remove the key")
    if key.setting == "chat_template":
        return value
    longest = 4096 if key.setting == "start_adapter" else 200  # a path, in a file of our own
    if len(value) > longest or not value.isprintable():
        what = "is too long or holds control characters"
        raise Invalid(what, f"write at most {longest} printable characters", code="SPEC-104")
    if key.setting == "dataset_path":
        return _inside(value) or None
    if key.setting == "dataset_extension":
        return value.lower().removeprefix(".")
    if key.setting == "revision" and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*", value):
        what = f"{shown(value)} is not a revision"
        raise Invalid(what, "write a commit, a branch or a tag", code="SPEC-104")
    return value


def _inside(path: str) -> str:
    path = path.rstrip("/") + "/"
    for mount in ("/mnt/data/", "/mnt/", "./"):
        path = path.removeprefix(mount)
    path = path.rstrip("/")
    if path.startswith("/") or ".." in path.split("/"):
        what = "points outside the data"
        raise Invalid(what, "give a path relative to the data, without ..", code="SPEC-104")
    return path
