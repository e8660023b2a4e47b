"""The routes that generate: OpenAI's chat and completions, and the quick start's `/chat`.

Each reads its request, makes jobs of it, and tells their pieces: all at once, or as they come.
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

from tuning.serve import replies, schema
from tuning.serve.adapters import Model
from tuning.serve.engine import Job, Piece
from tuning.serve.guard import note
from tuning.serve.replies import Answer, Heading
from tuning.serve.sampling import Sampling
from tuning.serve.schema import Refusal
from tuning.serve.service import Service

T = TypeVar("T")
Pieces = AsyncGenerator[tuple[int, Piece], None]


class Gone(Exception):
    """The client went away."""


def _sampling(service: Service, asked: schema.Generation) -> Sampling:
    """The model's own way, changed by what the request says."""
    usual = service.there().defaults

    def either(value: Any, other: Any) -> Any:
        return other if value is None else value

    return replace(
        usual,
        temperature=either(asked.temperature, usual.temperature),
        top_p=either(asked.top_p, usual.top_p),
        top_k=max(0, either(asked.top_k, usual.top_k)),
        repetition_penalty=either(asked.repetition_penalty, usual.repetition_penalty),
        min_p=asked.min_p,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        min_tokens=asked.min_tokens,
        seed=asked.seed,
    )


def _heading(prefix: str, model: Model) -> Heading:
    fingerprint = hashlib.sha256(model.version.encode()).hexdigest()[:12]
    number = f"{prefix}-{secrets.token_hex(12)}"
    return Heading(number, int(time.time()), model.name, f"fp_{fingerprint}")


def _headers(model: Model) -> dict[str, str]:
    return {"X-Model-Version": model.version}


async def chat(service: Service, request: Request) -> Response:
    """`POST /v1/chat/completions`."""
    asked = schema.read(schema.ChatRequest, await request.body())
    model = service.choose(asked.model)
    prompt = await service.conversation(model, [message.turn for message in asked.messages])
    jobs = service.jobs(
        model,
        [prompt],
        sampling=_sampling(service, asked),
        count=asked.n,
        limit=asked.max_completion_tokens or asked.max_tokens,
        stops=asked.stops,
        top=asked.top,
    )
    heading, say = _heading("chatcmpl", model), service.voice(model).token
    pieces = service.answers(model, jobs)

    async def events(first: tuple[int, Piece]) -> AsyncGenerator[str, None]:
        def chunk(index: int, delta: dict[str, Any], piece: Piece | None = None) -> str:
            choices, finish = (piece.choices, piece.finish) if piece else ((), None)
            return replies.event(
                replies.chat_chunk(heading, index, delta, choices=choices, finish=finish, say=say)
            )

        for index in range(asked.n):
            yield chunk(index, {"role": "assistant", "content": ""})
        async for index, piece in _after(first, pieces):
            delta = {"content": piece.text} if piece.text or not piece.finish else {}
            if delta.get("content") or piece.finish or piece.choices:
                yield chunk(index, delta, piece)
        if asked.usage_wanted:
            record = heading.of("chat.completion.chunk") | {"choices": []}
            yield replies.event(record | {"usage": _usage(jobs, 1)})

    if asked.stream:
        return await _stream(request, model, jobs, pieces, events)
    answers = await _whole(request, jobs, pieces)
    record = replies.chat(heading, answers, say) | {"usage": _usage(jobs, 1)}
    return _reply(request, record, model, jobs)


async def completions(service: Service, request: Request) -> Response:
    """`POST /v1/completions`."""
    asked = schema.read(schema.CompletionRequest, await request.body())
    if asked.echo and asked.logprobs is not None:
        raise Refusal(400, "logprobs of the prompt (echo) are not told", param="echo")
    model = service.choose(asked.model)
    prompts = [await service.prompt(model, prompt) for prompt in asked.prompts]
    jobs = service.jobs(
        model,
        prompts,
        sampling=_sampling(service, asked),
        count=asked.n,
        limit=asked.max_tokens or min(16, service.limits.tokens),
        stops=asked.stops,
        top=asked.logprobs,
        param="prompt",
    )
    voice = service.voice(model)
    heading, say = _heading("cmpl", model), voice.token
    pieces = service.answers(model, jobs)
    echoes = [voice.decode(job.prompt) if asked.echo else "" for job in jobs]

    async def events(first: tuple[int, Piece]) -> AsyncGenerator[str, None]:
        sent = [0] * len(jobs)
        for index, text in enumerate(echoes):
            if text:
                choice = replies.completion_choice(index, text, (), None, say)
                yield replies.event(heading.of("text_completion") | {"choices": [choice]})
        async for index, piece in _after(first, pieces):
            if piece.text or piece.finish or piece.choices:
                choice = replies.completion_choice(
                    index, piece.text, piece.choices, piece.finish, say, sent[index]
                )
                sent[index] += len(piece.text)
                yield replies.event(heading.of("text_completion") | {"choices": [choice]})
        if asked.usage_wanted:
            record = heading.of("text_completion") | {"choices": []}
            yield replies.event(record | {"usage": _usage(jobs, asked.n)})

    if asked.stream:
        return await _stream(request, model, jobs, pieces, events)
    answers = await _whole(request, jobs, pieces)
    for answer, text in zip(answers, echoes, strict=True):
        answer.text = text + answer.text
    record = replies.completion(heading, answers, say, [0] * len(jobs))
    return _reply(request, record | {"usage": _usage(jobs, asked.n)}, model, jobs)


async def quick(service: Service, request: Request) -> Response:
    """`POST /chat`."""
    asked = schema.read(schema.QuickRequest, await request.body())
    model = service.choose(asked.model)
    turns = [message.turn for message in asked.messages or ()]
    if asked.prompt is None and not turns:
        raise Refusal(400, "Text generation parameter prompt required", param="prompt")
    if turns and (asked.prompt is not None or asked.prefix):
        what = "prompt or messages: one of them is answered"
        raise Refusal(400, what, param="prompt" if asked.prompt is not None else "prefix")
    text = f"{asked.prefix or ''}{asked.prompt or ''}"
    voice = service.voice(model)
    if turns or voice.chats:
        prompt = await service.conversation(model, turns or [{"role": "user", "content": text}])
    else:
        prompt = await service.prompt(model, text)
    param, how = "messages" if turns else "prompt", asked.generate_kwargs
    limit = how.max_new_tokens
    if limit is None and how.max_length is not None:
        limit = how.max_length - len(prompt)
        if limit < 1:
            what = f"the prompt has {len(prompt)} tokens; max_length counts them, too"
            raise Refusal(400, what, param="generate_kwargs")
    sampling = Sampling(
        temperature=how.temperature if how.do_sample else 0.0,
        top_p=how.top_p,
        top_k=how.top_k,
        typical_p=how.typical_p,
        repetition_penalty=how.repetition_penalty,
        min_tokens=max(0, how.min_length - len(prompt)),
        seed=how.seed,
    )
    jobs = service.jobs(
        model, [prompt], sampling=sampling, count=1, limit=limit, ends=how.ends, param=param
    )
    (answer,) = await _whole(request, jobs, service.answers(model, jobs))
    result = answer.text.strip()
    if asked.return_full_text and not turns:
        result = f"{text}{answer.text}" if not voice.chats else f"{text}\n{result}"
    return _reply(request, {"Result": result}, model, jobs)


def _reply(request: Request, record: dict[str, Any], model: Model, jobs: Sequence[Job]) -> Response:
    generated = sum(len(job.tokens) for job in jobs)
    note(request.scope, model=model.name, prompt=len(jobs[0].prompt), tokens=generated)
    return JSONResponse(record, headers=_headers(model))


def _usage(jobs: Sequence[Job], count: int) -> dict[str, int]:
    """`count`: how many jobs share a prompt, which was read once."""
    prompt = sum(len(job.prompt) for job in jobs[::count])
    return replies.usage(prompt, sum(len(job.tokens) for job in jobs))


async def _whole(request: Request, jobs: Sequence[Job], pieces: Pieces) -> list[Answer]:
    """The answers of all jobs, complete. Raises Gone if the client does not wait for them."""
    answers = [Answer() for _ in jobs]

    async def collect() -> None:
        async for index, piece in pieces:
            answers[index].text += piece.text
            answers[index].choices += piece.choices
            answers[index].finish = piece.finish

    await _unless_gone(request, collect())
    return answers


async def _stream(
    request: Request,
    model: Model,
    jobs: Sequence[Job],
    pieces: Pieces,
    events: Callable[[tuple[int, Piece]], AsyncGenerator[str, None]],
) -> Response:
    """A stream that begins when there is something to say, so that a refusal has its status."""
    first = await _unless_gone(request, anext(pieces))
    note(request.scope, model=model.name, prompt=len(jobs[0].prompt))

    async def body() -> AsyncGenerator[str, None]:
        async with contextlib.aclosing(events(first)) as told:
            try:
                async for event in told:
                    yield event
            except Refusal as refusal:
                yield replies.event(replies.error(refusal))
        note(request.scope, tokens=sum(len(job.tokens) for job in jobs))
        yield replies.DONE

    return StreamingResponse(body(), media_type="text/event-stream", headers=_headers(model))


async def _after(first: tuple[int, Piece], pieces: Pieces) -> Pieces:
    yield first
    async with contextlib.aclosing(pieces) as rest:
        async for one in rest:
            yield one


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives, unless the client goes away meanwhile: then it is cancelled."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
