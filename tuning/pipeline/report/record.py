"""What a run directory tells of its run, for people: journal, plan and metrics, read leniently.

Rows of the data and answers of models are in `Private` alone, which a page that others can reach
over the network is never given.
"""

from __future__ import annotations

import datetime
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuning import files
from tuning.errors import Stopped
from tuning.pipeline import journal, outcome

Value = dict[str, Any]
PRIVATE = ("answers",)  # of the training child's result
WAITING = ("start", "oom", "killed", "lost")  # records of "train" after which it goes on


@dataclass(frozen=True)
class Times:
    """When a run was worked at; seconds."""

    began: str
    ended: str
    elapsed: float
    paused: float  # from the last record of a start to the next start
    trained: float
    starts: int


@dataclass(frozen=True)
class Record:
    """The state of a run, without a row or an answer."""

    folder: Path
    journal: list[Value]
    plan: Value
    metrics: list[Value]

    def value(self, phase: str) -> Value:
        """What `phase` returned last; empty if it never ended."""
        ends = (r["value"] for r in reversed(self.journal) if _is(r, phase, "end"))
        return next(ends, {})

    @property
    def name(self) -> str:
        """The Workspace's name; that of the folder for a run of an older version."""
        names = (r["name"] for r in reversed(self.journal) if isinstance(r.get("name"), str))
        return next(names, self.folder.absolute().name)

    @property
    def recipe(self) -> Value:
        """The recipe of the plan; empty before it."""
        found = self.plan.get("recipe")
        return found if isinstance(found, dict) else {}

    @property
    def base(self) -> str:
        """The base as `--base` takes it: the folder in which it was found, or the hub's id."""
        asked = _json(self.folder / "log" / "train.json")
        return str(asked.get("base_name") or self.recipe.get("base_model", "BASE"))

    @property
    def last(self) -> Value:
        """The last record of the metrics; empty before the first step."""
        return self.metrics[-1] if self.metrics else {}

    @property
    def failure(self) -> Value | None:
        """The journal's record of how the last start failed or was stopped."""
        told = [r for r in self.journal if r["event"] != "note"]
        return told[-1] if told and told[-1]["event"] == "fail" else None

    @property
    def state(self) -> str:
        """One word, or a few, for how the run stands when nobody works at it."""
        if self.failure:
            stopped = self.failure.get("code") == Stopped.exit_code
            return "Interrupted" if stopped else "Failed"
        done = any(_is(r, *end) for r in self._last_start() for end in _DONE)
        return "Finished" if done else "Not finished"

    def _last_start(self) -> list[Value]:
        starts = [n for n, r in enumerate(self.journal) if r["event"] == "begin"]
        return self.journal[starts[-1] if starts else 0 :]

    def times(self, *, until_now: bool) -> Times | None:
        """None before the first record; `until_now` for a run that goes on."""
        stamps = [datetime.datetime.fromisoformat(r["at"]) for r in self.journal]
        if not stamps:
            return None
        if until_now:
            stamps.append(datetime.datetime.now(datetime.UTC))
        paused = trained = 0.0
        for before, after, r, following in zip(
            stamps, stamps[1:], self.journal, [*self.journal[1:], {"event": "now"}], strict=False
        ):
            gap = (after - before).total_seconds()
            if following["event"] == "begin":
                paused += gap
            elif r["phase"] == "train" and r["event"] in WAITING:
                trained += gap
        elapsed = (stamps[-1] - stamps[0]).total_seconds()
        starts = sum(r["event"] == "begin" for r in self.journal)
        ends = [f"{stamp.astimezone(datetime.UTC):%d %b %Y %H:%M UTC}" for stamp in stamps]
        return Times(ends[0], ends[-1], elapsed, paused, trained, starts)


_DONE = (("push", "end"), ("finish", "start"), ("finish", "end"))


def _is(record: Value, phase: str, event: str) -> bool:
    return bool(record["phase"] == phase and record["event"] == event)


@dataclass(frozen=True)
class Private:
    """What a run directory holds of rows and answers, and an evaluation of its adapter."""

    answers: list[Value] = field(default_factory=list)  # to --ask: question, base, tuned
    samples: list[Value] = field(default_factory=list)  # prompt, expected, base, tuned
    evaluation: Value = field(default_factory=dict)  # evaluation.json, as `eval --json` prints it


def read(folder: Path) -> Record:
    """The record of the run directory `folder`; what is absent or damaged is empty."""
    told = journal.records(folder)
    for record in told:
        value = record.get("value")
        if isinstance(value, dict):
            nested = value.get("training")  # of the summary
            for each in (value, nested if isinstance(nested, dict) else {}):
                for name in PRIVATE:
                    each.pop(name, None)
    return Record(folder, told, _json(folder / "plan.json"), outcome.records(folder))


def read_private(folder: Path) -> Private:
    """Answers, samples and evaluation in the run directory `folder`."""
    ends = [r["value"] for r in journal.records(folder) if _is(r, "train", "end")]
    answers = ends[-1].get("answers") if ends else None
    samples = []
    with suppress(OSError):
        for line in (folder / "samples.jsonl").read_bytes().splitlines():
            with suppress(ValueError):
                samples.append(files.parse_json(line))
    kept = [each for each in samples if isinstance(each, dict)]
    return Private(answers or [], kept, _json(folder / "evaluation.json"))


def _json(path: Path) -> Value:
    try:
        value = files.read_json(path)
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
