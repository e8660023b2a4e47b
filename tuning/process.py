"""Child processes that answer by a file.

The parent process owns signals, journal and exit code and never imports torch; the heavy phases run
as `python -m tuning.<room> REQUEST`, a JSON file, and leave `<REQUEST stem>.result.json` beside it.
A launcher may lose an exit code and a log may be cut, so the file alone is the answer: either
`{"ok": value}` or `{"error": {...}}`. No file means that the child was killed.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tuning import files
from tuning.errors import TransientError, TuningError, from_json


class ChildDied(Exception):
    """The child left no answer: killed from outside (negative `status`) or broken by a bug."""

    def __init__(self, room: str, status: int) -> None:
        self.room, self.status = room, status
        super().__init__(f"tuning.{room} ended with status {status} and left no answer")


def result_path(request: Path) -> Path:
    """Where the child that was given `request` leaves its answer."""
    return request.with_name(request.name.removesuffix(".json") + ".result.json")


def serve(work: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """The child's whole life: read the request named on the command line, work, answer.

    Returns the exit status. An error that a person can act on travels as it is; anything else is a
    bug of ours: its traceback goes to stderr and into the answer.
    """
    request = Path(sys.argv[1])
    answer = result_path(request)
    try:
        files.write_json(answer, {"ok": work(files.read_json(request))})
        return 0
    except TuningError as error:
        files.write_json(answer, {"error": error.to_json()})
        return error.exit_code
    except Exception as error:
        full = disk_full(error)
        if full is not None:
            files.write_json(answer, {"error": full.to_json()})
            return full.exit_code
        traceback.print_exc()
        files.write_json(answer, {"bug": traceback.format_exc()})
        return 1


def disk_full(error: BaseException) -> TransientError | None:
    """`error` as the disk-full error, if the operating system said so."""
    if isinstance(error, OSError) and error.errno in (28, 122):  # ENOSPC, EDQUOT
        return TransientError.at(
            "RUN-120",
            str(error.filename or "disk"),
            "no space left on the device",
            "free some space and run the same command again; it goes on where it stopped",
        )
    return None
