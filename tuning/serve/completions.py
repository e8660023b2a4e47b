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

from tuning.serve import responses, schema
from tuning.serve.adapters import ServedModel
from tuning.serve.engine import Job, Piece
from tuning.serve.middleware import note
from tuning.serve.responses import Header
from tuning.serve.sampling import Sampling
from tuning.serve.schema import ApiError
from tuning.serve.service import Service

T = TypeVar("T")
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
        stops=body.stops,
        top_logprobs=body.requested_logprobs,
    )
    header, token_bytes = _header("chatcmpl", model), service.tokenizer(model).token_bytes
    pieces = service.answers(model, jobs)

    async def events(first: tuple[int, Piece]) -> AsyncGenerator[str, None]:
        def chunk(index: int, delta: dict[str, Any], piece: Piece | None = None) -> str:
            return responses.event(responses.chat_chunk(header, index, delta, piece, token_bytes))

        for index in range(body.n):
            yield chunk(index, {"role": "assistant", "content": ""})
        async for index, piece in _chain(first, pieces):
            delta = {"content": piece.text} if piece.text or not piece.finish else {}
            if delta.get("content") or piece.finish or piece.tokens:
                yield chunk(index, delta, piece)
        if body.streams_usage:
            record = header.of("chat.completion.chunk") | {"choices": []}
            yield responses.event(record | {"usage": _usage(jobs, 1)})

    if body.stream:
        return await _stream(request, model, jobs, pieces, events)
    answers = await _complete(request, jobs, pieces)
    record = responses.chat(header, answers, token_bytes) | {"usage": _usage(jobs, 1)}
    return _json(request, record, model, jobs)


async def completions(service: Service, request: Request) -> Response:
    """`POST /v1/completions`."""
    body = schema.parse(schema.CompletionRequest, await request.body())
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "logprobs of the prompt (echo) are not supported", param="echo")
    model = service.find_model(body.model)
    prompts = [await service.encode_prompt(model, prompt) for prompt in body.prompts]
    jobs = service.jobs(
        model,
        prompts,
        sampling=_sampling(service, body),
        count=body.n,
        limit=body.max_tokens or min(16, service.limits.tokens),
        stops=body.stops,
        top_logprobs=body.logprobs,
        param="prompt",
    )
    tokenizer = service.tokenizer(model)
    header, token_bytes = _header("cmpl", model), tokenizer.token_bytes
    pieces = service.answers(model, jobs)
    echoes = [tokenizer.decode(job.prompt) if body.echo else "" for job in jobs]

    async def events(first: tuple[int, Piece]) -> AsyncGenerator[str, None]:
        def chunk(choices: list[Any], **more: Any) -> str:
            return responses.event(header.of("text_completion") | {"choices": choices} | more)

        sent = [0] * len(jobs)
        for index, text in enumerate(echoes):
            if text:
                yield chunk([responses.completion_choice(index, Piece(text), token_bytes)])
        async for index, piece in _chain(first, pieces):
            if piece.text or piece.finish or piece.tokens:
                offset = sent[index]
                sent[index] += len(piece.text)
                yield chunk([responses.completion_choice(index, piece, token_bytes, offset)])
        if body.streams_usage:
            yield chunk([], usage=_usage(jobs, body.n))

    if body.stream:
        return await _stream(request, model, jobs, pieces, events)
    answers = await _complete(request, jobs, pieces)
    answers = [
        replace(answer, text=text + answer.text)
        for answer, text in zip(answers, echoes, strict=True)
    ]
    record = responses.completion(header, answers, token_bytes)
    return _json(request, record | {"usage": _usage(jobs, body.n)}, model, jobs)


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
        model, [prompt], sampling=sampling, count=1, limit=limit, ends=settings.ends, param=param
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
    note(request.scope, model=model.name, prompt=len(jobs[0].prompt), tokens=generated)
    return JSONResponse(record, headers={"X-Model-Version": model.version})


def _usage(jobs: Sequence[Job], count: int) -> dict[str, int]:
    """Token counts; a prompt that `count` jobs share counts once."""
    prompt = sum(len(job.prompt) for job in jobs[::count])
    return responses.usage(prompt, sum(len(job.tokens) for job in jobs))


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
    note(request.scope, model=model.name, prompt=len(jobs[0].prompt))

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
