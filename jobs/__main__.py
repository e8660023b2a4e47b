"""`python -m jobs`: run the operator, render the objects that it would create, print the CRD."""

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
from tuning.errors import TuningError, not_installed

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
        str | None, typer.Option(metavar="FILE", help="For use outside of the cluster.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port of /healthz, /readyz and /metrics.")] = 8081,
    workers: Annotated[int, typer.Option(help="Concurrent reconciles.")] = 4,
    elect: Annotated[bool, typer.Option(help="Take part in leader election.")] = True,
) -> None:
    """Reconcile Workspaces until SIGTERM."""
    from jobs.api import client
    from jobs.controller import preflight, probes
    from jobs.controller.operator import Operator, Setup

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(probes.JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    settings = _options(options, policy)
    identity = f"{os.environ.get('POD_NAME') or socket.gethostname()}-{os.getpid()}"
    setup = Setup(identity, settings.operator_namespace, elect=elect, workers=workers)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with client.connect(kubeconfig, threads=workers) as cluster:
        operator = Operator(cluster, settings, setup)
        preflight.check(cluster, settings, stop)
        with probes.serving(
            port,
            healthy=lambda: operator.healthy,
            ready=lambda: operator.ready,
            metrics=operator.metrics,
        ):
            stopped = operator.run(stop)
    raise typer.Exit(0 if stopped else 1)


@app.command()
def render(
    file: Annotated[
        Path, typer.Option("-f", "--file", metavar="FILE", help="Workspace YAML; - is the input.")
    ],
    options: OptionsFile = None,
    policy: PolicyFile = None,
    namespace: Annotated[str, typer.Option(help="Used if the file has none.")] = "default",
) -> None:
    """Print what the operator would create for the Workspace in FILE."""
    from jobs.render import render as render_file

    _print(render_file(file, _options(options, policy), namespace=namespace))


@app.command()
def crd() -> None:
    """Print the CustomResourceDefinition."""
    _print([crds.definition()])


def _options(path: Path | None, policy: Path | None) -> Options:
    options = option_files.load(path)
    return option_files.with_policy(options, policy) if policy else options


def _print(documents: list[dict[str, Any]]) -> None:
    try:
        yaml.safe_dump_all(documents, sys.stdout, sort_keys=False, width=100)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Run a command; a TuningError is printed without a traceback and sets the exit code."""
    try:
        app()
    except ModuleNotFoundError as error:
        known = not_installed(error)
        sys.stderr.write(f"{known}\n")
        sys.exit(known.exit_code)
    except TuningError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
