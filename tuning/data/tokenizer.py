"""Loads and validates the base model's tokenizer and chat template."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tuning import files
from tuning.adapter import Adapter
from tuning.data.chat import ChatTemplate
from tuning.data.formats import quoted
from tuning.errors import Problem, SpecError

AGAIN = "repair it, or download it again"


def load_tokenizer(base: Path, new_tokens: Sequence[str] = (), template: str | None = None) -> Any:
    """The tokenizer in the folder `base`, with `new_tokens` (see `add_tokens`). Raises SpecError.

    `template` is the user's chat template; it decides which new tokens are special.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the library raises whatever its parsers raise
        raise _unreadable(base, error) from error
    if not tokenizer.is_fast:
        what = f"its tokenizer ({type(tokenizer).__name__}) has no character offsets"
        raise SpecError.at("DATA-246", "base model", what, "take one with tokenizer.json")
    settle_template(tokenizer, base)
    add_tokens(tokenizer, new_tokens, template)
    return tokenizer


def _unreadable(base: Path, error: Exception) -> SpecError:
    """The error for a tokenizer that transformers cannot load; it reads config.json as well."""
    from transformers import AutoConfig, __version__

    words = " ".join(str(error).split())[:200]
    try:
        if (base / "config.json").is_file():
            AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True)
    except Exception:
        what = f"is refused by transformers {__version__}: {words}"
        change = "repair it, or use the model's newest revision"
        return SpecError.at("MODEL-103", f"{base / 'config.json'}", what, change)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        path = base / name
        try:
            broken = path.is_file() and not isinstance(files.read_json(path), dict)
        except (ValueError, RecursionError):
            broken = True
        if broken:
            return SpecError.at("DATA-246", f"{path}", "is no JSON object", "download it again")
    what = f"its tokenizer cannot be loaded ({type(error).__name__}: {words})"
    change = "download its tokenizer's files again, or take a base model with tokenizer.json"
    return SpecError.at("DATA-246", "base model", what, change)


def settle_template(tokenizer: Any, base: Path) -> None:
    """Leave `tokenizer` with one chat template, which is then also the one that it saves, or none.

    Of several named ones that is `own_template`. A processor's (chat_template.json), of which a
    tokenizer knows nothing, counts where there is no other. Raises SpecError if it is no text.
    """
    own, where = own_template(tokenizer), base / "tokenizer_config.json"
    if own is None and (base / "chat_template.json").is_file():
        where = base / "chat_template.json"
        try:
            own = files.read_json(where).get("chat_template")
        except (ValueError, RecursionError, AttributeError):
            raise SpecError.at("DATA-245", f"{where}", "is no JSON object", AGAIN) from None
    if own is not None and not isinstance(own, str):
        raise SpecError.at("DATA-245", f"{where}", "has a chat template that is no text", AGAIN)
    tokenizer.chat_template = own or None


def add_tokens(tokenizer: Any, tokens: Sequence[str], template: str | None = None) -> None:
    """Add `tokens` to `tokenizer`, behind its last one. Raises SpecError for one that exists.

    Those that the chat template writes (`template`, or else the tokenizer's own) mark turns, so
    they are special: left out of shown answers, and refused in the text of a message. The others
    are part of what is said.
    """
    if not tokens:
        return
    known = tokenizer.get_vocab()
    problems = [
        Problem(
            "DATA-257",
            "ModelConfig.new_special_tokens",
            f"{quoted(token)} is token {known[token]:,} of the base model already",
            "remove it from the list: in the data it is that token as it is",
        )
        for token in tokens
        if token in known
    ]
    if problems:
        raise SpecError(problems)
    is_mark = _mark_test(tokenizer, template or own_template(tokenizer) or "")
    append(tokenizer, {token: is_mark(token) for token in tokens})
    problems = [
        Problem("DATA-258", "ModelConfig.new_special_tokens", f"{quoted(token)} {why}", change)
        for token in tokens
        for why, change in _unusable(tokenizer, token)
    ]
    if problems:
        raise SpecError(problems)


def _unusable(tokenizer: Any, token: str) -> Iterator[tuple[str, str]]:
    """Why an added token does not work in this tokenizer, and what to change."""
    id = tokenizer.convert_tokens_to_ids(token)
    if id not in tokenizer(token, add_special_tokens=False)["input_ids"]:
        yield "is never read as one token", "choose a text that no other token is a part of"
    shown = tokenizer.decode([id], clean_up_tokenization_spaces=False)
    if shown.strip() != token:  # decoders of bytes take some letters beyond ASCII for bytes
        yield f"would be shown as {quoted(shown)} by the base's tokenizer", "write it in ASCII"


def append(tokenizer: Any, tokens: Mapping[str, bool]) -> None:
    """Add `tokens`, each with whether it is special, behind the last one of `tokenizer`."""
    from tokenizers import AddedToken

    for token, special in tokens.items():  # one at a time: numbers in this order
        added = AddedToken(token, special=special, normalized=False)
        tokenizer.add_tokens([added], special_tokens=special)


def added_by(adapter: Adapter) -> dict[int, tuple[str, bool]]:
    """The added tokens that the adapter's own tokenizer.json has: number -> text, and whether it is
    special. Only those whose rows it trains. Raises SpecError for a damaged file.
    """
    path, ids = adapter.folder / "tokenizer.json", set(adapter.token_ids)
    if not ids or not path.is_file():
        return {}
    try:
        listed = files.read_json(path)["added_tokens"]
        return {
            int(token["id"]): (str(token["content"]), bool(token["special"]))
            for token in listed
            if token["id"] in ids
        }
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        what = f"cannot be read ({type(error).__name__})"
        raise SpecError.at("MODEL-202", str(path), what, "fetch it again") from None


def _mark_test(tokenizer: Any, template: str) -> Callable[[str], bool]:
    """Whether a chat template writes a token around turns, or names it for some of them."""
    turns = [{"role": role, "content": "a"} for role in ("system", "user", "assistant")]
    shown = ""
    for messages in (turns, turns[1:]):
        with contextlib.suppress(Exception):  # an untrusted program may raise anything
            shown += tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
    words = set(re.findall(r"\w+", template))  # may be those of its program
    return lambda token: token in shown or (token in template and token not in words)


def load_template(tokenizer: Any, text: str | None) -> ChatTemplate | None:
    """The chat template: the user's `text`, or the tokenizer's own if it has one."""
    source = text or own_template(tokenizer)
    if not source:
        return None
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template([[{"role": "user", "content": "a"}]], chat_template=source)
    except Exception as error:
        if type(error).__name__ == "TemplateSyntaxError":
            where = "ModelConfig.chat_template" if text else "the base model's chat template"
            what = f"is not a valid template: {error}"
            raise SpecError.at("DATA-245", where, what, "repair it") from error
    return ChatTemplate(tokenizer, source)


def own_template(tokenizer: Any) -> str | None:
    """The tokenizer's chat template; of several, the one named "default", or else the first."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default") or next(iter(own.values()), None)
    return own or None
