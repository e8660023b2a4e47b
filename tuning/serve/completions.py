"""The routes that generate: OpenAI's chat completions and completions, and KAITO's `/chat`.

Each validates its request, makes jobs of it, and answers with one JSON body or with a stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from tuning.data.turn_ends import Ends
from tuning.serve import responses, schema
from tuning.serve.adapters import ServedModel
from tuning.serve.engine import Job, Piece, prompt_tokens
from tuning.serve.middleware import note
from tuning.serve.responses import Echo, Header
from tuning.serve.sampling import Sampling
from tuning.serve.schema import ApiError
from tuning.serve.service import Service

T = TypeVar("T")
NO_ENDS = Ends(frozenset())  # of ignore_eos
Pieces = AsyncGenerator[tuple[int, Piece], None]


class ClientDisconnected(Exception):
    """The client closed the connection."""


def _sampling(service: Service, body: schema.Generation) -> Sampling:
    """The request's settings; the generation config's where the request sets none."""
    defaults = service.require_loaded().defaults
    optional: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k if body.top_k is None else max(0, body.top_k),
        "repetition_penalty": body.repetition_penalty,
    }
    return replace(
        defaults,
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        min_tokens=body.min_tokens,
        seed=body.seed,
        **{name: value for name, value in optional.items() if value is not None},
    )


def _header(prefix: str, model: ServedModel) -> Header:
    fingerprint = hashlib.sha256(model.version.encode()).hexdigest()[:12]
    id = f"{prefix}-{secrets.token_hex(12)}"
    return Header(id, int(time.time()), model.name, f"fp_{fingerprint}")


async def chat(service: Service, request: Request) -> Response:
    """`POST /v1/chat/completions`."""
    body = schema.parse(schema.ChatRequest, await request.body())
    model = service.find_model(body.model)
    prompt = await service.encode_chat(model, [message.turn for message in body.messages])
    jobs = service.jobs(
        model,
        [prompt],
        sampling=_sampling(service, body),
        count=body.n,
        limit=body.max_completion_tokens or body.max_tokens,
        limit_param="max_completion_tokens" if body.max_completion_tokens else "max_tokens",
        stops=body.stops,
        top_logprobs=body.requested_logprobs,
        ends=NO_ENDS if body.ignore_eos else None,
    )
    header, token_bytes = _header("chatcmpl", model), service.tokenizer(model).token_bytes
    pieces = service.answers(model, jobs)

    async def events(first: tuple[int, Piece]) -> AsyncGenerator[str, None]:
        usage = _StreamedUsage(body, jobs)

        def chunk(index: int, delta: dict[str, Any], piece: Piece | None = None) -> str:
            record = responses.chat_chunk(header, index, delta, piece, token_bytes)
            return responses.event(record | usage.of(piece))

        for index in range(body.n):
            yield chunk(index, {"role": "assistant", "content": ""})
        async for index, piece in _chain(first, pieces):
            delta = {"content": piece.text} if piece.text or not piece.finish else {}
            if delta.get("content") or piece.finish or piece.tokens:
                yield chunk(index, delta, piece)
        if body.streams_usage:
            record = header.of("chat.completion.chunk") | {"choices": []}
            yield responses.event(record | {"usage": _usage(jobs)})

    if body.stream:
        return await _stream(request, model, jobs, pieces, events)
    answers = await _complete(request, jobs, pieces)
    record = responses.chat(header, answers, token_bytes) | {"usage": _usage(jobs)}
    return _json(request, record, model, jobs)


async def completions(service: Service, request: Request) -> Response:
    """`POST /v1/completions`."""
    body = schema.parse(schema.CompletionRequest, await request.body())
    model = service.find_model(body.model)
    prompts = [await service.encode_prompt(model, prompt) for prompt in body.prompts]
    scores_prompt = body.echo and body.logprobs is not None
    if scores_prompt:
        _check_scores(sum(map(len, prompts)) * body.n * ((body.logprobs or 0) + 1))
    jobs = service.jobs(
        model,
        prompts,
        sampling=_sampling(service, body),
        count=body.n,
        limit=min(16, service.limits.tokens) if body.max_tokens is None else body.max_tokens,
        stops=body.stops,
        top_logprobs=body.logprobs,
        scores_prompt=scores_prompt,
        ends=NO_ENDS if body.ignore_eos else None,
        param="prompt",
    )
    header, token_bytes = _header("cmpl", model), service.tokenizer(model).token_bytes
    echoes: list[Echo | None] = [None] * len(jobs)
    if body.echo:
        echoes = [
            await service.echo(model, prompt) for prompt in body.prompts for _ in range(body.n)
        ]
    pieces = service.answers(model, jobs)

    def choice(index: int, piece: Piece, offset: int = 0, echo: Echo | None = None) -> Any:
        scores = jobs[index].scores
        return responses.completion_choice(
            index, piece, token_bytes, offset, echo=echo, scores=scores
        )

    async def events(first: tuple[int, Piece]) -> AsyncGenerator[str, None]:
        usage, sent = _StreamedUsage(body, jobs), [0] * len(jobs)

        def chunk(choices: list[Any], usage: dict[str, Any]) -> str:
            return responses.event(header.of("text_completion") | {"choices": choices} | usage)

        async for index, piece in _chain(first, pieces):
            echo, echoes[index] = echoes[index], None
            if echo is not None:  # by now its log-probabilities are known
                yield chunk([choice(index, Piece(""), echo=echo)], usage.of(None))
                sent[index] = len(echo.text)
            if piece.text or piece.finish or piece.tokens:
                yield chunk([choice(index, piece, sent[index])], usage.of(piece))
                sent[index] += len(piece.text)
        if body.streams_usage:
            yield chunk([], {"usage": _usage(jobs)})

    if body.stream:
        return await _stream(request, model, jobs, pieces, events)
    answers = await _complete(request, jobs, pieces)
    choices = [
        choice(index, answer, echo=echo)
        for index, (answer, echo) in enumerate(zip(answers, echoes, strict=True))
    ]
    record = header.of("text_completion") | {"choices": choices, "usage": _usage(jobs)}
    return _json(request, record, model, jobs)


def _check_scores(count: int) -> None:
    """Raise ApiError if a response would hold too many log-probabilities of prompts."""
    if count > schema.MAX_SCORES:
        what = f"echo with logprobs: {count:,} log-probabilities; {schema.MAX_SCORES:,} fit"
        raise ApiError(400, f"{what}: send fewer prompts or a smaller logprobs", param="logprobs")


async def quick_start(service: Service, request: Request) -> Response:
    """`POST /chat`."""
    body = schema.parse(schema.QuickStartRequest, await request.body())
    model = service.find_model(body.model)
    turns = [message.turn for message in body.messages or ()]
    if body.prompt is None and not turns:
        raise ApiError(400, "Text generation parameter prompt required", param="prompt")
    if turns and (body.prompt is not None or body.prefix):
        what = "send either prompt or messages"
        raise ApiError(400, what, param="prompt" if body.prompt is not None else "prefix")
    text = f"{body.prefix or ''}{body.prompt or ''}"
    has_template = service.tokenizer(model).has_template
    if turns or has_template:
        prompt = await service.encode_chat(model, turns or [{"role": "user", "content": text}])
    else:
        prompt = await service.encode_prompt(model, text)
    param, settings = "messages" if turns else "prompt", body.generate_kwargs
    limit = settings.max_new_tokens
    if limit is None and settings.max_length is not None:
        limit = settings.max_length - len(prompt)
        if limit < 1:
            what = f"the prompt has {len(prompt)} tokens; max_length includes the prompt"
            raise ApiError(400, what, param="generate_kwargs")
    sampling = Sampling(
        temperature=settings.temperature if settings.do_sample else 0.0,
        top_p=settings.top_p,
        top_k=settings.top_k,
        typical_p=settings.typical_p,
        repetition_penalty=settings.repetition_penalty,
        min_tokens=max(0, settings.min_length - len(prompt)),
        seed=settings.seed,
    )
    jobs = service.jobs(
        model,
        [prompt],
        sampling=sampling,
        count=1,
        limit=limit,
        limit_param="generate_kwargs.max_new_tokens",
        ends=settings.ends,
        param=param,
    )
    (answer,) = await _complete(request, jobs, service.answers(model, jobs))
    result = answer.text.strip()
    if body.return_full_text and not turns:
        result = f"{text}\n{result}" if has_template else f"{text}{answer.text}"
    return _json(request, {"Result": result}, model, jobs)


def _json(
    request: Request, record: dict[str, Any], model: ServedModel, jobs: Sequence[Job]
) -> Response:
    generated = sum(len(job.tokens) for job in jobs)
    note(request.scope, model=model.name, prompt=prompt_tokens(jobs), tokens=generated)
    return JSONResponse(record, headers={"X-Model-Version": model.version})


def _usage(jobs: Sequence[Job]) -> dict[str, int]:
    """Token counts."""
    return responses.usage(prompt_tokens(jobs), sum(len(job.tokens) for job in jobs))


class _StreamedUsage:
    """The `usage` of each chunk of a stream."""

    def __init__(self, body: schema.Generation, jobs: Sequence[Job]) -> None:
        self._body, self._prompt, self._generated = body, prompt_tokens(jobs), 0

    def of(self, piece: Piece | None) -> dict[str, Any]:
        """What a chunk with `piece` has: nothing, null as in OpenAI's, or the counts so far."""
        if piece is not None:
            self._generated += len(piece.tokens) + len(piece.end)
        if self._body.streams_each_usage:
            return {"usage": responses.usage(self._prompt, self._generated)}
        return {"usage": None} if self._body.streams_usage else {}


async def _complete(request: Request, jobs: Sequence[Job], pieces: Pieces) -> list[Piece]:
    """The complete answer of each job. Raises ClientDisconnected."""
    received: list[list[Piece]] = [[] for _ in jobs]

    async def collect() -> None:
        async for index, piece in pieces:
            received[index].append(piece)

    await _while_connected(request, collect())
    return [Piece.join(parts) for parts in received]


async def _stream(
    request: Request,
    model: ServedModel,
    jobs: Sequence[Job],
    pieces: Pieces,
    events: Callable[[tuple[int, Piece]], AsyncGenerator[str, None]],
) -> Response:
    """A stream that begins with the first piece, so that an earlier error has its HTTP status."""
    first = await _while_connected(request, anext(pieces))
    note(request.scope, model=model.name, prompt=prompt_tokens(jobs))

    async def body() -> AsyncGenerator[str, None]:
        async with contextlib.aclosing(events(first)) as stream:
            try:
                async for event in stream:
                    yield event
            except ApiError as error:
                yield responses.event(responses.error(error))
        note(request.scope, tokens=sum(len(job.tokens) for job in jobs))
        yield responses.DONE

    headers = {"X-Model-Version": model.version}
    return StreamingResponse(body(), media_type="text/event-stream", headers=headers)


async def _chain(first: tuple[int, Piece], pieces: Pieces) -> Pieces:
    yield first
    async with contextlib.aclosing(pieces) as rest:
        async for item in rest:
            yield item


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client disconnects meanwhile."""
    task = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        task.cancel()
        disconnected.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
