"""Response bodies and stream events in OpenAI's shapes."""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tuning.serve.engine import Piece
from tuning.serve.sampling import SampledToken
from tuning.serve.schema import ApiError

TokenBytes = Callable[[int], bytes]  # the bytes of a token: perhaps half a character


@dataclass(frozen=True)
class Header:
    """The fields that every response to one request shares."""

    id: str
    created: int
    model: str
    fingerprint: str

    def of(self, kind: str) -> dict[str, Any]:
        """The fields of a response whose `object` is `kind`."""
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


def chat(header: Header, answers: Iterable[Piece], token_bytes: TokenBytes) -> dict[str, Any]:
    """A complete `chat.completion`, without usage."""
    return header.of("chat.completion") | {
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": chat_logprobs(answer.tokens, token_bytes),
                "finish_reason": answer.finish,
            }
            for index, answer in enumerate(answers)
        ]
    }


def chat_chunk(
    header: Header, index: int, delta: dict[str, Any], piece: Piece | None, token_bytes: TokenBytes
) -> dict[str, Any]:
    """A chunk of a streamed chat completion; the first one has no `piece`."""
    choice = {
        "index": index,
        "delta": delta,
        "logprobs": chat_logprobs(piece.tokens, token_bytes) if piece else None,
        "finish_reason": piece.finish if piece else None,
    }
    return header.of("chat.completion.chunk") | {"choices": [choice]}


def completion(header: Header, answers: Iterable[Piece], token_bytes: TokenBytes) -> dict[str, Any]:
    """A complete `text_completion`, without usage."""
    choices = [completion_choice(i, answer, token_bytes) for i, answer in enumerate(answers)]
    return header.of("text_completion") | {"choices": choices}


def completion_choice(
    index: int, piece: Piece, token_bytes: TokenBytes, offset: int = 0
) -> dict[str, Any]:
    """A choice of a completion, complete or streamed; `offset`: characters sent before."""
    return {
        "index": index,
        "text": piece.text,
        "logprobs": completion_logprobs(piece.tokens, token_bytes, offset),
        "finish_reason": piece.finish,
    }


def chat_logprobs(tokens: Iterable[SampledToken], token_bytes: TokenBytes) -> dict[str, Any] | None:
    """Log-probabilities in the shape of chat completions; None if the request wants none."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(token)
        return {"token": _text(raw), "logprob": logprob, "bytes": list(raw)}

    content = [
        entry(sampled.token, sampled.logprob)
        | {"top_logprobs": [entry(token, logprob) for token, logprob in sampled.top]}
        for sampled in tokens
        if sampled.logprob is not None
    ]
    return {"content": content, "refusal": None} if content else None


def _text(raw: bytes) -> str:
    """A token as text; an incomplete character is spelled by its bytes, as OpenAI does."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def completion_logprobs(
    tokens: Iterable[SampledToken], token_bytes: TokenBytes, offset: int = 0
) -> dict[str, Any] | None:
    """Log-probabilities in the shape of completions; None if the request wants none."""
    scored = [sampled for sampled in tokens if sampled.logprob is not None]
    if not scored:
        return None
    raws = [token_bytes(sampled.token) for sampled in scored]
    prefixes = list(itertools.accumulate(raws, initial=b""))[:-1]
    return {
        "tokens": [_text(raw) for raw in raws],
        "token_logprobs": [sampled.logprob for sampled in scored],
        "top_logprobs": [
            {_text(token_bytes(token)): logprob for token, logprob in sampled.top}
            for sampled in scored
        ],
        "text_offset": [offset + len(_complete_characters(prefix)) for prefix in prefixes],
    }


def _complete_characters(raw: bytes) -> str:
    """The complete characters of a text that continues; invalid bytes count as one character."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(raw)


def error(error: ApiError) -> dict[str, Any]:
    """The error body that OpenAI's clients read."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    if error.status == 429:
        kind = "rate_limit_error"
    body = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return {"error": body}


def event(record: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(record, ensure_ascii=False)}\n\n"


DONE = "data: [DONE]\n\n"
