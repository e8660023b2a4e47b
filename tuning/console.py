"""Messages and progress on stderr: a bar on a terminal, otherwise a line every ten seconds.

stdout is kept for data. NO_COLOR is honoured (by rich). Long work reports to a `Report`, a callable
that `Console.work` makes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich.console
import rich.progress
import rich.text

from tuning.errors import printable, redact

Report = Callable[[float, float | None, str], None]  # done, total (None: unknown), note
LINE_EVERY = 10.0  # seconds between two progress lines where there is no terminal


class Console:
    """Prints messages and progress on stderr."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._out = rich.console.Console(stderr=True, quiet=quiet, highlight=False)

    def say(self, text: str, *, style: str = "") -> None:
        """Print `text` without credentials and control characters; markup in it is plain text."""
        self._out.print(rich.text.Text(printable(redact(text)), style=style), soft_wrap=True)

    @contextmanager
    def work(
        self, title: str, *, unit: str = "", lines_every: float = LINE_EVERY
    ) -> Iterator[Report]:
        """Show the progress of `title` while the block runs; yields the callable to report to."""
        if self._out.is_terminal:
            yield from self._bar(title, unit)
        else:
            yield self._lines(title, unit, lines_every)

    def _bar(self, title: str, unit: str) -> Iterator[Report]:
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.fields[amount]}"),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
        )
        with rich.progress.Progress(*columns, console=self._out, transient=True) as bar:
            task = bar.add_task(title, total=None, amount="")

            def report(done: float, total: float | None, note: str) -> None:
                text = " ".join(part for part in (amount(done, total, unit), note) if part)
                bar.update(task, completed=done, total=total, amount=printable(text))

            yield report

    def _lines(self, title: str, unit: str, every: float) -> Report:
        last = time.monotonic()

        def report(done: float, total: float | None, note: str) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= every:
                last = now
                parts = (f"{title}:", amount(done, total, unit), note)
                self.say(" ".join(part for part in parts if part))

        return report


def amount(done: float, total: float | None, unit: str) -> str:
    """`done` of `total` as text: sizes where the unit is bytes, whole numbers otherwise."""
    if unit == "bytes":
        return size(done) + (f" of {size(total)}" if total else "")
    return f"{done:,.0f}" + (f"/{total:,.0f}" if total else "") + (f" {unit}" if unit else "")


def size(count: float) -> str:
    """A number of bytes as text: 912 B, 8.0 MiB, 7.1 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def duration(seconds: float) -> str:
    """Seconds as text: 45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 90:
        return f"{whole} s"
    if whole < 5400:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
