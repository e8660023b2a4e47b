"""How a run can end, told so that a person can act on it."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable
from pathlib import Path

from tuning import process
from tuning.errors import Killed, Problem, Stopped, TransientError, TuningError


def known(error: Exception, phase: str, folder: Path) -> TuningError:
    """`error` as one that a person can read; the traceback of a bug goes into `folder`."""
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
    """A signal came, and the state is saved."""
    return Stopped.at(
        "RUN-110", phase, "stopped by a signal, state saved", "run the same command again to go on"
    )


def hang(hung: process.Hung, phase: str, output: Path) -> TransientError:
    """A child was silent for too long."""
    return TransientError.at(
        "RUN-112",
        phase,
        f"no sign of life for {hung.seconds:.0f} s, so the process was killed; where each of its "
        f"threads stood is at the end of {output}",
        "run the same command again; it goes on from the last checkpoint",
    )


def death(died: process.ChildDied, phase: str, output: Path) -> TuningError:
    """A child left no answer: killed from outside, or a bug of ours."""
    if died.status >= 0:
        what = f"internal error; the traceback is in {output}"
        return TuningError.at("RUN-198", phase, what, "report it with that file")
    number = -died.status
    name = signal.Signals(number).name
    why = " (mostly the kernel, out of memory)" if number == signal.SIGKILL else ""
    problem = Problem(
        "RUN-111",
        phase,
        f"the process was killed by {name}{why}",
        f"give it more memory, or run the same command again to go on; see {output}",
    )
    return Killed([problem], signal=number)


def together(*checks: Callable[[], object]) -> None:
    """Run every check; raise one error with the problems of all, of the first one's kind."""
    errors: list[TuningError] = []
    for check in checks:
        try:
            check()
        except TuningError as error:
            errors.append(error)
    if errors:
        found = (problem for error in errors for problem in error.problems)
        raise type(errors[0])(dict.fromkeys(found))
