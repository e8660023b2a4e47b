"""Tiny trainings of several ranks, as the parent runs them, and what disturbs them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs

from tuning import process
from tuning.pipeline.outcome import progress


def train(
    run: Path,
    base: Path,
    placement: Any,
    *,
    recipe: Any,
    tick: Any = lambda: None,
    stop: Any = lambda: False,
    **more: Any,
) -> dict[str, Any]:
    """The answer of the training child, or of the children, as the parent runs them.

    `more` are further fields of the request, such as `save_steps`.
    """
    asked = tiny_runs.request(run, base, recipe, placement, count=17, held_out=6, **more)
    (run / "log").mkdir(exist_ok=True)
    return process.run(
        "training.train",
        run / "log" / "train.json",
        asked,
        log=run / "log" / "train.log",
        tick=tick,
        stop_asked=stop,
        group=process.Group(placement.ranks),
    )


def close(one: list[float], other: list[float]) -> bool:
    return one == pytest.approx(other, rel=1e-5)


def at_step(run: Path, number: int, act: Callable[[], None]) -> Callable[[], None]:
    """A tick that acts once the run has told step `number`."""
    done = False

    def tick() -> None:
        nonlocal done
        now = progress(run)
        if not done and now is not None and now["step"] >= number:
            done = True
            act()

    return tick


def kill(run: Path, *, rank: int) -> None:
    """SIGKILL the process that is that rank of this run; without others it has no number."""
    asked, struck = str(run / "log" / "train.json").encode(), False
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            command = (folder / "cmdline").read_bytes()
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        numbers = [each for each in environment if each.startswith(b"RANK=")]
        alone = rank == 0 and not numbers and b"training.launch" not in command
        if asked in command and (alone or f"RANK={rank}".encode() in numbers):
            os.kill(int(folder.name), signal.SIGKILL)
            struck = True
    assert struck, f"no rank {rank} is at work"
