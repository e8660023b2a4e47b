"""Fine-tuning jobs from one YAML: which model, which data, where to push.

    import tuning

    spec = tuning.load(model="org/model", data="rows.csv", output="oci:adapter")
    print(tuning.plan(spec).reasons)
    result = tuning.run(spec, on_step=print)

These names are the Python API (`tuning.api`; docs/python.md); all else may change.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tuning.api import (
        LiveChart,
        Logins,
        Result,
        Spec,
        TuningError,
        check,
        load,
        plan,
        preview,
        pull,
        run,
    )

__version__ = "0.1.0"
__all__ = [
    "LiveChart",
    "Logins",
    "Result",
    "Spec",
    "TuningError",
    "check",
    "load",
    "plan",
    "preview",
    "pull",
    "run",
]


def __getattr__(name: str) -> object:
    """Names of the API, loaded when they are used; `plan` is the package, which can be called."""
    if name in __all__ and name != "plan":
        return getattr(import_module("tuning.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
