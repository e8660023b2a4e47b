"""W&B and Trackio, by their own packages: their protocols are theirs to change.

Both pass numbers on from threads and processes of their own, so that what they were given may be
lost by a kill: what their stores hold counts, where they say it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuning.trackers import place
from tuning.trackers.values import BEFORE, Ending, Identity, Key, Point

STEP = "train/global_step"  # the axis, as transformers names it
INIT_SECONDS, FINISH_SECONDS = 60.0, 15.0


class Wandb:
    """A run of W&B. Nothing but numbers and the recipe is sent: no output, code, host or load."""

    def __init__(self, run: Identity, *, address: str | None, secrets: Path | None) -> None:
        wandb: Any = importlib.import_module("wandb")
        own = {"base_url": address, "api_key": place.value("WANDB_API_KEY", secrets)}
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            silent=True,
            symlink=False,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            **{name: value for name, value in own.items() if value},
        )
        self._run = wandb.init(
            project=run.project or os.environ.get("WANDB_PROJECT") or "tuning",
            name=run.name,
            id=run.identity,
            resume="allow",
            config=run.facts,
            dir=str(run.run_dir),
            settings=settings,
        )
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)
        self.id: str | None = run.identity
        self.link: str | None = self._run.url
        # offline each start writes a file of its own, and a kill cuts the last one: all goes again
        last = self._run.summary.get(STEP) if self.link else None
        self.sent: Key | int | None = int(last) if last else BEFORE

    def send(self, points: Sequence[Point]) -> None:
        """Hand the points to its process."""
        for point in points:
            self._run.log({**point.grouped(), STEP: point.step})

    def close(self, ending: Ending, facts: dict[str, Any]) -> None:
        """Wait until its process has sent all."""
        self._run.summary.update(facts)
        self._run.finish(exit_code=0 if ending == "finished" else 1)


class Trackio:
    """A run in Trackio's own store in the run directory, or where TRACKIO_* say."""

    link: str | None = None

    def __init__(self, run: Identity) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(run.run_dir / "trackio"))
        trackio: Any = importlib.import_module("trackio")
        self._run = trackio.init(
            project=run.project or os.environ.get("TRACKIO_PROJECT") or "tuning",
            name=run.name,
            resume="allow",
            config=run.facts,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.id: str | None = run.name
        last = self._run._initial_last_step
        self.sent: Key | int | None = BEFORE if last is None else int(last)

    def send(self, points: Sequence[Point]) -> None:
        """Hand the points to its thread."""
        for point in points:
            self._run.log(point.grouped(), step=point.step)

    def close(self, ending: Ending, facts: dict[str, Any]) -> None:
        """Wait until its thread has written all."""
        self._run.finish()
