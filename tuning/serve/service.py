"""The state of a server: its phase, models and engine, and the jobs of requests.

loading -> ready -> draining
        -> failed
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from tuning.data.turn_ends import Ends
from tuning.serve import new_tokens
from tuning.serve.adapters import RejectedAdapter, ServedModel
from tuning.serve.detokenizer import Detokenizer
from tuning.serve.engine import Busy, Engine, Job, Piece, prompt_tokens
from tuning.serve.metrics import Metrics
from tuning.serve.new_tokens import Tokens
from tuning.serve.options import Limits
from tuning.serve.rendering import Message, NotRendered, Renderer
from tuning.serve.responses import Echo
from tuning.serve.sampling import Sampler, Sampling
from tuning.serve.schema import MAX_CHOICES, ApiError
from tuning.serve.tokenizer import ChatTokenizer

Argument = TypeVar("Argument")
Result = TypeVar("Result")
Phase = Literal["loading", "ready", "draining", "failed"]
BODY_PER_TOKEN, MIN_BODY = 16, 1 << 17  # bytes of escaped text with the JSON around it


@dataclass(frozen=True)
class Loaded:
    """The loaded models and the engine that runs them."""

    engine: Engine
    models: dict[str, ServedModel]
    rejected: tuple[RejectedAdapter, ...]
    # by chat template and new tokens; None: the base's own, none
    tokenizers: dict[tuple[str | None, Tokens | None], ChatTokenizer]
    renderers: tuple[Renderer, ...]
    defaults: Sampling  # of the model's generation config
    context: int
    vocab: int  # size of the base's vocabulary
    tokens: tuple[Tokens, ...] = ()  # of all adapters


@dataclass
class Service:
    """The state of one server."""

    base: str  # name of the base model
    default: str  # the model of requests that name none
    limits: Limits
    phase: Phase = "loading"
    loaded: Loaded | None = None
    started: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.metrics = Metrics(
            running=lambda: self.loaded.engine.running if self.loaded else 0,
            waiting=lambda: self.loaded.engine.waiting if self.loaded else 0,
        )
        # one thread: tokenizers are not thread-safe
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizing")
        # adapters' templates may be slow, and must not delay requests for the base
        self._adapter_rendering = ThreadPoolExecutor(1, thread_name_prefix="rendering")

    @property
    def ready(self) -> bool:
        """Whether the server takes requests."""
        return self.phase == "ready" and self.healthy

    @property
    def healthy(self) -> bool:
        """False if only a restart can help."""
        return self.phase != "failed" and (self.loaded is None or self.loaded.engine.healthy)

    @property
    def max_body_bytes(self) -> int:
        """The limit of a request body."""
        return max(MIN_BODY, BODY_PER_TOKEN * self.loaded.context) if self.loaded else MIN_BODY

    def require_loaded(self) -> Loaded:
        """The loaded models. Raises ApiError while loading."""
        if self.loaded is None:
            raise ApiError(503, "the model is still being loaded", code="loading")
        return self.loaded

    def find_model(self, name: str | None) -> ServedModel:
        """The model of this name; None means the default. Raises ApiError."""
        loaded, name = self.require_loaded(), self.default if name is None else name
        if name in loaded.models:
            return loaded.models[name]
        rejected = [adapter.name for adapter in loaded.rejected]
        if name in rejected or (rejected and name == self.default):
            what = f"{name} is not served: adapter {', '.join(rejected)} was refused at start-up"
            raise ApiError(404, f"{what}, see /readyz", param="model", code="model_refused")
        what = f"there is no model of that name; there are {', '.join(loaded.models)}"
        raise ApiError(404, what, param="model", code="model_not_found")

    def tokenizer(self, model: ServedModel) -> ChatTokenizer:
        """The tokenizer with the chat template of `model`."""
        return self.require_loaded().tokenizers[model.template, model.tokens]

    async def encode_chat(self, model: ServedModel, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation. Raises ApiError."""
        tokenizer = self.tokenizer(model)
        thread = self._adapter_rendering if tokenizer.from_adapter else self._tokenizing
        try:
            text = await _on(thread, tokenizer.render, list(messages))
        except NotRendered as error:
            raise ApiError(400, str(error), param="messages") from None
        ids = await _on(self._tokenizing, tokenizer.encode_chat, text)
        return self._in_vocabulary(model, ids, "messages")

    async def encode_prompt(self, model: ServedModel, prompt: str | list[int]) -> list[int]:
        """The tokens of a plain prompt, given as text or as tokens. Raises ApiError."""
        if isinstance(prompt, str):
            prompt = await _on(self._tokenizing, self.tokenizer(model).encode_prompt, prompt)
        elif model.tokens:
            prompt = model.tokens.here(prompt)
        return self._in_vocabulary(model, prompt, "prompt")

    async def echo(self, model: ServedModel, prompt: str | list[int]) -> Echo:
        """A prompt as a completion repeats it."""
        if model.tokens and not isinstance(prompt, str):
            prompt = model.tokens.here(prompt)
        return await _on(self._tokenizing, self.tokenizer(model).echo, prompt)

    def _in_vocabulary(self, model: ServedModel, ids: list[int], param: str) -> list[int]:
        """`ids`, checked: a tokenizer may have more tokens than the model. Raises ApiError."""
        vocab, own = self.require_loaded().vocab, model.tokens
        wrong = [id for id in ids if id >= vocab and not (own and own.first <= id < own.after)]
        if wrong:
            what = f"token {max(wrong)} is not in the vocabulary, which ends at {vocab - 1}"
            raise ApiError(400, what, param=param)
        return ids

    def jobs(
        self,
        model: ServedModel,
        prompts: Sequence[list[int]],
        *,
        sampling: Sampling,
        count: int,
        limit: int | None,
        stops: Sequence[str] = (),
        top_logprobs: int | None = None,
        scores_prompt: bool = False,
        ends: Ends | None = None,
        param: str = "messages",
        limit_param: str = "max_tokens",
    ) -> list[Job]:
        """`count` jobs for each prompt, which the request calls `param`.

        Raises ApiError above a limit, and when the queue is full.
        """
        loaded, tokenizer = self.require_loaded(), self.tokenizer(model)
        ends = tokenizer.ends if ends is None else ends
        if not self.healthy:
            raise ApiError(503, "this server has to be restarted", code="unhealthy")
        most = min(MAX_CHOICES, loaded.engine.capacity)
        if count * len(prompts) > most:
            what = f"a request may have {most} answers, its prompts times n"
            raise ApiError(400, what, param="n" if count > 1 else param)
        if limit is not None and limit > self.limits.tokens:
            what = f"an answer may have {self.limits.tokens:,} tokens here, not {limit:,}"
            raise ApiError(400, f"{limit_param}: {what}", param=limit_param)
        hidden = new_tokens.hidden(model.tokens, loaded.tokens)
        jobs, default = [], min(self.limits.default_tokens, self.limits.tokens)
        for number, (prompt, choice) in enumerate(itertools.product(prompts, range(count))):
            left = self._left(len(prompt), limit, param, limit_param)
            own = sampling
            if sampling.seed is not None and number:  # n answers to one seed should differ
                own = replace(sampling, seed=sampling.seed + number)
            job = Job(
                prompt=prompt,
                limit=min(default, left) if limit is None else limit,
                weights=model.weights,
                ends=ends.ids,
                answer_ends=ends if ends.inner else None,
                sampler=Sampler(own, prompt, ends.ids),
                detokenizer=Detokenizer(tokenizer.decode, stops),
                top_logprobs=top_logprobs,
                choice=choice,
                scores=[] if scores_prompt else None,
                hidden=hidden,
            )
            jobs.append(job)
        try:
            loaded.engine.check(len(jobs))
        except Busy:
            raise ApiError(429, "the queue is full", code="queue_full") from None
        return jobs

    def _left(self, prompt: int, limit: int | None, param: str, limit_param: str) -> int:
        """Tokens that the context leaves for the answer to a prompt of so many. Raises ApiError."""
        context = self.require_loaded().context
        left, code = context - prompt, "context_length_exceeded"
        if not prompt:
            raise ApiError(400, "the prompt is empty", param=param)
        if left < (1 if limit is None else min(limit, 1)):
            what = f"the prompt has {prompt} tokens; with the answer {context} fit"
            raise ApiError(400, what, param=param, code=code)
        if limit is not None and limit > left:
            what = f"{limit:,} tokens do not fit: the context has {context:,} and the prompt"
            what = f"{limit_param}: {what} {prompt:,}, which leaves {left:,}"
            raise ApiError(400, what, param=limit_param, code=code)
        return left

    async def answers(
        self, model: ServedModel, jobs: Sequence[Job]
    ) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces of all jobs as they come, each with the index of its job.

        At the time limit an answer ends as it is, with finish `length`. Closing the generator
        cancels the jobs. Raises ApiError if generation fails, or does not begin in time.
        """
        engine, start = self.require_loaded().engine, time.monotonic()
        pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()

        async def follow(number: int, job: Job) -> None:
            async for piece in engine.answer(job):
                pieces.put_nowait((number, piece))

        tasks = [asyncio.create_task(follow(i, job)) for i, job in enumerate(jobs)]
        unfinished, first = set(range(len(jobs))), True
        try:
            while unfinished:
                left = start + self.limits.seconds - time.monotonic()
                try:
                    number, piece = await asyncio.wait_for(pieces.get(), max(left, 0))
                except TimeoutError:
                    if first or any(jobs[number].unscored for number in unfinished):
                        raise ApiError(503, "timed out in the queue", code="timeout") from None
                    for number in sorted(unfinished):
                        yield number, Piece(jobs[number].detokenizer.end(), (), "length")
                    return
                if piece.finish == "error":
                    raise ApiError(500, "generating the answer failed", code="failed")
                if first:
                    self.metrics.first.labels(model.name).observe(time.monotonic() - start)
                    first = False
                if piece.finish:
                    unfinished.discard(number)
                yield number, piece
            self.metrics.whole.labels(model.name).observe(time.monotonic() - start)
        finally:
            for task in tasks:
                task.cancel()
            if unfinished:
                self.metrics.cancelled.inc()
            counts = {"prompt": prompt_tokens(jobs), "completion": sum(len(j.tokens) for j in jobs)}
            for kind, count in counts.items():
                self.metrics.tokens.labels(model.name, kind).inc(count)


async def _on(
    thread: ThreadPoolExecutor, work: Callable[[Argument], Result], argument: Argument
) -> Result:
    return await asyncio.get_running_loop().run_in_executor(thread, work, argument)
