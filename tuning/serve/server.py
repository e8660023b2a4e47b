"""The life of a server: listen, load, answer, drain.

It listens before it loads, so that probes get "not ready" instead of a refused connection. At
SIGTERM it is not ready at once, but answers new requests for `linger` seconds more (a Service
needs a moment to notice); then it stops listening, finishes running requests, and exits with 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
import uvicorn

from tuning import files
from tuning.console import Console
from tuning.data.tokenizer import own_template
from tuning.models.load import load_base, load_tokenizer, read_config
from tuning.plan import device, gpu_problems, inference
from tuning.serve import adapters, api, listening, middleware, runner
from tuning.serve.engine import Engine
from tuning.serve.options import Options
from tuning.serve.protocol import TimeoutProtocol
from tuning.serve.rendering import Renderer, template_problem
from tuning.serve.sampling import Sampling
from tuning.serve.service import Loaded, Service
from tuning.serve.tokenizer import ChatTokenizer
from tuning.sources.base import weights_of

T = TypeVar("T")
logger = logging.getLogger(__name__)

SWITCH_SECONDS = 5e-5  # the model's thread needs the interpreter after every operator
DRAIN_IDLE_SECONDS = 2.0  # while draining, a connection idle for longer is closed
KEEP_ALIVE_SECONDS = 75  # longer than clients keep an idle connection


def run(options: Options, listener: socket.socket, console: Console) -> None:
    """Serve on `listener` until SIGTERM or SIGINT. Raises TuningError."""
    _configure()
    asyncio.run(_serve(options, listener, console))


def _configure() -> None:
    """Log one line per request, and silence the libraries."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("tuning.serve").setLevel(logging.INFO)
    transformers.utils.logging.disable_progress_bar()
    sys.setswitchinterval(SWITCH_SECONDS)


class _Server(uvicorn.Server):
    draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: uvicorn would stop listening at once."""
        yield


async def _serve(options: Options, listener: socket.socket, console: Console) -> None:
    default = options.combined if options.adapters else options.base
    service = Service(options.base, default, options.limits)
    server = _Server(
        uvicorn.Config(
            api.app(service, keys=options.keys, any_host=options.any_host),
            http=TimeoutProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=2 * middleware.MAX_HEADER_BYTES,
            limit_concurrency=listening.MAX_CONNECTIONS,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=1,  # after our own
        )
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        linger = 0.0 if number == signal.SIGINT else options.linger
        loop.add_signal_handler(
            number, _stop, service, server, listener, linger, options.grace, console
        )
    loading = asyncio.create_task(_load(service, options, console))
    loading.add_done_callback(lambda task: _end_if_failed(task, service, server))
    await server.serve(sockets=[listener])
    if not loading.done():
        os._exit(0)  # nothing to save, and libraries cannot be interrupted while they load
    await loading  # raises the error of loading
    if service.loaded is not None:
        await service.loaded.engine.close()
        for renderer in service.loaded.renderers:
            renderer.close()
    console.say("Stopped.")


def _stop(
    service: Service,
    server: _Server,
    listener: socket.socket,
    linger: float,
    grace: float,
    console: Console,
) -> None:
    """Handle SIGTERM or SIGINT; a second signal ends the server at once."""
    if service.phase == "draining":
        server.should_exit = server.force_exit = True
        return
    linger = linger if service.phase == "ready" else 0.0
    service.phase = "draining"
    console.say(f"Stopping: {linger:g} more seconds for new requests, then running ones finish.")
    server.draining = asyncio.create_task(_drain(server, listener, linger, grace))


async def _drain(server: _Server, listener: socket.socket, linger: float, grace: float) -> None:
    """End the server when every client has its answer, or after `grace` seconds.

    A connection is closed only after it was idle for a moment: a client that sends on a closing
    connection could not tell whether its request was received.
    """
    await asyncio.sleep(linger)
    # Closing the listening socket would reset connections that are not accepted yet.
    while select.select([listener], [], [], 0)[0]:
        await asyncio.sleep(0)
    for accepting in server.servers:
        accepting.close()
    end = time.monotonic() + grace
    while time.monotonic() < end and (connections := list(server.server_state.connections)):
        for connection in connections:
            if not isinstance(connection, TimeoutProtocol):
                continue
            if connection.idle_seconds > DRAIN_IDLE_SECONDS:
                connection.shutdown()
        await asyncio.sleep(0.05)
    server.should_exit = True


def _end_if_failed(task: asyncio.Task[None], service: Service, server: uvicorn.Server) -> None:
    if not task.cancelled() and task.exception() is not None:
        service.phase = "failed"
        server.should_exit = True


async def _load(service: Service, options: Options, console: Console) -> None:
    loaded = await _on_daemon_thread(lambda: _make(options, console))
    await loaded.engine.start()
    service.loaded = loaded
    service.metrics.refused.set(len(loaded.rejected))
    if service.phase == "loading":
        service.phase = "ready"
        console.say(f"Ready: {', '.join(loaded.models)}")


async def _on_daemon_thread(work: Callable[[], T]) -> T:
    """The result of `work`, on a thread that does not keep the process alive."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def settle(set_outcome: Callable[[Any], None], outcome: Any) -> None:
        if not result.cancelled():
            set_outcome(outcome)

    def do() -> None:
        outcome: tuple[Callable[[Any], None], Any]
        try:
            outcome = result.set_result, work()
        except BaseException as error:
            outcome = result.set_exception, error
        with contextlib.suppress(RuntimeError):  # the loop may be closed by now
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=do, name="loading", daemon=True).start()
    return await result


def _make(options: Options, console: Console) -> Loaded:
    folder = options.weights()
    read_config(folder)  # validates it
    config = files.read_json(folder / "config.json")
    tokenizer = load_tokenizer(folder)
    here = device.detect(1)  # it serves from the first GPU
    gpu_problems.refuse(here)
    base_renderer, adapter_renderer = Renderer(), Renderer()
    if template := own_template(tokenizer):
        base_renderer.prewarm()  # ready before the weights are
    with ExitStack() as folders:
        ready, rejected = adapters.fetch(
            options.adapters,
            config=config,
            base_template=template,
            template_problem=partial(
                template_problem,
                renderer=adapter_renderer,
                special_tokens=tokenizer.special_tokens_map,
            ),
            access=options.access,
            console=console,
            folders=folders,
            weights=partial(weights_of, folder),
        )
        holding = inference.hold(
            folder,
            config,
            here,
            precision=options.precision,
            context=options.context,
            requests=options.requests,
            adapter_numbers=sum(one.adapter.parameters for one in ready),
        )
        console.say(_summary(options.base, holding, here))
        model = _load_weights(folder, holding, here)
        vocab = min(len(tokenizer), model.get_input_embeddings().weight.shape[0])
        ready, unplaced = adapters.place_tokens(
            ready, tokenizer=tokenizer, model=model, console=console
        )
        loras, ready, misfits = adapters.attach(ready, model=model, console=console)
    rejected += unplaced + misfits
    kind = runner.choose_runner(model, loras, holding.room)
    if kind is runner.Sequential:
        console.say("Requests take turns: this model's attention cannot batch them.")
    offered = adapters.offered(ready, rejected, base=options.base, combined=options.combined)
    kinds = dict.fromkeys((one.template, one.tokens) for one in offered)
    tokenizers = {
        (text, tokens): ChatTokenizer(
            tokens.tokenizer(tokenizer) if tokens else tokenizer,
            model,
            adapter_renderer if text is not None else base_renderer,
            template=text,
        )
        for text, tokens in kinds
    }
    return Loaded(
        engine=Engine(
            lambda step: kind(model, loras, holding.room, step),
            holding.room,
            max_waiting=options.limits.waiting,
        ),
        models={one.name: one for one in offered},
        rejected=tuple(rejected),
        tokenizers=tokenizers,
        renderers=(base_renderer, adapter_renderer),
        defaults=_defaults(model.generation_config),
        context=holding.context,
        vocab=vocab,
        tokens=tuple(one.tokens for one in ready if one.tokens),
    )


def _load_weights(folder: Path, holding: inference.Holding, here: device.Device) -> Any:
    if holding.threads:
        torch.set_num_threads(holding.threads)
    return load_base(
        folder,
        precision=holding.precision,
        quantisation=holding.quantisation,
        device=here.kind,
    ).eval()


def _defaults(config: object) -> Sampling:
    """The sampling settings of a generation config, as `generate` reads it."""

    def value(name: str, default: float) -> float:
        value = getattr(config, name, None)
        return default if value is None else value

    if not getattr(config, "do_sample", False):
        return Sampling(repetition_penalty=value("repetition_penalty", 1.0))
    return Sampling(
        temperature=value("temperature", 1.0),
        top_p=value("top_p", 1.0),
        top_k=int(value("top_k", 0)),
        repetition_penalty=value("repetition_penalty", 1.0),
    )


def _summary(name: str, holding: inference.Holding, here: device.Device) -> str:
    room = holding.room
    return (
        f"Loading {name} on {here}: {holding.reason}; weights {holding.weights / 2**30:.2f} GiB, "
        f"context {holding.context:,}, {room.requests} answers at once in a cache of "
        f"{room.cache_tokens:,} tokens."
    )
