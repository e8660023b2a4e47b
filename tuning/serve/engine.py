"""Requests in, pieces of answers out: who is next, who goes on, what became of each.

The event loop owns the lists; the runner's thread makes forward passes and calls `_step`, which
chooses a token for each request and hands the pieces back to the loop. A request is admitted when
the cache has room for its whole prompt and its longest answer, so that nothing is ever evicted.

A forward pass that fails (out of memory, say) ends the runner and loses the cache, not the
requests: a new runner gets each of them once more, with what it had said already, alone and for one
token, before they go on together. The one that breaks it again is answered with an error, the
others hardly notice. Whether it was the request or the machine, a probe of our own tells after it.
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

from tuning.plan.inference import PAGE, Room
from tuning.serve.runner import Runner, Step
from tuning.serve.sampling import Choice, Chooser, Sampling, judge
from tuning.serve.text import Writer

logger = logging.getLogger(__name__)

LOOK_EVERY = 0.1  # seconds between two looks at the runner
GIVE_UP = 3  # runners that broke in a row without a token: the machine is at fault
BLAMED = 2  # times that a request was there when a runner broke: then it runs alone to its end
STUCK = 300.0  # seconds without a forward pass although requests wait for one

_NUMBERS = itertools.count()

Finish = Literal["stop", "length", "error"]


class Busy(Exception):
    """The queue is full: come back later."""


@dataclass(frozen=True)
class Piece:
    """What a forward pass added to an answer."""

    text: str
    choices: tuple[Choice, ...]  # the tokens of it, without the one that ends the answer
    finish: Finish | None


def _name() -> str:
    return f"job-{next(_NUMBERS)}"


@dataclass(eq=False)
class Job:
    """One answer to be generated."""

    prompt: list[int]
    limit: int  # tokens that may be generated
    weights: tuple[float, ...]  # of each adapter
    ends: frozenset[int]  # tokens that end an answer
    chooser: Chooser
    writer: Writer
    top: int | None = None  # likeliest tokens to tell; None: no probabilities
    id: str = field(default_factory=_name)
    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None
    pieces: asyncio.Queue[Piece] = field(default_factory=asyncio.Queue)
    alone: bool = False  # runs without company, because it may have broken a runner
    blamed: int = 0  # how many runners broke while it ran
    cleared: bool = False  # has said a token alone, and waits to go on in company

    @property
    def ids(self) -> list[int]:
        """The prompt and what has been generated."""
        return self.prompt + self.tokens

    @property
    def left(self) -> int:
        """How many tokens may still come."""
        return self.limit - len(self.tokens)

    @property
    def room(self) -> int:
        """Tokens of the cache that it may need, in whole pages."""
        return (-(-(len(self.prompt) + self.limit) // PAGE) + 1) * PAGE

    def take(self, token: int, choice: Choice) -> Piece:
        """What `token` adds. Sets `finish` at the end."""
        self.tokens.append(token)
        if token in self.ends:
            self.finish = "stop"
            return Piece(self.writer.end(), (), "stop")
        text = self.writer.add(token)
        if self.writer.stopped:
            self.finish = "stop"
        elif not self.left:
            self.finish = "length"
            text += self.writer.end()
        return Piece(text, (choice,), self.finish)


class Engine:
    """Answers to jobs. All methods but `_step` are for the event loop."""

    def __init__(
        self, make: Callable[[Step], Runner], room: Room, *, most_waiting: int, stuck: float = STUCK
    ) -> None:
        self._make, self._room = make, room
        self._most_waiting, self._stuck = most_waiting, stuck
        self._waiting: deque[Job] = deque()
        self._suspects: deque[Job] = deque()
        self._cleared: deque[Job] = deque()
        self._running: dict[str, Job] = {}
        self._taken = 0  # tokens of the cache that are promised
        self._broken = 0  # runners that broke since the last token
        self._last_pass = time.monotonic()
        self._runner: Runner | None = None
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Make the runner; the engine belongs to the event loop that this is called on."""
        self._loop = asyncio.get_running_loop()
        self._runner = await asyncio.to_thread(self._make, self._step)
        self._watch = asyncio.create_task(self._look())

    async def close(self) -> None:
        """End the runner. Whoever is still answered gets nothing more."""
        if self._watch is not None:
            self._watch.cancel()
        if self._runner is not None:
            await asyncio.to_thread(self._runner.close)

    @property
    def running(self) -> int:
        """Jobs in the cache."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Jobs that wait for a place."""
        return sum(map(len, self._queues))

    @property
    def _queues(self) -> tuple[deque[Job], ...]:
        """Who waits, in the order in which they are let in."""
        return self._suspects, self._cleared, self._waiting

    @property
    def healthy(self) -> bool:
        """False if only a restart of the process can help."""
        still = time.monotonic() - self._last_pass
        watched = self._watch is None or not self._watch.done()
        return watched and self._broken < GIVE_UP and not (self._running and still > self._stuck)

    def check(self, count: int) -> None:
        """Raise Busy if `count` more jobs find no place in the queue."""
        idle = max(0, self._room.requests - len(self._running))
        if self.waiting + count > self._most_waiting + idle:
            raise Busy

    async def answer(self, job: Job) -> AsyncIterator[Piece]:
        """The pieces of the answer as they come; the last has a `finish`.

        Whoever stops asking for pieces cancels the job.
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
            alone = queue is self._suspects or any(job.alone for job in self._running.values())
            full = self._taken + queue[0].room > self._room.cache_tokens
            if self._running and (alone or full):
                return
            job = queue.popleft()
            job.alone = queue is self._suspects
            if not self._running:
                self._last_pass = time.monotonic()
            self._running[job.id] = job
            self._taken += job.room
            self._runner.add(job)

    def _forget(self, job: Job) -> None:
        """The job is over, one way or the other."""
        job.finish = job.finish or "stop"  # so that its runner's thread leaves it alone
        if self._running.pop(job.id, None):
            self._taken -= job.room
            if self._runner is not None:
                self._runner.drop(job)
        for queue in self._queues:
            if job in queue:
                queue.remove(job)
        self._admit()

    def _step(self, jobs: Sequence[Job], logits: torch.Tensor) -> list[int]:
        """On the runner's thread: the next token of each job."""
        best = logits.argmax(-1).tolist() if jobs else []
        pieces = []
        for job, row, likeliest in zip(jobs, logits, best, strict=True):
            if job.finish:
                continue  # cancelled a moment ago
            try:
                piece = self._choose(job, row, likeliest)
            except Exception:
                logger.exception("a request failed")
                job.finish = "error"
                piece = Piece("", (), "error")
            pieces.append((job, piece))
            job.cleared = job.alone and job.blamed < BLAMED and not job.finish
            if (job.finish or job.cleared) and self._runner is not None:
                self._runner.drop(job)
        self._last_pass = time.monotonic()
        if not jobs:
            return []
        self._broken = 0
        self._loop.call_soon_threadsafe(self._hand_over, pieces)
        return [job.tokens[-1] if job.tokens else 0 for job in jobs]

    def _choose(self, job: Job, row: torch.Tensor, likeliest: int) -> Piece:
        token = job.chooser.choose(row, likeliest)
        return job.take(token, judge(row, token, job.top))

    def _hand_over(self, pieces: Iterable[tuple[Job, Piece]]) -> None:
        for job, piece in pieces:
            job.pieces.put_nowait(piece)
            if piece.finish:
                self._forget(job)
            elif job.cleared and job.id in self._running:
                del self._running[job.id]
                self._taken -= job.room
                job.id, job.alone, job.cleared = _name(), False, False  # to a runner it is new
                self._cleared.append(job)
                self._admit()

    async def _look(self) -> None:
        """Replace a runner that broke."""
        while self._broken < GIVE_UP:
            await asyncio.sleep(LOOK_EVERY)
            if self._runner is None or not self._runner.alive:
                await self._replace()
        logger.error("forward passes keep failing: this process cannot answer any more")
        _fail([*self._running.values(), *itertools.chain(*self._queues)])

    async def _replace(self) -> None:
        self._broken += 1
        lost, broken = list(self._running.values()), self._runner
        self._running.clear()
        self._taken, self._runner = 0, None
        for job in lost:
            job.blamed += 1
        _fail(job for job in lost if job.alone)
        self._suspects.extend(job for job in lost if not job.alone and not job.finish)
        if any(job.alone for job in lost):
            self._suspects.appendleft(_probe(len(lost[0].weights)))
        logger.error("a forward pass failed; %d requests are tried again", len(self._suspects))
        try:  # an accelerator that is lost says so here, too
            if broken is not None:
                await asyncio.to_thread(broken.close)
            if self._broken < GIVE_UP:
                self._runner = await asyncio.to_thread(self._make, self._step)
        except Exception:
            logger.exception("no new runner")
            return
        if self._runner is not None:
            self._admit()


def _probe(adapters: int) -> Job:
    """One token of the base's, for nobody: whether forward passes can be made at all."""
    base, nobody = (0.0,) * adapters, Writer(lambda ids: "", [])
    return Job([0], 1, base, frozenset(), Chooser(Sampling(), [0], frozenset()), nobody)


def _fail(jobs: Iterable[Job]) -> None:
    for job in jobs:
        job.finish = "error"
        job.pieces.put_nowait(Piece("", (), "error"))
