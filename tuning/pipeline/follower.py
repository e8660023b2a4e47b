"""A machine beside the first one of a job: it trains with it, and decides nothing.

It needs the base's weights, which it fetches itself. All else, rows included, comes from machine 0
when the ranks have met (`training.distributed`). It ends when machine 0's training has ended well,
and meets it again after anything else, to tell what failed here: machine 0 decides what follows.
"""

from __future__ import annotations

import time
from typing import Any

from tuning import files
from tuning.console import Console
from tuning.errors import Killed, OutOfMemoryError, Stopped, TransientError, TuningError
from tuning.pipeline import endings, journal, preparing, weights
from tuning.pipeline.options import Options
from tuning.pipeline.run import TRAIN, Run
from tuning.pipeline.stopping import stop_on_signal
from tuning.spec import Spec

PATIENCE = 4 * 3600.0  # seconds without having met machine 0: it may fetch and read for long
PAUSE = 2.0  # seconds before another try


def follow(spec: Spec, options: Options, console: Console) -> None:
    """Train with machine 0 until it is done. Raises Stopped, or TransientError if it is gone."""
    with stop_on_signal() as stop, journal.opened(options.run_dir) as opened:
        run = Run(spec, options, console, opened, stop)
        preparing.validate(run)
        model = preparing.base_model(run)
        with weights.background_download(run, model) as download:
            folder = download.folder()
        here = run.device()
        request = {
            "run": str(run.folder),
            "base": str(folder),
            "device": here.kind,
            "packed": str(options.cache or files.cache_folder()),
        }
        machines = options.machines
        title = f"Machine {machines.node} of {machines.nodes} trains with machine 0 ..."
        run.begin("train", title)
        seen, failed = time.monotonic(), None
        while True:
            began = time.monotonic()
            try:
                group = run.group(here.count, machines.nodes)
                run.child(TRAIN, request | {"failed": failed}, group=group)
                console.say("Machine 0 has trained.")
                return
            except TuningError as error:
                if isinstance(error, Stopped) and stop.is_set():
                    raise
                if error.problems[0].code != endings.APART:
                    seen = time.monotonic()
                    failed = _to_tell(error) if failed is None else None  # it is told once
                elif time.monotonic() - seen > PATIENCE:
                    raise
            if stop.wait(PAUSE if time.monotonic() - began > PAUSE else 5 * PAUSE):
                run.begin("train")  # raises Stopped


def _to_tell(error: TuningError) -> dict[str, Any] | None:
    """What machine 0 has to hear of when the machines meet again: it decides what follows."""
    if isinstance(error, endings.KilledForMemory):
        return OutOfMemoryError(error.problems).to_json()
    return None if isinstance(error, Killed | TransientError | Stopped) else error.to_json()
