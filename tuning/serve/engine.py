"""Schedules jobs on a runner: admits, samples, finishes, and retries after a failed forward pass.

The event loop owns the queues; the runner's thread makes forward passes and calls `_step`, which
samples a token for each job and hands the pieces to the loop. A job is admitted when the cache has
room for its whole prompt and its longest answer, so that nothing is ever evicted.

A forward pass that fails (out of memory, for example) ends the runner and loses the cache, but not
the jobs: a new runner runs each of them alone for one token, with what it has generated already,
before they continue together. The job that breaks the new runner again ends with an error. A probe
job runs after it, to tell a bad request from a broken machine.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from tuning.data.turn_ends import Ends
from tuning.plan.inference import PAGE, Room
from tuning.serve.detokenizer import Detokenizer
from tuning.serve.runner import Runner, Step
from tuning.serve.sampling import SampledToken, Sampler, Sampling, all_with_logprobs, with_logprobs

logger = logging.getLogger(__name__)

CHECK_SECONDS = 0.1  # between two checks of the runner
MAX_FAILURES = 3  # runners in a row that failed without a token: the machine is at fault
MAX_SUSPECTED = 2  # failures during a job, after which it runs alone to its end
STUCK_SECONDS = 300.0  # without a forward pass while jobs wait for one

_NUMBERS = itertools.count()

Finish = Literal["stop", "length", "error"]


class Busy(Exception):
    """The queue is full."""


@dataclass(frozen=True)
class Piece:
    """What a forward pass added to an answer, or all of the answer."""

    text: str
    tokens: tuple[SampledToken, ...] = ()
    finish: Finish | None = None
    end: tuple[SampledToken, ...] = ()  # the token that ends the answer and is not in its text

    @classmethod
    def join(cls, pieces: Sequence[Piece]) -> Piece:
        """The complete answer."""
        tokens = itertools.chain.from_iterable(piece.tokens for piece in pieces)
        text, last = "".join(piece.text for piece in pieces), pieces[-1]
        return cls(text, tuple(tokens), last.finish, last.end)


def _new_id() -> str:
    return f"job-{next(_NUMBERS)}"


@dataclass(eq=False)
class Job:
    """One answer to be generated."""

    prompt: list[int]
    limit: int  # tokens that may be generated; 0: only the prompt is read
    weights: tuple[float, ...]  # of each adapter
    ends: frozenset[int]  # tokens that end an answer
    sampler: Sampler
    detokenizer: Detokenizer
    answer_ends: Ends | None = None  # where some of `ends` do not always end an answer
    top_logprobs: int | None = None  # most likely tokens to report; None: no log-probabilities
    choice: int = 0  # which of the answers to its prompt
    scores: list[SampledToken] | None = None  # of the prompt from its second token; None: unwanted
    hidden: tuple[slice, ...] = ()  # tokens that its model does not have
    id: str = field(default_factory=_new_id)
    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None
    pieces: asyncio.Queue[Piece] = field(default_factory=asyncio.Queue)
    is_alone: bool = False  # runs alone, because it may have broken a runner
    failures: int = 0  # runners that failed while it ran
    is_cleared: bool = False  # generated a token alone, and waits to continue with others

    @property
    def ids(self) -> list[int]:
        """The prompt and what has been generated."""
        return self.prompt + self.tokens

    @property
    def left(self) -> int:
        """How many tokens may still be generated."""
        return self.limit - len(self.tokens)

    @property
    def cache_tokens(self) -> int:
        """Tokens of the cache that it may need, in whole pages."""
        return (-(-(len(self.prompt) + self.limit) // PAGE) + 1) * PAGE

    @property
    def unscored(self) -> int:
        """Tokens of the prompt whose log-probabilities are wanted and not known yet."""
        return 0 if self.scores is None else len(self.prompt) - 1 - len(self.scores)

    def score(self, logits: torch.Tensor) -> None:
        """Take the `logits` [tokens, vocabulary] in float32 of the next unscored tokens."""
        assert self.scores is not None
        self.hide(logits)
        first = len(self.scores) + 1
        tokens = self.prompt[first : first + len(logits)]
        self.scores += all_with_logprobs(logits, tokens, self.top_logprobs or 0)

    def hide(self, logits: torch.Tensor) -> None:
        """Make the tokens that its model does not have impossible in `logits` [..., vocabulary]."""
        for part in self.hidden:
            logits[..., part] = -torch.inf

    def take(self, token: int, sampled: SampledToken) -> Piece:
        """The piece that `token` adds. Sets `finish` at the end."""
        if not self.limit:
            self.finish = "length"
            return Piece("", (), "length")
        self.tokens.append(token)
        if token in self.ends and (not self.answer_ends or self.answer_ends.reached(self.tokens)):
            self.finish = "stop"
            return Piece(self.detokenizer.end(), (), "stop", (sampled,))
        text = self.detokenizer.add(token)
        if self.detokenizer.stopped:
            self.finish = "stop"
        elif not self.left:
            self.finish = "length"
            text += self.detokenizer.end()
        return Piece(text, (sampled,), self.finish)


def prompt_tokens(jobs: Iterable[Job]) -> int:
    """Tokens of the prompts of `jobs`; a prompt with several answers counts once."""
    return sum(len(job.prompt) for job in jobs if not job.choice)


class Engine:
    """Answers jobs. All methods but `_step` run on the event loop."""

    def __init__(self, make: Callable[[Step], Runner], room: Room, *, max_waiting: int) -> None:
        self._make, self._room, self._max_waiting = make, room, max_waiting
        self._waiting: deque[Job] = deque()
        self._suspects: deque[Job] = deque()
        self._cleared: deque[Job] = deque()
        self._running: dict[str, Job] = {}
        self._reserved = 0  # tokens of the cache
        self._failures = 0  # runners that failed since the last token
        self._last_pass = time.monotonic()
        self._runner: Runner | None = None
        self._monitor: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Make the runner; the engine belongs to the event loop that calls this."""
        self._loop = asyncio.get_running_loop()
        self._runner = await asyncio.to_thread(self._make, self._step)
        self._monitor = asyncio.create_task(self._replace_failed_runners())

    async def close(self) -> None:
        """End the runner. Open streams are dropped."""
        if self._monitor is not None:
            self._monitor.cancel()
        if self._runner is not None:
            await asyncio.to_thread(self._runner.close)

    @property
    def running(self) -> int:
        """Jobs in the cache."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Jobs in the queues."""
        return sum(map(len, self._queues))

    @property
    def _queues(self) -> tuple[deque[Job], ...]:
        """The queues in the order of admission."""
        return self._suspects, self._cleared, self._waiting

    @property
    def healthy(self) -> bool:
        """False if only a restart of the process can help."""
        stuck = self._running and time.monotonic() - self._last_pass > STUCK_SECONDS
        monitored = self._monitor is None or not self._monitor.done()
        return monitored and self._failures < MAX_FAILURES and not stuck

    @property
    def capacity(self) -> int:
        """Jobs that may run and wait at once."""
        return self._max_waiting + self._room.requests

    def check(self, count: int) -> None:
        """Raise Busy if the queue has no room for `count` more jobs."""
        idle = max(0, self._room.requests - len(self._running))
        if self.waiting + count > self._max_waiting + idle:
            raise Busy

    async def answer(self, job: Job) -> AsyncIterator[Piece]:
        """The pieces of the answer as they come; the last has a `finish`.

        Closing the iterator cancels the job.
        """
        self._waiting.append(job)
        self._admit()
        try:
            while True:
                piece = await job.pieces.get()
                yield piece
                if piece.finish:
                    return
        finally:
            self._forget(job)

    def _admit(self) -> None:
        while self._runner is not None and self._runner.alive:
            queue = next((queue for queue in self._queues if queue), None)
            if queue is None or len(self._running) >= self._room.requests:
                return
            alone = queue is self._suspects or any(job.is_alone for job in self._running.values())
            full = self._reserved + queue[0].cache_tokens > self._room.cache_tokens
            if self._running and (alone or full):
                return
            job = queue.popleft()
            job.is_alone = queue is self._suspects
            if not self._running:
                self._last_pass = time.monotonic()
            self._running[job.id] = job
            self._reserved += job.cache_tokens
            self._runner.add(job)

    def _forget(self, job: Job) -> None:
        """Remove a finished or cancelled job."""
        job.finish = job.finish or "stop"  # so that the runner's thread skips it
        if self._running.pop(job.id, None):
            self._reserved -= job.cache_tokens
            if self._runner is not None:
                self._runner.drop(job)
        for queue in self._queues:
            if job in queue:
                queue.remove(job)
        self._admit()

    def _step(self, jobs: Sequence[Job], logits: torch.Tensor) -> list[int]:
        """The next token of each job; called on the runner's thread."""
        for job, row in zip(jobs, logits, strict=True):
            job.hide(row)
        argmax = logits.argmax(-1).tolist() if jobs else []
        pieces = []
        for job, row, likeliest in zip(jobs, logits, argmax, strict=True):
            if job.finish:
                continue  # cancelled meanwhile
            try:
                token = job.sampler.sample(row, likeliest)
                piece = job.take(token, with_logprobs(row, token, job.top_logprobs))
            except Exception:
                logger.exception("a request failed")
                job.finish = "error"
                piece = Piece("", (), "error")
            pieces.append((job, piece))
            job.is_cleared = job.is_alone and job.failures < MAX_SUSPECTED and not job.finish
            if (job.finish or job.is_cleared) and self._runner is not None:
                self._runner.drop(job)
        self._last_pass = time.monotonic()
        if not jobs:
            return []
        self._failures = 0
        self._loop.call_soon_threadsafe(self._deliver, pieces)
        return [job.tokens[-1] if job.tokens else 0 for job in jobs]

    def _deliver(self, pieces: Iterable[tuple[Job, Piece]]) -> None:
        for job, piece in pieces:
            job.pieces.put_nowait(piece)
            if piece.finish:
                self._forget(job)
            elif job.is_cleared and job.id in self._running:
                del self._running[job.id]
                self._reserved -= job.cache_tokens
                job.id, job.is_alone, job.is_cleared = _new_id(), False, False  # new to the runner
                self._cleared.append(job)
                self._admit()

    async def _replace_failed_runners(self) -> None:
        while self._failures < MAX_FAILURES:
            await asyncio.sleep(CHECK_SECONDS)
            if self._runner is None or not self._runner.alive:
                await self._replace_runner()
        logger.error("forward passes keep failing: this process cannot answer any more")
        _fail([*self._running.values(), *itertools.chain(*self._queues)])

    async def _replace_runner(self) -> None:
        self._failures += 1
        lost, failed = list(self._running.values()), self._runner
        self._running.clear()
        self._reserved, self._runner = 0, None
        for job in lost:
            job.failures += 1
            if job.unscored:
                job.scores = []
        _fail(job for job in lost if job.is_alone)
        self._suspects.extend(job for job in lost if not job.is_alone and not job.finish)
        if any(job.is_alone for job in lost):
            self._suspects.appendleft(_probe(len(lost[0].weights)))
        logger.error("a forward pass failed; %d requests are tried again", len(self._suspects))
        try:  # closing may also raise if the accelerator is lost
            if failed is not None:
                await asyncio.to_thread(failed.close)
            if self._failures < MAX_FAILURES:
                self._runner = await asyncio.to_thread(self._make, self._step)
        except Exception:
            logger.exception("no new runner")
            return
        if self._runner is not None:
            self._admit()


def _probe(adapters: int) -> Job:
    """A job of one token for the base model, which shows whether forward passes work at all."""
    base, detokenizer = (0.0,) * adapters, Detokenizer(lambda ids: "", [])
    return Job([0], 1, base, frozenset(), Sampler(Sampling(), [0], frozenset()), detokenizer)


def _fail(jobs: Iterable[Job]) -> None:
    for job in jobs:
        job.finish = "error"
        job.pieces.put_nowait(Piece("", (), "error"))
