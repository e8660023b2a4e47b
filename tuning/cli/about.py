"""The commands that list what is known: presets, version, completion."""

from __future__ import annotations

from typing import Annotated

import typer

import tuning
from tuning.cli import options as option
from tuning.cli.app import COMPLETE, app
from tuning.errors import UsageError


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(help="One preset or instance type.")] = None,
    instances: Annotated[bool, typer.Option(help="List instance types instead.")] = False,
    as_json: option.Json = False,
) -> None:
    """List the base models and machine types that are known by name."""
    from tuning.cli import tables

    records = tables.catalogue(name, instances=instances)
    if as_json:
        tables.print_json(records)
    else:
        tables.display(tables.catalogue_table(records))


@app.command()
def version(
    verbose: Annotated[bool, typer.Option(help="Libraries and devices, for bug reports.")] = False,
    as_json: option.Json = False,
) -> None:
    """Print the version, and with --verbose what a bug report needs."""
    from tuning.cli import tables

    environment = tables.environment() if verbose else []
    if as_json:
        tables.print_json({"version": tuning.__version__, "environment": environment})
        return
    print("\n".join([tuning.__version__, *environment]))


@app.command()
def completion(
    shell: Annotated[str, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")],
) -> None:
    """Print a script that completes commands and options; `source` it from the shell's start file.

    \b
    tuning completion bash > ~/.local/share/bash-completion/completions/tuning
    """
    from typer._completion_shared import get_completion_script

    if shell not in ("bash", "zsh", "fish"):
        raise UsageError.at("USE-108", shell, "is no shell that is known", "name bash, zsh or fish")
    names = {"prog_name": "tuning", "complete_var": COMPLETE}
    print(get_completion_script(**names, shell=shell))
