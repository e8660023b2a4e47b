"""What a server is, between its start and its end: phase, models, engine, and the jobs of requests.

loading -> ready -> draining
        -> failed
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from tuning.serve.adapters import Model, Refused
from tuning.serve.engine import Busy, Engine, Job, Piece
from tuning.serve.metrics import Metrics
from tuning.serve.options import Limits
from tuning.serve.rendering import Message, NotRendered, Renderer
from tuning.serve.sampling import Chooser, Sampling
from tuning.serve.schema import MOST_CHOICES, Refusal
from tuning.serve.text import Writer
from tuning.serve.voice import Voice

Words = TypeVar("Words")
Phase = Literal["loading", "ready", "draining", "failed"]
BODY_PER_TOKEN, LEAST_BODY = 16, 1 << 17  # bytes: escaped text with its JSON around it


@dataclass(frozen=True)
class Loaded:
    """What is there once the model is loaded."""

    engine: Engine
    models: dict[str, Model]
    refused: tuple[Refused, ...]
    voices: dict[str | None, Voice]  # by chat template; None: the base's own
    renderer: Renderer  # of all but the base's own
    defaults: Sampling  # of the model's generation config
    context: int
    vocab: int  # tokens that the model knows


@dataclass
class Service:
    """The state of one server."""

    base: str  # name of the base model
    default: str  # the model that answers where none is named
    limits: Limits
    phase: Phase = "loading"
    loaded: Loaded | None = None
    started: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.metrics = Metrics(
            running=lambda: self.loaded.engine.running if self.loaded else 0,
            waiting=lambda: self.loaded.engine.waiting if self.loaded else 0,
        )
        # one thread: tokenizers are not made to be used by several
        self._words = ThreadPoolExecutor(1, thread_name_prefix="words")
        self._strangers = ThreadPoolExecutor(1, thread_name_prefix="templates")

    @property
    def ready(self) -> bool:
        """Whether requests should be sent here."""
        return self.phase == "ready" and self.healthy

    @property
    def healthy(self) -> bool:
        """False if only a restart can help."""
        return self.phase != "failed" and (self.loaded is None or self.loaded.engine.healthy)

    @property
    def largest(self) -> int:
        """Bytes that the body of a request may have."""
        return max(LEAST_BODY, BODY_PER_TOKEN * self.loaded.context) if self.loaded else LEAST_BODY

    def there(self) -> Loaded:
        """What is loaded. Raises Refusal before that."""
        if self.loaded is None:
            raise Refusal(503, "the model is still being loaded", code="loading")
        return self.loaded

    def choose(self, name: str | None) -> Model:
        """The model of this name. Raises Refusal."""
        loaded, wanted = self.there(), self.default if name is None else name
        if wanted in loaded.models:
            return loaded.models[wanted]
        missing = [one.name for one in loaded.refused]
        if wanted in missing or (missing and wanted == self.default):
            what = f"{wanted} is not served: adapter {', '.join(missing)} was refused at start-up"
            raise Refusal(404, f"{what}, see /readyz", param="model", code="model_refused")
        known = ", ".join(loaded.models)
        what = f"there is no model of that name; there are {known}"
        raise Refusal(404, what, param="model", code="model_not_found")

    def voice(self, model: Model) -> Voice:
        """How `model` is spoken to."""
        return self.there().voices[model.template]

    async def conversation(self, model: Model, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation. Raises Refusal."""
        try:
            voice, loop = self.voice(model), asyncio.get_running_loop()
            thread = self._strangers if voice.apart else self._words
            text = await loop.run_in_executor(thread, voice.shown, list(messages))
        except NotRendered as error:
            raise Refusal(400, str(error), param="messages") from None
        found = await self._off(voice.conversation, text)
        return self._known(found, "messages")

    async def prompt(self, model: Model, prompt: str | list[int]) -> list[int]:
        """The tokens of a plain prompt, given as text or as tokens. Raises Refusal."""
        if isinstance(prompt, str):
            prompt = await self._off(self.voice(model).plain, prompt)
        return self._known(prompt, "prompt")

    def _known(self, ids: list[int], param: str) -> list[int]:
        """`ids`, if the model has them: a tokenizer may know more words. Raises Refusal."""
        vocab = self.there().vocab
        if ids and max(ids) >= vocab:
            what = f"token {max(ids)} is none of the model's, which go up to {vocab - 1}"
            raise Refusal(400, what, param=param)
        return ids

    async def _off(self, work: Callable[[Words], list[int]], words: Words) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._words, work, words)

    def jobs(
        self,
        model: Model,
        prompts: Sequence[list[int]],
        *,
        sampling: Sampling,
        count: int,
        limit: int | None,
        stops: Sequence[str] = (),
        top: int | None = None,
        ends: frozenset[int] | None = None,
        param: str = "messages",
    ) -> list[Job]:
        """`count` jobs for each prompt, which the request has as `param`. Raises Refusal for too
        much, and if too many wait."""
        loaded, voice = self.there(), self.voice(model)
        if not self.healthy:
            raise Refusal(503, "this server has to be restarted", code="unhealthy")
        if count * len(prompts) > MOST_CHOICES:
            raise Refusal(400, f"a request gets {MOST_CHOICES} answers at most", param="n")
        if limit is not None and limit > self.limits.tokens:
            what = f"an answer may have {self.limits.tokens} tokens"
            raise Refusal(400, what, param="max_tokens")
        found = []
        for number, prompt in enumerate(p for p in prompts for _ in range(count)):
            left = loaded.context - len(prompt)
            if not prompt:
                raise Refusal(400, "the prompt is empty", param=param)
            if left < 1 or (limit is not None and limit > left):
                what = f"the prompt has {len(prompt)} tokens; with the answer {loaded.context} fit"
                raise Refusal(400, what, param=param, code="context_length_exceeded")
            own = sampling
            if sampling.seed is not None and number:  # n answers to one seed should differ
                own = replace(sampling, seed=sampling.seed + number)
            job = Job(
                prompt=prompt,
                limit=limit or min(self.limits.usual, self.limits.tokens, left),
                weights=model.weights,
                ends=ends or voice.ends,
                chooser=Chooser(own, prompt, ends or voice.ends),
                writer=Writer(voice.decode, stops),
                top=top,
            )
            found.append(job)
        try:
            loaded.engine.check(len(found))
        except Busy:
            raise Refusal(429, "too many requests wait already", code="queue_full") from None
        return found

    async def answers(
        self, model: Model, jobs: Sequence[Job]
    ) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces of all jobs as they come, each with the number of its job.

        Ends when all have. Past the time limit an answer ends as it is, with finish `length`.
        Whoever stops asking cancels the jobs. Raises Refusal if generation fails, or if time was up
        before it began.
        """
        engine, start = self.there().engine, time.monotonic()
        pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()

        async def follow(number: int, job: Job) -> None:
            async for piece in engine.answer(job):
                pieces.put_nowait((number, piece))

        tasks = [asyncio.create_task(follow(i, job)) for i, job in enumerate(jobs)]
        open_ones, first = set(range(len(jobs))), True
        try:
            while open_ones:
                left = start + self.limits.seconds - time.monotonic()
                try:
                    number, piece = await asyncio.wait_for(pieces.get(), max(left, 0))
                except TimeoutError:
                    if first:
                        raise Refusal(503, "there was no room in time", code="timeout") from None
                    for number in sorted(open_ones):
                        yield number, Piece(jobs[number].writer.end(), (), "length")
                    return
                if piece.finish == "error":
                    raise Refusal(500, "generating the answer failed", code="failed")
                if first:
                    self.metrics.first.labels(model.name).observe(time.monotonic() - start)
                    first = False
                if piece.finish:
                    open_ones.discard(number)
                yield number, piece
            self.metrics.whole.labels(model.name).observe(time.monotonic() - start)
        finally:
            for task in tasks:
                task.cancel()
            if open_ones:
                self.metrics.cancelled.inc()
            generated = sum(len(job.tokens) for job in jobs)
            read = sum(len(job.prompt) for job in jobs)
            self.metrics.tokens.labels(model.name, "prompt").inc(read)
            self.metrics.tokens.labels(model.name, "completion").inc(generated)
