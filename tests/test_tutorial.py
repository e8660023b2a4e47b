"""The tutorial does what it says, and every command of the pages is one that exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main
from commands import good, tuning

from tuning.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
COMMAND = re.compile(r"(?:python -m )?tuning ([a-z][a-z-]*(?: .*)?)")


def commands_of(text: str) -> list[str]:
    """What follows `tuning` in code blocks, in indented lines, and in `...` of the text."""
    text = re.sub(r"\\\n\s*", " ", text)
    blocks = [line.strip() for line in re.findall(r"^    \S.*$", text, re.M)]
    for block in re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", text, re.M | re.S):
        blocks += block.splitlines()
    blocks += re.findall(r"`((?:python -m )?tuning [^`]+)`", text.replace("\n", " "))
    found = [
        COMMAND.fullmatch(line.removeprefix("$ ").partition("  #")[0].strip()) for line in blocks
    ]
    return [match[1] for match in found if match]


def test_the_tutorial(tmp_path: Path) -> None:
    """Its lines in order: own CSV, preview, plan, run, inspect, chat, pull, and the answer."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name, content in re.findall(r"^```csv file=(\S+)\n(.*?)^```", TUTORIAL, re.M | re.S):
        (tmp_path / name).write_text(content)
    lines = re.findall(r"^    tuning (.+)$", TUTORIAL, re.M)
    said = {line.split()[0]: good(tuning(*shlex.split(line), cwd=tmp_path)) for line in lines}

    assert ["preview", "plan", "run", "inspect", "chat", "pull"] == list(said)
    assert "⟦Fish, squid and krill." in said["preview"]
    assert "after       What do penguins eat? Fish, squid and krill." in said["run"]
    assert "Fish, squid and krill." in said["chat"]
    assert (tmp_path / "penguins-peft" / "adapter_config.json").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_of_the_pages_exist(page: Path) -> None:
    """Each parses: the command, its arguments, every option. Values in capitals stand for one."""
    group = typer.main.get_command(app)
    wrong = []
    for line in commands_of(page.read_text()):
        name, *arguments = shlex.split(line)
        arguments = ["1" if word in ("N", "K", "PORT", "SECONDS") else word for word in arguments]
        command = group.commands.get(name)
        if command is None:
            wrong.append(line)
            continue
        if "..." in line or "[" in line:
            continue  # a form, not a command
        try:
            command.make_context(name, arguments)
        except typer.Exit:
            pass  # --help
        except typer.TyperException as error:
            if "Missing parameter" not in str(error):  # the text names a part of a command
                wrong.append(f"{line}: {error.format_message()}")

    assert [] == wrong
