"""Forward passes for many answers at once: transformers' continuous batching, or in turns.

`Batched` is transformers' `ContinuousBatchingManager`: it keeps the paged cache, admits prompts
piece by piece beside answers that are under way, and lays everything in one row. Measured on CPUs
(transformers 5.23), its answers are those of `generate`, token for token, for every family we know
but Falcon, whose attention is its own. Two things it cannot do are done in hooks on the model, so
that every request may have them: which adapters its tokens go through (`mixture`), and how its next
token is chosen (`engine`; the manager knows one way for all requests, no seed, and no likeliest
others). Equal beginnings of prompts do not share their cache: it would not ask whose adapter made
it.

`Turns` is for the rest: one request after the other, a token at a time. Which of the two a model
gets is found out at start-up, by asking it (`fitting`).

transformers' own server (`transformers serve`) is not used: it chooses no adapter by request, needs
no key, has no bound on anything, and takes `chat_template_kwargs` and models to load from requests.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import transformers

from tuning.plan.inference import PAGE, Room
from tuning.serve import attention
from tuning.serve.mixture import Mixture

logger = logging.getLogger(__name__)
_LIBRARY = logging.getLogger("ContinuousBatchingLogger")

NEVER = -1  # no token: the engine says when an answer ends
CLOSE = 0.05  # of the largest logit: how near a batch must come to the model alone


class Work(Protocol):
    """What a runner sees of a request."""

    id: str
    weights: tuple[float, ...]  # of each adapter of the mixture

    @property
    def ids(self) -> list[int]:
        """The prompt and what has been generated."""

    @property
    def left(self) -> int:
        """How many tokens may still come."""


Step = Callable[[Sequence[Any], torch.Tensor], list[int]]
"""(requests, logits [requests, vocabulary]) -> the next token of each; on the runner's thread.

Called after every forward pass, also with no requests.
"""


class Runner(Protocol):
    """Makes forward passes on a thread of its own until it is closed or something breaks."""

    def add(self, work: Work) -> None:
        """Take a request in."""

    def drop(self, work: Work) -> None:
        """Forget a request, which may be unknown."""

    @property
    def alive(self) -> bool:
        """False after an error: then every request in it is lost, and this runner with them."""

    def close(self) -> None:
        """End the thread and free the cache."""


class Batched:
    """Requests side by side in one row."""

    def __init__(self, model: Any, mixture: Mixture, room: Room, step: Step) -> None:
        attention.install()
        self._model, self._mixture, self._step = model, mixture, step
        self._works: dict[str, Work] = {}
        self._batch: list[tuple[Any, int, bool]] = []  # request, tokens, whether one is due
        self._manager = model.init_continuous_batching(
            generation_config=transformers.GenerationConfig(do_sample=False, eos_token_id=NEVER),
            continuous_batching_config=transformers.ContinuousBatchingConfig(
                page_size=PAGE,
                num_blocks=-(-room.cache_tokens // PAGE),
                max_batch_tokens=room.batch_tokens,
                max_requests_per_batch=room.requests,
                max_blocks_per_request=0,
                allow_block_sharing=False,
                use_async_batching=False,
                use_cuda_graph=False,  # the adapters in use change from pass to pass
                auto_switch_to_flash=False,  # it would look for kernels to download
            ),
        )
        self._hooks = (
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        )
        self._manager.start()

    def add(self, work: Work) -> None:
        """Take a request in."""
        self._works[work.id] = work
        self._manager.add_request(
            work.ids, request_id=work.id, max_new_tokens=work.left + 1, eos_token_id=[NEVER]
        )

    def drop(self, work: Work) -> None:
        """Forget a request, which may be unknown. Safe on any thread."""
        if self._works.pop(work.id, None) is not None:
            self._manager.cancel_request(work.id)

    @property
    def alive(self) -> bool:
        """False after an error."""
        return bool(self._manager.is_running())

    def close(self) -> None:
        """End the thread and free the cache."""
        self._manager.stop(block=True, timeout=60, hard_stop=True)
        for hook in self._hooks:
            hook.remove()

    def _before(self, model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        # The one look inside of the manager: which tokens of the row are whose.
        batch = self._manager.batch_processor.inputs_and_outputs.requests_in_batch
        self._batch = [
            (self._works.get(one.state.request_id), one.query_length, one.has_new_token)
            for one in batch
        ]
        nobody = (0.0,) * self._mixture.count
        rows = [(work.weights if work else nobody, count) for work, count, _ in self._batch]
        self._mixture.use(rows, model.device)
        return args, kwargs | {attention.SPANS: attention.spans(kwargs)}

    def _after(self, model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        logits = output.logits[0]
        places = torch.arange(len(logits), device=logits.device)
        if "logits_to_keep" not in kwargs:  # the manager picks the rows later
            places = kwargs["logits_indices"].to(torch.long)
        due = [(place, work) for place, (work, _, new) in enumerate(_due(self._batch)) if new]
        asked = [(place, work) for place, work in due if work is not None]
        if not asked:
            self._step([], logits[:0].float())  # a piece of a prompt: a sign of life
            return
        rows = places[[place for place, _ in asked]]
        tokens = self._step([work for _, work in asked], logits[rows].float())
        # The manager takes the largest: so it takes what was chosen.
        logits[rows, torch.tensor(tokens, device=logits.device)] = torch.inf


def _due(batch: Sequence[tuple[Any, int, bool]]) -> list[tuple[Any, int, bool]]:
    """Those requests of a batch that get a token: they have a row of logits each, in order."""
    return [one for one in batch if one[2]]


class Turns:
    """One request after the other, a token at a time."""

    def __init__(self, model: Any, mixture: Mixture, room: Room, step: Step) -> None:
        self._model, self._mixture, self._step = model, mixture, step
        self._batch_tokens = room.batch_tokens
        self._works: dict[str, Work] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="turns", daemon=True)
        self._thread.start()

    def add(self, work: Work) -> None:
        """Take a request in."""
        with self._changed:
            self._works[work.id] = work
            self._changed.notify()

    def drop(self, work: Work) -> None:
        """Forget a request, which may be unknown. Safe on any thread."""
        with self._changed:
            self._works.pop(work.id, None)

    @property
    def alive(self) -> bool:
        """False after an error."""
        return self._thread.is_alive()

    def close(self) -> None:
        """End the thread and free the caches."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(60)

    @torch.no_grad()
    def _run(self) -> None:
        caches: dict[str, tuple[Any, int]] = {}  # the cache, and how many tokens are in it
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._works or self._closed)
                if self._closed:
                    return
                works = dict(self._works)
            caches = {id: cache for id, cache in caches.items() if id in works}
            for work in works.values():
                if work.id not in caches:
                    caches[work.id] = transformers.DynamicCache(config=self._model.config), 0
                cache, done = caches[work.id]
                ids = work.ids[done : done + self._batch_tokens]
                self._mixture.use([(work.weights, len(ids))], self._model.device)
                logits = self._model(
                    input_ids=torch.tensor([ids], device=self._model.device),
                    past_key_values=cache,
                    use_cache=True,
                ).logits
                caches[work.id] = cache, done + len(ids)
                due = [work] if done + len(ids) == len(work.ids) else []
                self._step(due, (logits[0, -1:] if due else logits[0, :0]).float())


@dataclass(eq=False)
class _Probe:
    """A request whose logits are kept: whatever is chosen, it goes on with the next number."""

    ids: list[int]
    id: str
    weights: tuple[float, ...]
    left: int = 2


def fitting(model: Any, mixture: Mixture, room: Room) -> type[Batched] | type[Turns]:
    """`Batched` if the model says the same in a batch as alone, else `Turns`.

    Two short prompts of different adapters, two tokens each. A family whose attention does not know
    where a request begins says something else, or nothing.
    """
    ones = [(1.0 if i == 0 else 0.0) for i in range(mixture.count)]
    prompts = [list(range(3, 9)), list(range(5, 30))]
    probes = [
        _Probe(prompts[0], "probe-0", tuple(ones)),
        _Probe(prompts[1], "probe-1", (0.0,) * mixture.count),
    ]
    alone = [_alone(model, mixture, probe) for probe in probes]
    heard: dict[str, list[torch.Tensor]] = {probe.id: [] for probe in probes}
    done = threading.Event()

    def step(works: Sequence[_Probe], logits: torch.Tensor) -> list[int]:
        for work, row in zip(works, logits, strict=True):
            heard[work.id].append(row.clone())
            if len(heard[work.id]) == 2:
                runner.drop(work)
        if all(len(rows) >= 2 for rows in heard.values()):
            done.set()
        return [_next(work, len(heard[work.id])) for work in works]

    before = model.config._attn_implementation
    level = _LIBRARY.level
    _LIBRARY.setLevel(logging.CRITICAL)  # a traceback here is an answer, no news
    try:
        runner = Batched(model, mixture, room, step)
        for probe in probes:
            runner.add(probe)
        while runner.alive and not done.wait(0.02):
            pass
        runner.close()
    except (ValueError, NotImplementedError, AttributeError) as error:
        logger.warning("no continuous batching for this model: %s", error)
    finally:
        _LIBRARY.setLevel(level)
    agree = done.is_set() and all(
        (near - far).abs().max() <= CLOSE * far.abs().max() + 1e-3
        for probe, both in zip(probes, alone, strict=True)
        for near, far in zip(heard[probe.id], both, strict=False)
    )
    if not agree:
        logger.warning("answers take turns: this model says something else in a batch")
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)
    return Batched if agree else Turns


def _next(probe: _Probe, said: int) -> int:
    return probe.ids[-1] + said


@torch.no_grad()
def _alone(model: Any, mixture: Mixture, probe: _Probe) -> list[torch.Tensor]:
    """The logits of both tokens, without cache and company."""
    rows = []
    for ids in (probe.ids, [*probe.ids, _next(probe, 1)]):
        mixture.use([(probe.weights, len(ids))], model.device)
        out = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
        rows.append(out.logits[0, -1].float())
    return rows
