"""Answers in OpenAI's shapes: whole, and in pieces."""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tuning.serve.sampling import Choice
from tuning.serve.schema import Refusal

Say = Callable[[int], bytes]  # one token as it stands in a text: perhaps half a character


@dataclass
class Answer:
    """What has come so far of one answer."""

    text: str = ""
    choices: list[Choice] = field(default_factory=list)
    finish: str | None = None


@dataclass(frozen=True)
class Heading:
    """What every reply to one request begins with."""

    id: str
    created: int
    model: str
    fingerprint: str

    def of(self, kind: str) -> dict[str, Any]:
        """The common keys of a reply of this kind."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Token counts."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def chat(heading: Heading, answers: Iterable[Answer], say: Say) -> dict[str, Any]:
    """A whole `chat.completion`, without usage."""
    return heading.of("chat.completion") | {
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": chat_logprobs(answer.choices, say),
                "finish_reason": answer.finish,
            }
            for index, answer in enumerate(answers)
        ]
    }


def chat_chunk(
    heading: Heading, index: int, delta: dict[str, Any], *, choices: Any, finish: Any, say: Say
) -> dict[str, Any]:
    """A piece of a chat answer."""
    choice = {
        "index": index,
        "delta": delta,
        "logprobs": chat_logprobs(choices, say),
        "finish_reason": finish,
    }
    return heading.of("chat.completion.chunk") | {"choices": [choice]}


def completion(
    heading: Heading, answers: Iterable[Answer], say: Say, offsets: Iterable[int]
) -> dict[str, Any]:
    """A whole `text_completion`, without usage; `offsets` as for `completion_choice`."""
    choices = [
        completion_choice(index, answer.text, answer.choices, answer.finish, say, offset)
        for index, (answer, offset) in enumerate(zip(answers, offsets, strict=True))
    ]
    return heading.of("text_completion") | {"choices": choices}


def completion_choice(
    index: int, text: str, choices: Iterable[Choice], finish: Any, say: Say, offset: int = 0
) -> dict[str, Any]:
    """One choice of a completion, or a piece of it; `offset`: characters that came before."""
    return {
        "index": index,
        "text": text,
        "logprobs": completion_logprobs(choices, say, offset),
        "finish_reason": finish,
    }


def chat_logprobs(choices: Iterable[Choice], say: Say) -> dict[str, Any] | None:
    """The probabilities of tokens as chat tells them; None if nobody asked."""
    told = [
        _told(choice.token, choice.logprob, say)
        | {"top_logprobs": [_told(token, logprob, say) for token, logprob in choice.top]}
        for choice in choices
        if choice.logprob is not None
    ]
    return {"content": told, "refusal": None} if told else None


def _told(token: int, logprob: float, say: Say) -> dict[str, Any]:
    found = say(token)
    return {"token": _text(found), "logprob": logprob, "bytes": list(found)}


def _text(found: bytes) -> str:
    """A token as text; what is no whole character is told by its bytes, as OpenAI does."""
    try:
        return found.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


def completion_logprobs(
    choices: Iterable[Choice], say: Say, offset: int = 0
) -> dict[str, Any] | None:
    """The probabilities of tokens as completions tell them; None if nobody asked."""
    told = [choice for choice in choices if choice.logprob is not None]
    if not told:
        return None
    words = [say(choice.token) for choice in told]
    ahead = itertools.accumulate(words, initial=b"")
    return {
        "tokens": [_text(word) for word in words],
        "token_logprobs": [choice.logprob for choice in told],
        "top_logprobs": [
            {_text(say(token)): logprob for token, logprob in one.top} for one in told
        ],
        "text_offset": [offset + len(_whole(before)) for before in list(ahead)[:-1]],
    }


def _whole(found: bytes) -> str:
    """The whole characters of a text that goes on; what can be none is one broken character."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(found)


def error(refusal: Refusal) -> dict[str, Any]:
    """A refusal as clients read it."""
    kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    if refusal.status == 429:
        kind = "rate_limit_error"
    return {
        "error": {
            "message": refusal.message,
            "type": kind,
            "param": refusal.param,
            "code": refusal.code,
        }
    }


def event(record: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(record, ensure_ascii=False)}\n\n"


DONE = "data: [DONE]\n\n"
