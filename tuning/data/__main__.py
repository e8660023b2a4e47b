"""The child process: see the package's docstring for what it is asked and answers."""

from __future__ import annotations

import sys
from typing import Any

from tuning import process


def work(request: dict[str, Any]) -> dict[str, Any]:
    """Do the step that `request` names."""
    if request["step"] == "pack":
        from tuning.data import pack

        return pack.run(request)
    from tuning.data import tokenise

    return tokenise.run(request)


if __name__ == "__main__":
    sys.exit(process.serve(work))
