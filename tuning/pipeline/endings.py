"""The errors that a run can end with."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tuning import process
from tuning.errors import Killed, Problem, Stopped, TransientError, TuningError

T = TypeVar("T")


def known(error: Exception, phase: str, folder: Path) -> TuningError:
    """`error` as a TuningError; the traceback of any other exception goes into `folder`."""
    known = error if isinstance(error, TuningError) else process.disk_full(error)
    if known is None:
        path = folder / "traceback.txt"
        path.write_text("".join(traceback.format_exception(error)))
        known = TuningError.at(
            "RUN-199",
            phase,
            f"internal error, {type(error).__name__}; the traceback is in {path}",
            "report it with that file",
        )
    return known


def stopped(phase: str) -> Stopped:
    """The error of a run that a signal stopped, with its state saved."""
    return Stopped.at(
        "RUN-110",
        phase,
        "stopped by a signal, state saved",
        "run the same command again to continue",
    )


def hang(hung: process.Hung, phase: str, output: Path) -> TransientError:
    """The error for a child that showed no progress for too long."""
    return TransientError.at(
        "RUN-112",
        phase,
        f"no progress for {hung.seconds:.0f} s, so the process was killed; its stacks are at "
        f"the end of {output}",
        "run the same command again; it continues from the last checkpoint",
    )


def death(died: process.ChildDied, phase: str, output: Path) -> TuningError:
    """The error for a child without a result: killed from outside, or a bug of ours."""
    if died.status >= 0:
        what = f"internal error; the traceback is in {output}"
        return TuningError.at("RUN-198", phase, what, "report it with that file")
    number = -died.status
    name = signal.Signals(number).name
    cause = " (usually the kernel, out of memory)" if number == signal.SIGKILL else ""
    problem = Problem(
        "RUN-111",
        phase,
        f"the process was killed by {name}{cause}",
        f"give it more memory, or run the same command again to continue; see {output}",
    )
    return Killed([problem], signal=number)


def together(*checks: Callable[[], T]) -> list[T]:
    """The results of all checks; raises one error with all problems, of the first one's type."""
    results: list[T] = []
    errors: list[TuningError] = []
    for check in checks:
        try:
            results.append(check())
        except TuningError as error:
            errors.append(error)
    if errors:
        problems = (problem for error in errors for problem in error.problems)
        raise type(errors[0])(dict.fromkeys(problems))
    return results
