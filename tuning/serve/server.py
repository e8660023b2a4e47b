"""A server from its start to its end: listen, load, answer, drain.

It listens before it loads, so that probes hear "not yet" instead of nothing. SIGTERM makes it not
ready at once; it goes on answering whoever still comes for `linger` seconds (a Service needs a
moment to hear), then takes nothing new, finishes what runs, and leaves with 0.
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
from dataclasses import replace
from typing import TypeVar

import torch
import transformers
import uvicorn

from tuning import files
from tuning.console import Console
from tuning.models.load import load_base, load_tokenizer, read_config
from tuning.plan import device, inference
from tuning.serve import adapters, api, guard, listening, runner
from tuning.serve.engine import Engine
from tuning.serve.options import Options
from tuning.serve.protocol import Patient
from tuning.serve.rendering import Renderer
from tuning.serve.sampling import Sampling
from tuning.serve.service import Loaded, Service
from tuning.serve.voice import Voice, distrust

T = TypeVar("T")
logger = logging.getLogger(__name__)

SWITCH = 5e-5  # seconds: the model's thread needs the interpreter after every operator
SETTLED = 2.0  # seconds of silence, after which a connection is closed when the server stops
IDLE = 75  # seconds that a connection may wait for its next request: longer than clients keep one


def run(options: Options, listener: socket.socket, console: Console) -> None:
    """Serve on `listener` until SIGTERM or SIGINT. Raises TuningError."""
    _configure()
    asyncio.run(_serve(options, listener, console))


def _configure() -> None:
    """Of the process: one line for each request, and nothing that libraries tell each other."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("tuning.serve").setLevel(logging.INFO)
    transformers.utils.logging.disable_progress_bar()
    sys.setswitchinterval(SWITCH)


class _Server(uvicorn.Server):
    draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours: uvicorn would stop listening at once."""
        yield


async def _serve(options: Options, listener: socket.socket, console: Console) -> None:
    default = options.combined if options.wanted else options.base
    service = Service(options.base, default, options.limits)
    server = _Server(
        uvicorn.Config(
            api.app(service, keys=options.keys),
            http=Patient,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=2 * guard.HEADERS,
            limit_concurrency=listening.CONNECTIONS,
            timeout_keep_alive=IDLE,
            timeout_graceful_shutdown=1,  # after our own
        )
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        now = replace(options, linger=0.0) if number == signal.SIGINT else options
        loop.add_signal_handler(number, _stop, service, server, listener, now, console)
    loading = asyncio.create_task(_load(service, options, console))
    loading.add_done_callback(lambda task: _loaded(task, service, server))
    await server.serve(sockets=[listener])
    if not loading.done():
        os._exit(0)  # nothing to save, and libraries that load do not like to be interrupted
    await loading  # raises what went wrong
    if service.loaded is not None:
        await service.loaded.engine.close()
        service.loaded.renderer.close()
    console.say("Stopped.")


def _stop(
    service: Service,
    server: _Server,
    listener: socket.socket,
    options: Options,
    console: Console,
) -> None:
    """SIGTERM or SIGINT."""
    if service.phase == "draining":
        server.should_exit = server.force_exit = True  # asked twice
        return
    linger = options.linger if service.phase == "ready" else 0.0
    service.phase = "draining"
    console.say(f"Stopping: new requests for {linger:g} more seconds, then what runs is finished.")
    server.draining = asyncio.create_task(_drain(server, listener, linger, options.grace))


async def _drain(server: _Server, listener: socket.socket, linger: float, grace: float) -> None:
    """Leave when every client has its answer, or when there is no more time.

    A connection may carry another request until it has been silent for a moment: whoever sends on
    one that is being closed would not know whether it was heard.
    """
    await asyncio.sleep(linger)
    # Who has connected and is not accepted yet would be reset with the listening socket.
    while select.select([listener], [], [], 0)[0]:
        await asyncio.sleep(0)
    for accepting in server.servers:
        accepting.close()
    end = time.monotonic() + grace
    while time.monotonic() < end and (connections := list(server.server_state.connections)):
        for connection in connections:
            if isinstance(connection, Patient) and connection.silent > SETTLED:
                connection.shutdown()
        await asyncio.sleep(0.05)
    server.should_exit = True


def _loaded(task: asyncio.Task[None], service: Service, server: uvicorn.Server) -> None:
    if not task.cancelled() and task.exception() is not None:
        service.phase = "failed"
        server.should_exit = True


async def _load(service: Service, options: Options, console: Console) -> None:
    loaded = await _apart(lambda: _make(options, console))
    await loaded.engine.start()
    service.loaded = loaded
    service.metrics.refused.set(len(loaded.refused))
    if service.phase == "loading":
        service.phase = "ready"
        console.say(f"Ready: {', '.join(loaded.models)}")


async def _apart(work: Callable[[], T]) -> T:
    """What `work` gives, on a thread that a process which is told to stop does not wait for."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: BaseException | None) -> None:
        if result.cancelled():
            return
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(value)  # type: ignore[arg-type]

    def do() -> None:
        value, error = None, None
        try:
            value = work()
        except BaseException as problem:
            error = problem
        with contextlib.suppress(RuntimeError):  # the loop may be closed by now
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=do, name="loading", daemon=True).start()
    return await result


def _make(options: Options, console: Console) -> Loaded:
    folder = options.weights()
    read_config(folder)  # says what is wrong with it
    config = files.read_json(folder / "config.json")
    tokenizer = load_tokenizer(folder)
    here = device.detect()
    with ExitStack() as held:
        renderer = Renderer()
        ready, refused = adapters.fetch(
            options.wanted,
            config=config,
            own_template=tokenizer.chat_template,
            distrust=lambda text: distrust(text, renderer, tokenizer.special_tokens_map),
            access=options.access,
            console=console,
            held=held,
        )
        holding = inference.hold(
            folder,
            config,
            here,
            precision=options.precision,
            context=options.context,
            requests=options.requests,
            adapter_numbers=sum(one.found.parameters for one in ready),
        )
        console.say(_summary(options.base, holding, here))
        if holding.threads:
            torch.set_num_threads(holding.threads)
        model = load_base(
            folder,
            precision=holding.precision,
            quantisation=holding.quantisation,
            device=here.kind,
        ).eval()
        mixture, ready, misfits = adapters.put(ready, model=model, console=console)
    refused += misfits
    kind = runner.fitting(model, mixture, holding.room)
    if kind is runner.Turns:
        console.say("Requests take turns: this model's attention cannot batch them.")
    offered = adapters.offer(ready, refused, base=options.base, combined=options.combined)
    templates = {one.template for one in offered}
    return Loaded(
        engine=Engine(
            lambda step: kind(model, mixture, holding.room, step),
            holding.room,
            most_waiting=options.limits.waiting,
        ),
        models={one.name: one for one in offered},
        refused=tuple(refused),
        voices={one: Voice(tokenizer, model, template=one, renderer=renderer) for one in templates},
        renderer=renderer,
        defaults=_defaults(model.generation_config),
        context=holding.context,
        vocab=min(len(tokenizer), model.get_input_embeddings().weight.shape[0]),
    )


def _defaults(config: object) -> Sampling:
    """How the model's authors sample, as `generate` would."""

    def said(name: str, otherwise: float) -> float:
        value = getattr(config, name, None)
        return otherwise if value is None else value

    if not getattr(config, "do_sample", False):
        return Sampling(repetition_penalty=said("repetition_penalty", 1.0))
    return Sampling(
        temperature=said("temperature", 1.0),
        top_p=said("top_p", 1.0),
        top_k=int(said("top_k", 0)),
        repetition_penalty=said("repetition_penalty", 1.0),
    )


def _summary(name: str, holding: inference.Holding, here: device.Device) -> str:
    room = holding.room
    return (
        f"Loading {name} on {here}: {holding.reason}; weights {holding.weights / 2**30:.2f} GiB, "
        f"context {holding.context:,}, {room.requests} answers at once in a cache of "
        f"{room.cache_tokens:,} tokens."
    )
