"""Runs forward passes: by transformers' continuous batching, or one request after the other.

`Batched` wraps transformers' `ContinuousBatchingManager`, which owns the paged cache, prefills
prompts in chunks beside running answers, and packs everything into one row. Measured on CPUs
(transformers 5.23), its answers equal those of `generate` token for token, for every known family
but Falcon, whose attention is custom. Two things it cannot do per request are done in hooks on the
model: adapters (`multi_lora`) and sampling (`engine`; the manager has one sampler for all requests,
no seed and no log-probabilities). Prefix caching is off: it ignores which adapter made the cache.

`Sequential` is for other models. `choose_runner` tests at start-up which of the two a model needs.

transformers' own server (`transformers serve`) is not used: it does not select adapters by request,
has no API key and no limits, and takes `chat_template_kwargs` and models to load from requests.
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
from tuning.serve.multi_lora import MultiLora
from tuning.serve.scoring import PromptScorer

logger = logging.getLogger(__name__)
_LIBRARY = logging.getLogger("ContinuousBatchingLogger")

NO_TOKEN = -1  # as end of sequence: the engine decides when an answer ends
TOLERANCE = 0.05  # of the largest logit: allowed difference between a batch and the model alone


class Work(Protocol):
    """The part of a job that a runner needs."""

    id: str
    weights: tuple[float, ...]  # of each adapter

    @property
    def ids(self) -> list[int]:
        """The prompt and what has been generated."""

    @property
    def left(self) -> int:
        """How many tokens may still be generated."""

    @property
    def unscored(self) -> int:
        """Tokens of the prompt whose log-probabilities are wanted and not known yet."""

    def score(self, logits: torch.Tensor) -> None:
        """Take the `logits` [tokens, vocabulary] in float32 of the next unscored tokens."""


Step = Callable[[Sequence[Any], torch.Tensor], list[int]]
"""(requests, logits [requests, vocabulary]) -> the next token of each; on the runner's thread.

Called after every forward pass, also with no requests.
"""


class Batched:
    """Requests packed into one row."""

    def __init__(self, model: Any, loras: MultiLora, room: Room, step: Step) -> None:
        attention.install()
        self._loras, self._step = loras, step
        self._scorer = PromptScorer(model)
        self._works: dict[str, Work] = {}
        self._batch: list[tuple[Work | None, int, bool]] = []  # its tokens, and if a new one is due
        self._manager = model.init_continuous_batching(
            generation_config=transformers.GenerationConfig(do_sample=False, eos_token_id=NO_TOKEN),
            continuous_batching_config=transformers.ContinuousBatchingConfig(
                page_size=PAGE,
                num_blocks=-(-room.cache_tokens // PAGE),
                max_batch_tokens=room.batch_tokens,
                max_requests_per_batch=room.requests,
                max_blocks_per_request=0,
                allow_block_sharing=False,
                use_async_batching=False,
                use_cuda_graph=False,  # adapters change from pass to pass
                auto_switch_to_flash=False,  # it would download kernels
            ),
        )
        self._hooks = (
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        )
        self._manager.start()

    def add(self, work: Work) -> None:
        """Add a request."""
        self._works[work.id] = work
        self._manager.add_request(
            work.ids, request_id=work.id, max_new_tokens=work.left + 1, eos_token_id=[NO_TOKEN]
        )

    def drop(self, work: Work) -> None:
        """Remove a request, which may be unknown. Thread-safe."""
        if self._works.pop(work.id, None) is not None:
            self._manager.cancel_request(work.id)

    @property
    def alive(self) -> bool:
        """False after an error, which loses every request of this runner."""
        return bool(self._manager.is_running())

    def close(self) -> None:
        """End the thread and free the cache."""
        self._manager.stop(block=True, timeout=60, hard_stop=True)
        for hook in (*self._hooks, self._scorer):
            hook.remove()

    def _before(self, model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        # The only access to the manager's internals: the requests of the row, in order.
        batch = self._manager.batch_processor.inputs_and_outputs.requests_in_batch
        self._batch = [
            (self._works.get(entry.state.request_id), entry.query_length, entry.has_new_token)
            for entry in batch
        ]
        base = (0.0,) * self._loras.count
        rows = [(work.weights if work else base, count) for work, count, _ in self._batch]
        self._loras.use(rows, model.device)
        self._scorer.expect(work for work, _, _ in self._batch)
        return args, kwargs | {attention.SPANS: attention.spans(kwargs)}

    def _after(self, model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self._scorer.score((work, count) for work, count, _ in self._batch)
        logits = output.logits[0]
        rows = torch.arange(len(logits), device=logits.device)
        if "logits_to_keep" not in kwargs:  # the manager selects the rows later
            rows = kwargs["logits_indices"].to(torch.long)
        due = enumerate(work for work, _, is_due in self._batch if is_due)  # a row of logits each
        sampled = [(index, work) for index, work in due if work is not None]
        if not sampled:
            self._step([], logits[:0].float())  # a chunk of a prompt: shows that passes are made
            return
        rows = rows[[index for index, _ in sampled]]
        tokens = self._step([work for _, work in sampled], logits[rows].float())
        # The manager takes the argmax, which now is the sampled token.
        logits[rows, torch.tensor(tokens, device=logits.device)] = torch.inf


class Sequential:
    """One request after the other, a token at a time."""

    def __init__(self, model: Any, loras: MultiLora, room: Room, step: Step) -> None:
        self._model, self._loras, self._step = model, loras, step
        self._scorer = PromptScorer(model)
        self._batch_tokens = room.batch_tokens
        self._works: dict[str, Work] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="sequential", daemon=True)
        self._thread.start()

    def add(self, work: Work) -> None:
        """Add a request."""
        with self._changed:
            self._works[work.id] = work
            self._changed.notify()

    def drop(self, work: Work) -> None:
        """Remove a request, which may be unknown. Thread-safe."""
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
        self._scorer.remove()

    @torch.no_grad()
    def _run(self) -> None:
        caches: dict[str, tuple[Any, int]] = {}  # a cache and its number of tokens
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
                self._loras.use([(work.weights, len(ids))], self._model.device)
                self._scorer.expect([work])
                logits = self._model(
                    input_ids=torch.tensor([ids], device=self._model.device),
                    past_key_values=cache,
                    use_cache=True,
                ).logits
                caches[work.id] = cache, done + len(ids)
                self._scorer.score([(work, len(ids))])
                due = [work] if done + len(ids) == len(work.ids) else []
                self._step(due, (logits[0, -1:] if due else logits[0, :0]).float())


Runner = Batched | Sequential
"""Makes forward passes on a thread of its own until it is closed or fails."""


@dataclass(eq=False)
class _Probe:
    """A request of known tokens, each the last one plus 1, whose logits are recorded."""

    ids: list[int]
    id: str
    weights: tuple[float, ...]
    left: int = 2
    unscored: int = 0

    def score(self, logits: torch.Tensor) -> None:
        """Nothing is to be scored."""


def choose_runner(model: Any, loras: MultiLora, room: Room) -> type[Batched] | type[Sequential]:
    """`Batched` if the model's logits are the same in a batch as alone, else `Sequential`.

    Compares two short prompts with different adapters, two tokens each. A family whose attention
    ignores the boundaries of requests gives other logits, or fails.
    """
    base = (0.0,) * loras.count
    probes = [
        _Probe(list(range(3, 9)), "probe-0", (1.0, *base[1:]) if base else ()),
        _Probe(list(range(5, 30)), "probe-1", base),
    ]
    alone = [_logits_alone(model, loras, probe) for probe in probes]
    batched: dict[str, list[torch.Tensor]] = {probe.id: [] for probe in probes}
    done = threading.Event()

    def step(works: Sequence[_Probe], logits: torch.Tensor) -> list[int]:
        for work, row in zip(works, logits, strict=True):
            batched[work.id].append(row.clone())
            if len(batched[work.id]) == 2:
                runner.drop(work)
        if all(len(rows) >= 2 for rows in batched.values()):
            done.set()
        return [work.ids[-1] + len(batched[work.id]) for work in works]

    before = model.config._attn_implementation
    level = _LIBRARY.level
    _LIBRARY.setLevel(logging.CRITICAL)  # a failure here is an expected outcome
    try:
        runner = Batched(model, loras, room, step)
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
        (row - expected).abs().max() <= TOLERANCE * expected.abs().max() + 1e-3
        for probe, rows in zip(probes, alone, strict=True)
        for row, expected in zip(batched[probe.id], rows, strict=False)
    )
    if not agree:
        logger.warning("no continuous batching: this model's logits differ in a batch")
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)
    return Batched if agree else Sequential


@torch.no_grad()
def _logits_alone(model: Any, loras: MultiLora, probe: _Probe) -> list[torch.Tensor]:
    """The logits of both tokens, without a cache or a batch."""
    rows = []
    for ids in (probe.ids, [*probe.ids, probe.ids[-1] + 1]):
        loras.use([(probe.weights, len(ids))], model.device)
        out = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
        rows.append(out.logits[0, -1].float())
    return rows
