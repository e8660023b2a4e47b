"""The child process: see the package's docstring for what it is asked and answers."""

from __future__ import annotations

import logging
import sys
from typing import Any

from tuning import process


def work(request: dict[str, Any]) -> dict[str, Any]:
    """Do the step that `request` names."""
    if request["step"] == "pack":
        from tuning.data import pack

        return pack.run(request)
    if request["step"] == "part":
        from tuning.data import parallel

        return parallel.work(request)
    from tuning.data import tokenise

    return tokenise.run(request)


def without_torch() -> None:
    """Let torch count as not installed in this process, unless it is loaded already.

    A fast tokenizer does not need it, but transformers imports what is there: three quarters of
    the time of reading a few thousand rows, and 260 MB.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # as the import system does
    logging.getLogger("transformers").addFilter(lambda record: "PyTorch was" not in record.msg)


if __name__ == "__main__":
    without_torch()
    sys.exit(process.serve(work))
