"""The errors that a run can end with."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from tuning import files, gpu_errors, process
from tuning.errors import Killed, Problem, Stopped, TransientError, TuningError

T = TypeVar("T")
APART = "RUN-114"
LOST = "TRAIN-141"  # a training child says so: another machine is gone


def known(error: Exception, phase: str, folder: Path) -> TuningError:
    """`error` as a TuningError; the traceback of any other exception goes into `folder`."""
    known = error if isinstance(error, TuningError) else files.system_error(error, folder)
    known = known or gpu_errors.known(error)
    if known is None:
        path = folder / "traceback.txt"
        with suppress(OSError):
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


def apart(error: process.Apart, phase: str) -> TransientError:
    """The error for a machine that did not meet the others of its job in time."""
    what = f"the machines of the job did not meet: {error}"
    change = "run the same command again on each; all must name the same --nodes and --meet"
    return TransientError.at("RUN-114", phase, what, change)


class KilledForMemory(Killed):
    """The kernel killed a child because memory ran out."""


def death(died: process.ChildDied, phase: str, output: Path, *, for_memory: bool) -> TuningError:
    """The error for a child without a result: killed from outside, or a bug of ours.

    `for_memory`: the kernel counted a kill for want of memory meanwhile.
    """
    if died.status == 0:
        what = f"the result of the process was lost or damaged; its output is in {output}"
        return TransientError.at("RUN-113", phase, what, "run the same command again")
    if died.status > 0:
        what = f"internal error; the traceback is in {output}"
        return TuningError.at("RUN-198", phase, what, "report it with that file")
    number = -died.status
    by_kernel = for_memory and number == signal.SIGKILL
    problem = Problem(
        "RUN-111",
        phase,
        f"the process was killed by {_signal_name(number)}"
        + (" (by the kernel, out of memory)" if by_kernel else ""),
        ("give it more memory, or " if by_kernel else "")
        + f"run the same command again to continue; see {output}",
    )
    return (KilledForMemory if by_kernel else Killed)([problem], signal=number)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


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
