"""The commands that list what is known: presets, version."""

from __future__ import annotations

from typing import Annotated

import typer

import tuning
from tuning.cli import options as option
from tuning.cli.app import app


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
) -> None:
    """Print the version."""
    from tuning.cli import tables

    print(tuning.__version__)
    if verbose:
        print("\n".join(tables.environment()))
