"""Strikes a run at one exact event; on the path of tests' children only, see `faults/kills.py`.

Python tells its audit hooks of each file that is opened, renamed or removed, of each folder made
and each process started, before it happens. The environment's AIM says which of them is meant.
"""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

KINDS = {
    "open",
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "shutil.rmtree",
    "subprocess.Popen",
}


def _room():
    words = [*sys.orig_argv, "", "", ""]  # python -m tuning.process ROOM REQUEST, or -m tuning
    return f"tuning.{words[3]}" if words[2] == "tuning.process" else words[2]


class _Aim:
    def __init__(self, event, text, *, room="", nth=1, after=False, seconds=0.0, act="kill"):
        self.event, self.text, self.act = event, re.compile(text), act
        self.nth, self.after, self.seconds = nth, after, seconds
        self.here = room in ("", _room())
        self.met, self.struck, self.next = 0, False, False

    def __call__(self, event, arguments):
        if self.struck or not self.here or event not in KINDS:
            return
        if self.next:  # what was aimed at has happened
            self.strike()
        elif event == self.event and self.text.search(" ".join(map(str, arguments))):
            self.met += 1
            if self.met == self.nth:
                if self.after:
                    self.next = True
                elif self.seconds:
                    self.struck = True
                    threading.Timer(self.seconds, self.strike).start()
                else:
                    self.strike()

    def strike(self):
        self.struck = True
        if marker := os.environ.get("AIM_MARKER"):
            os.close(os.open(marker, os.O_CREAT | os.O_WRONLY))
        run = int(os.environ["AIM_RUN"])
        if self.act == "kill":  # the whole run: this child has to die with its parent
            os.kill(run, signal.SIGKILL)
            time.sleep(60)
        elif self.act == "term":
            os.kill(run, signal.SIGTERM)
        elif self.act in signal.Signals.__members__:  # this process alone
            os.kill(os.getpid(), signal.Signals[self.act])
            time.sleep(60)
        elif self.act == "exhaust":  # until the kernel kills
            taken = []
            while True:
                taken.append(bytearray(os.urandom(1 << 20)) * 64)
        elif self.act == "memory":
            raise MemoryError
        elif self.act == "fill":  # the disk of the run directory
            with contextlib.suppress(OSError), Path(os.environ["AIM_MARKER"]).open("ab") as file:
                while True:
                    file.write(bytes(4096))
                    file.flush()
        elif self.act == "hang":
            threading.Event().wait()


if "AIM" in os.environ:
    os.environ.setdefault("AIM_RUN", str(os.getpid()))  # inherited by the run's children
    sys.addaudithook(_Aim(**json.loads(os.environ["AIM"])))
