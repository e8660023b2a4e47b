"""Talk for people: a bar on a terminal, a line now and then elsewhere, stdout left alone."""

import subprocess
import sys

import pytest

from tuning import console

WORK = """
from tuning.console import Console
shown = Console()
shown.say("see https://u:canary@host.example/x?sig=canary [bold]")
with shown.work("Fetching", unit="bytes", lines_every=0) as report:
    for done in (1 << 20, 2 << 20):
        report(done, 2 << 20, "half way" if done == 1 << 20 else "")
"""


def talk(**environment):
    """What the work says, on stdout and on stderr, where there is no terminal unless forced."""
    return subprocess.run(
        [sys.executable, "-c", WORK],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin:/bin", **environment},
    )


def test_without_a_terminal_there_are_plain_lines():
    """Sizes and notes, no escape sequences, and nothing on stdout."""
    said = talk()

    assert "" == said.stdout
    lines = said.stderr.splitlines()
    assert ["Fetching: 1.0 MiB of 2.0 MiB half way", "Fetching: 2.0 MiB of 2.0 MiB"] == lines[1:]
    assert "\x1b" not in said.stderr


def test_on_a_terminal_there_is_a_bar():
    """The bar is drawn with its amount, and cleared away when the work is done."""
    said = talk(FORCE_COLOR="1", TTY_COMPATIBLE="1", TERM="xterm", COLUMNS="100")

    assert "Fetching" in said.stderr
    assert "━" in said.stderr
    assert "\x1b[" in said.stderr


def test_what_is_said_holds_no_secret_and_is_no_markup():
    """URLs lose user and query; square brackets are text."""
    first = talk().stderr.splitlines()[0]

    assert "see https://host.example/x?<redacted> [bold]" == first


@pytest.mark.parametrize(
    ("count", "text"), [(912, "912 B"), (8 << 20, "8.0 MiB"), (7.12 * 2**30, "7.1 GiB")]
)
def test_sizes_are_in_the_unit_that_suits_them(count, text):
    """Bytes up to a KiB, then one decimal."""
    assert text == console.size(count)


@pytest.mark.parametrize(
    ("seconds", "text"), [(45, "45 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_times_are_in_words(seconds, text):
    """Seconds, then minutes, then hours."""
    assert text == console.duration(seconds)
