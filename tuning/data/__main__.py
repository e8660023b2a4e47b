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


if __name__ == "__main__":
    # Tokenizers need no torch, and transformers does without where there is none: that saves this
    # process 260 MB, and three seconds of importing it.
    sys.modules["torch"] = None  # type: ignore[assignment]
    logging.getLogger("transformers").addFilter(lambda record: "PyTorch was" not in record.msg)
    sys.exit(process.serve(work))
