"""Response bodies and stream events in OpenAI's shapes."""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tuning.serve.engine import Piece
from tuning.serve.sampling import SampledToken
from tuning.serve.schema import ApiError


@dataclass(frozen=True)
class Echo:
    """A prompt that its completion repeats."""

    text: str
    tokens: Sequence[int]
    offsets: Sequence[int]  # of each token in the text


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


def completion_choice(
    index: int,
    piece: Piece,
    token_bytes: TokenBytes,
    offset: int = 0,
    *,
    echo: Echo | None = None,
    scores: Sequence[SampledToken] | None = None,
) -> dict[str, Any]:
    """A choice of a completion, complete or streamed; `offset`: characters sent before.

    `echo` puts the prompt before the answer, with its tokens' `scores` if there are any.
    """
    parts, text = [], piece.text
    if echo is not None:
        text, offset = echo.text + text, len(echo.text)
        parts.append(None if scores is None else echo_logprobs(echo, scores, token_bytes))
    parts.append(completion_logprobs((*piece.tokens, *piece.end), token_bytes, offset))
    known = [part for part in parts if part is not None]
    return {
        "index": index,
        "text": text,
        "logprobs": {key: [*itertools.chain(*(part[key] for part in known))] for key in known[0]}
        if known
        else None,
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
    return {
        "tokens": [_text(raw) for raw in raws],
        "token_logprobs": [sampled.logprob for sampled in scored],
        "top_logprobs": [_top(sampled, token_bytes) for sampled in scored],
        "text_offset": [offset + start for start in offsets(raws)],
    }


def echo_logprobs(
    echo: Echo, scores: Sequence[SampledToken], token_bytes: TokenBytes
) -> dict[str, Any]:
    """The same for a prompt, whose first token has no log-probability."""
    return {
        "tokens": [_text(token_bytes(token)) for token in echo.tokens],
        "token_logprobs": [None, *(sampled.logprob for sampled in scores)],
        "top_logprobs": [None, *(_top(sampled, token_bytes) for sampled in scores)],
        "text_offset": list(echo.offsets),
    }


def _top(sampled: SampledToken, token_bytes: TokenBytes) -> dict[str, float | None]:
    """The most likely tokens and, as OpenAI has it, the token itself."""
    pairs = [*sampled.top, (sampled.token, sampled.logprob)]
    # Tokens may have the same text: the likeliest counts.
    return {_text(token_bytes(token)): logprob for token, logprob in reversed(pairs)}


def offsets(raws: Iterable[bytes]) -> list[int]:
    """The complete characters before each of the tokens with these bytes.

    Bytes that never make a character count as one.
    """
    decoder, starts, length = codecs.getincrementaldecoder("utf-8")("replace"), [], 0
    for raw in raws:
        starts.append(length)
        length += len(decoder.decode(raw))
    return starts


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
