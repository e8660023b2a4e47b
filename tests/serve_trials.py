"""Forks a server for each line on stdin (settings as JSON): one import for many starts.

Prints `[pid, log]` when one is forked, and `[pid, exit code]` when it has ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tuning.console import Console
from tuning.errors import TuningError
from tuning.serve import listening, protocol, server
from tuning.serve.options import Limits, Options

TINY = Path("examples/tiny-model")


def serve(settings: dict[str, Any], log: Path) -> int:
    """Be a server, in a child; gives its exit code."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    protocol.TimeoutProtocol.timeout_seconds = settings.pop("timeout", protocol.TIMEOUT_SECONDS)
    base, delay = Path(settings.pop("base", TINY)), settings.pop("delay", 0.0)
    limits = Limits(seconds=settings.pop("seconds", 600.0))
    options = Options(
        "tiny-model", weights=lambda: time.sleep(delay) or base, port=0, limits=limits, **settings
    )
    console = Console()
    try:
        with listening.socket_for(options) as listener:
            console.say(f"Listening on http://127.0.0.1:{listener.getsockname()[1]}")
            server.run(options, listener, console)
    except TuningError as error:
        console.say(str(error))
        return error.exit_code
    return 0


def reap(pid: int) -> None:
    """Tell how a child ended."""
    _, status = os.waitpid(pid, 0)
    print(json.dumps([pid, os.waitstatus_to_exitcode(status)]), flush=True)


def main() -> None:
    """Fork for each line; at the end of the lines end every child."""
    folder, pids = Path(sys.argv[1]), []
    for number, line in enumerate(sys.stdin):
        log = folder / f"trial-{number}.log"
        log.touch()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = serve(json.loads(line), log)
            finally:
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
        print(json.dumps([pid, str(log)]), flush=True)
        threading.Thread(target=reap, args=(pid,), daemon=True).start()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)


if __name__ == "__main__":
    main()
