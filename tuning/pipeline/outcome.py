"""Progress, outcome and termination message of a run. The cluster side reads them too.

Progress is `metrics.jsonl` in the run directory, one object a log step: `step, steps, epoch, loss,
lr, grad_norm, tokens, tokens_per_second, eta_seconds, memory_bytes`. The termination message is at
most 4096 bytes of JSON: `phase, code, reason, message, hint, retryable, step, steps, loss, digest,
peakMemoryBytes, baseRevision, trackers`. baseRevision is the commit to serve the adapter with;
trackers are the pages that show the run, by tracker.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuning import files
from tuning.errors import REASONS, RETRYABLE, TuningError

TERMINATION_LIMIT = 4096
TOLD = ("metrics.jsonl", "samples.jsonl", "evaluation.json")  # of one training, for people


@dataclass(frozen=True)
class Outcome:
    """How a run ended; `code` is the exit code of the process."""

    phase: str
    code: int
    message: str = ""
    hint: str = ""
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    digest: str | None = None
    peak_memory_bytes: int | None = None
    base_revision: str | None = None
    trackers: dict[str, str] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """One CamelCase word for a condition's reason."""
        return REASONS.get(self.code, "Killed")

    def termination_message(self) -> str:
        """The JSON object for the termination log; message and hint are cut to fit the limit."""
        record: dict[str, Any] = {
            "phase": self.phase,
            "code": self.code,
            "reason": self.reason,
            "message": self.message,
            "hint": self.hint,
            "retryable": self.code in RETRYABLE or self.code > 128,
            "step": self.step,
            "steps": self.steps,
            "loss": self.loss,
            "digest": self.digest,
            "peakMemoryBytes": self.peak_memory_bytes,
            "baseRevision": self.base_revision,
            "trackers": self.trackers,
        }
        record = {name: value for name, value in record.items() if value not in (None, "", {})}
        for name in ("message", "hint"):
            excess = len(files.canonical(record)) - TERMINATION_LIMIT
            if excess > 0:
                # a character is at least as long in JSON as in UTF-8, so this cuts enough
                kept = max(0, len(record[name].encode()) - excess - 4)
                record[name] = record[name].encode()[:kept].decode(errors="ignore") + "…"
        return files.canonical(record).decode()


TERMINATION_LOG = Path("/dev/termination-log")


def write_termination(outcome: Outcome, *, path: Path = TERMINATION_LOG) -> None:
    """Write the outcome to the termination log, if the kubelet made one."""
    if path.is_file():  # a mount, so it is written in place
        with suppress(OSError):  # the exit code says it too
            path.write_text(outcome.termination_message())


def failed(
    phase: str,
    error: TuningError,
    progress: dict[str, Any] | None,
    trackers: dict[str, str] | None = None,
) -> Outcome:
    """The outcome of a run that ended in `phase` with `error`."""
    hints = " ".join(dict.fromkeys(problem.change.rstrip(" .") + "." for problem in error.problems))
    return Outcome(
        phase=phase,
        code=error.exit_code,
        message=str(error),
        hint=hints,
        trackers=trackers or {},
        **({k: progress.get(k) for k in ("step", "steps", "loss")} if progress else {}),
    )


def take_up(run: Path, run_id: str) -> None:
    """Let what is told of a training in the run directory be that of the run `run_id`.

    What an earlier run left there, of other settings or data, lies in `log/RUN_ID` until that one
    is taken up again. May be stopped at any point, and called again.
    """
    mark, own = run / "log" / "told.json", run / "log" / run_id
    try:
        owner = str(files.read_json(mark)["run_id"])
    except (OSError, ValueError, TypeError, LookupError):
        owner = run_id
    for name in TOLD:
        if owner != run_id and owner.isalnum() and (run / name).exists():
            (run / "log" / owner).mkdir(exist_ok=True)
            (run / name).replace(run / "log" / owner / name)
    mark.parent.mkdir(exist_ok=True)
    files.write_json(mark, {"run_id": run_id})
    for name in TOLD:
        if (own / name).exists() and not (run / name).exists():
            (own / name).replace(run / name)


def progress(run: Path) -> dict[str, Any] | None:
    """The last whole progress record of the run directory `run`, or None before the first."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 4096))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return None
    return next((record for line in reversed(lines) if (record := metrics_record(line))), None)


def records(run: Path) -> list[dict[str, Any]]:
    """All whole records of metrics.jsonl in the run directory `run`."""
    return list(Follower(run).new())


class Follower:
    """Follows metrics.jsonl: each record once, though a training child that resumes cuts it."""

    def __init__(self, run: Path) -> None:
        self._path = run / "metrics.jsonl"
        self._read = 0  # bytes
        self._seen: set[tuple[int, bool]] = set()

    def new(self) -> Iterator[dict[str, Any]]:
        """The whole records that were added since the last call."""
        try:
            with self._path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(self._read if self._read <= size else 0)
                start, text = file.tell(), file.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._read = start + len(whole)
        for record in filter(None, map(metrics_record, whole.splitlines())):
            key = record["step"], "eval_loss" in record
            if key not in self._seen:
                self._seen.add(key)
                yield record


def metrics_record(line: bytes) -> dict[str, Any] | None:
    """The record in a line of metrics.jsonl; None for a line that is torn or damaged."""
    try:
        record = files.parse_json(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    numbers = ("steps", "loss", "tokens_per_second", "eta_seconds", "memory_bytes")
    sound = all(type(record.get(name, 0)) in (int, float) for name in numbers)
    return record if sound else None


def metrics_state(run: Path) -> tuple[int, int] | None:
    """What changes with each write to metrics.jsonl."""
    try:
        stat = (run / "metrics.jsonl").stat()
    except FileNotFoundError:
        return None
    return stat.st_size, stat.st_mtime_ns
