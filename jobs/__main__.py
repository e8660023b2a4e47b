"""`python -m jobs`: the operator; `render` shows what it would create, `crd` prints the CRD."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from jobs.api import crd as crds
from jobs.api import options as option_files
from jobs.api.options import Options
from jobs.controller import probes
from tuning.errors import TuningError

app = typer.Typer(
    help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
OptionsFile = Annotated[
    Path | None, typer.Option("--options", metavar="FILE", help="The operator's options (YAML).")
]
PolicyFile = Annotated[
    Path | None, typer.Option("--policy", metavar="FILE", help="The policy that Jobs obey.")
]


@app.command()
def run(
    options: OptionsFile = None,
    policy: PolicyFile = None,
    kubeconfig: Annotated[
        str | None, typer.Option(metavar="FILE", help="Outside a cluster: how to reach it.")
    ] = None,
    port: Annotated[int, typer.Option(help="Of /healthz, /readyz and /metrics.")] = 8081,
    workers: Annotated[int, typer.Option(help="Workspaces looked at at once.")] = 4,
    elect: Annotated[bool, typer.Option(help="Take part in the election of one writer.")] = True,
) -> None:
    """Look after Workspaces until SIGTERM."""
    from jobs.api import client
    from jobs.controller import preflight
    from jobs.controller.operator import Operator, Setup

    _log_json()
    decided = _options(options, policy)
    identity = f"{os.environ.get('POD_NAME') or socket.gethostname()}-{os.getpid()}"
    reached = client.connect(kubeconfig, threads=workers)
    setup = Setup(identity, decided.operator_namespace, elect=elect, workers=workers)
    operator = Operator(reached, decided, setup)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    preflight.check(reached, decided, stop)
    with probes.serving(
        port,
        healthy=lambda: operator.healthy,
        ready=lambda: operator.ready,
        metrics=operator.metrics,
    ):
        kept = operator.run(stop)
    raise typer.Exit(0 if kept else 1)


@app.command()
def render(
    file: Annotated[Path, typer.Option("-f", "--file", metavar="FILE", help="Workspace YAML.")],
    options: OptionsFile = None,
    policy: PolicyFile = None,
    namespace: Annotated[str, typer.Option(help="Where the file names none.")] = "default",
) -> None:
    """Print what the operator would create for the Workspace in FILE."""
    from jobs.render import render as rendered

    _print(rendered(file, _options(options, policy), namespace=namespace))


@app.command()
def crd() -> None:
    """Print the CustomResourceDefinition."""
    _print([crds.definition()])


def _options(path: Path | None, policy: Path | None) -> Options:
    decided = option_files.load(path)
    if policy is None:
        return decided
    return option_files.with_policy(decided, policy)


def _print(documents: list[dict[str, Any]]) -> None:
    yaml.safe_dump_all(documents, sys.stdout, sort_keys=False, width=100)


def _log_json() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(probes.JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def main() -> None:
    """Errors for people go to stderr as they are, with their exit code."""
    try:
        app()
    except TuningError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
