"""The command line: parse, call, print; no logic.

Data goes to stdout, messages to stderr. Each command imports the rooms that it needs, so that
`--help`, `presets` and `plan` start at once.
"""

# Each module adds its commands, in the order in which --help lists them.
# isort: off
from tuning.cli import jobs as _jobs  # noqa: F401
from tuning.cli import adapters as _adapters  # noqa: F401
from tuning.cli import serving as _serving  # noqa: F401
from tuning.cli import evaluation as _evaluation  # noqa: F401
from tuning.cli import documents as _documents  # noqa: F401
from tuning.cli import about as _about  # noqa: F401
from tuning.cli.app import app, main

__all__ = ["app", "main"]
