"""The trackers of a run: a child process feeds each of them beside the training.

A tracker costs the run nothing but a warning: its child alone waits for it, and is ended when the
run is over and its time as well.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tuning import files, process
from tuning.errors import Stopped
from tuning.pipeline import outcome
from tuning.pipeline.run import Run, Value, key_of
from tuning.trackers import place
from tuning.trackers.feed import State
from tuning.trackers.values import Ending

ROOM = "trackers.feed"
LAST: dict[Ending, float] = {"finished": 20.0, "failed": 10.0, "stopped": 2.0}  # seconds at the end
KILL = 1.5  # seconds in which a child that had its time is gone
FOLDER = "trackers"  # of the run directory: a state for each
TOLD = 1.0  # seconds between two looks at what a child reports


@contextmanager
def followed(
    run: Run, recipe: Value, run_id: str, *, trained: bool = False
) -> Iterator[dict[str, Any]]:
    """Feed the trackers of `run` while the block runs; yields what to add at its end.

    `trained`: metrics.jsonl is that of this run already.
    """
    facts: dict[str, Any] = {}
    names = run.spec.settings.report_to or ()
    feeds = [_Feed(run, name, recipe, run_id, trained=trained) for name in names]
    ending: Ending = "failed"
    try:
        yield facts
        ending = "finished"
    except (Stopped, KeyboardInterrupt):
        ending = "stopped"
        raise
    finally:
        for feed in feeds:
            feed.ask_to_end(ending, facts)
        for feed in feeds:
            feed.join(ending)


def catch_up(run: Run, run_id: str) -> None:
    """Send what the trackers of a finished run lack."""
    names = run.spec.settings.report_to or ()
    if all(state(run.folder, name).done for name in names):
        return
    recipe = files.read_json(run.folder / "plan.json")["recipe"]
    with followed(run, recipe, run_id, trained=True):
        pass


class _Feed:
    """The child of one tracker, in a thread of this process."""

    def __init__(self, run: Run, name: str, recipe: Value, run_id: str, *, trained: bool) -> None:
        self.run, self.name = run, name
        logs = run.folder / "log"
        logs.mkdir(exist_ok=True)
        (run.folder / FOLDER).mkdir(exist_ok=True)
        now = replace(state(run.folder, name), done=False, problem="")
        files.write_json(run.folder / FOLDER / f"{name}.json", asdict(now))
        self.end_file = logs / f"{name}.end.json"
        self.end_file.unlink(missing_ok=True)
        self.request = _request(run, name, recipe, run_id)
        self.request |= {"end": str(self.end_file)}
        before = None if trained else outcome.metrics_state(run.folder)
        self.request |= {"before": before}
        self.deadline = float("inf")
        self.warned = self.linked = False
        self.looked = 0.0
        self.lost = ""  # why the child itself ended
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        try:
            process.run(
                ROOM,
                self.run.folder / "log" / f"{self.name}.json",
                self.request,
                log=self.run.folder / "log" / f"{self.name}.log",
                keep_open=(self.run.journal.lock,),
                stop_asked=lambda: time.monotonic() > self.deadline,
                tick=self._tick,
                environment=place.environment(self.name),
                grace=0.5,
            )
        except Exception as error:  # whatever it is, the run goes on
            self.lost = f"{type(error).__name__}: {error}"

    def _tick(self) -> None:
        """Say once where the run is shown, and once what keeps it from being shown."""
        if time.monotonic() - self.looked < TOLD:
            return
        self.looked = time.monotonic()
        now = state(self.run.folder, self.name)
        if now.problem and not self.warned:
            self.warned = True
            self._warn(f"{now.problem}; the run goes on without it")
        if now.link and not self.linked:
            self.linked = True
            self.run.console.say(f"  {self.name}: {now.link}")

    def ask_to_end(self, ending: Ending, facts: Mapping[str, Any]) -> None:
        """Let the child send the rest and end, while its time lasts."""
        with suppress(OSError):  # a full disk: the child is ended below
            files.write_json(self.end_file, {"ending": ending, "facts": dict(facts)})
        self.deadline = time.monotonic() + LAST[ending]

    def join(self, ending: Ending) -> None:
        """Wait for the child, but not for long, and record what became of the tracker."""
        self.thread.join(max(0.0, self.deadline - time.monotonic()) + KILL)
        now = state(self.run.folder, self.name)
        if not now.done and ending != "stopped":
            why = now.problem or self.lost or "it took too long"
            sent = f"has the steps to {now.sent[0]:,}" if now.sent[0] else "has no step"
            self._warn(f"{sent} ({why}); the same command again sends the rest")
        with suppress(OSError):
            self.run.journal.append(
                "track",
                "sent" if now.done else "unsent",
                self.request["run"]["identity"],
                tracker=self.name,
                id=now.id,
                link=now.link,
                step=now.sent[0],
            )

    def _warn(self, text: str) -> None:
        self.run.console.say(f"  tracker {self.name}: {text}", style="yellow")


def state(folder: Path, name: str) -> State:
    """What the tracker `name` was sent by the run in `folder`."""
    return State.read(folder / FOLDER / f"{name}.json")


def links(folder: Path) -> dict[str, str]:
    """The run's page at each tracker that has one."""
    found = {path.stem: State.read(path).link for path in sorted((folder / FOLDER).glob("*.json"))}
    return {name: link for name, link in found.items() if link}


def _request(run: Run, name: str, recipe: Value, run_id: str) -> Value:
    spec, options = run.spec, run.options
    where = place.place(spec, name, options.tracker_secrets)
    policy = options.policy
    named = f"{spec.name}-{run_id[:8]}"
    return {
        "tracker": name,
        "address": where.address,
        "trusted": where.trusted,
        "secrets": options.tracker_secrets and str(options.tracker_secrets),
        "ca": options.access.ca and str(options.access.ca),
        "allow_hosts": sorted(policy.allow_hosts),
        "proxy": policy.proxy,
        "no_proxy": sorted(policy.no_proxy),
        "ca_bundle": policy.ca_bundle and str(policy.ca_bundle),
        "metrics": str(run.folder / "metrics.jsonl"),
        "state": str(run.folder / FOLDER / f"{name}.json"),
        "run": {
            "identity": key_of(spec.namespace, spec.name, run_id),
            "name": spec.settings.run_name or named,
            "project": spec.settings.project,
            "facts": {"run_id": run_id, **_flat(recipe)},
            "run_dir": str(run.folder.absolute()),
        },
    }


def _flat(recipe: Value) -> Value:
    """The recipe as parameters: what is set, texts and numbers as they are."""
    return {
        key: value if isinstance(value, str | int | float | bool) else f"{value}"
        for key, value in recipe.items()
        if value not in (None, (), [], {}, "")
    }
