"""The child process; the package's docstring describes its requests and results."""

from __future__ import annotations

import logging
import sys
from typing import Any

from tuning import process


def work(request: dict[str, Any]) -> dict[str, Any]:
    """Run the step that `request` names."""
    if request["step"] == "pack":
        from tuning.data import pack

        return pack.run(request)
    if request["step"] == "part":
        from tuning.data import parallel

        return parallel.run(request)
    if request["step"] == "ask":
        from tuning.data import prompts

        return prompts.check(request)
    from tuning.data import tokenise

    return tokenise.run(request)


def hide_torch() -> None:
    """Make torch count as not installed in this process, unless it is loaded already.

    Fast tokenizers do not need it, but transformers would import it: three quarters of the time of
    reading a few thousand rows, and 260 MB.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # as the import system does
    logging.getLogger("transformers").addFilter(lambda record: "PyTorch was" not in record.msg)


if __name__ == "__main__":
    hide_torch()
    sys.exit(process.serve(work))
