"""The typer application, and the exit code of every way it can end."""

from __future__ import annotations

import logging
import os
import signal
import sys

import typer

from tuning.errors import Stopped, TuningError, UsageError

app = typer.Typer(
    name="tuning",
    help="""Fine-tune a language model from one YAML, and get the adapter as one OCI image.

    \b
    python -m tuning plan -f workspace.yaml     what would be done, and why
    python -m tuning preview -f workspace.yaml  what the data becomes, token by token
    python -m tuning run  -f workspace.yaml     do it; the same command again goes on
    python -m tuning chat --base MODEL --adapter IMAGE --compare
    python -m tuning serve --base MODEL --adapter NAME=IMAGE
    """,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


_CTRL_C = 130


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run the command line and return its exit code (docs/errors.md)."""
    if not sys.stderr.isatty():  # no progress bars in a log
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    signal.signal(signal.SIGTERM, _interrupt)  # so that scratch folders are removed
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional kernels
    try:
        code = app(standalone_mode=False)  # typer returns the code of Exit and of Ctrl-C
        if isinstance(code, int) and code:
            return Stopped.exit_code if code == _CTRL_C else code
    except TuningError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except typer.Exit as end:
        return end.exit_code
    except typer.TyperException as error:
        usage = UsageError.at("USE-101", "", error.format_message(), "see --help")
        print(usage, file=sys.stderr)
        return usage.exit_code
    except ModuleNotFoundError as error:
        if (error.name or "tuning").partition(".")[0] == "tuning":
            raise
        what = f"this command needs {error.name}, which is not installed"
        change = "pip install 'tuning[train]', or make install"
        if error.name == "gguf":
            change = "pip install 'tuning[gguf]'"
        missing = UsageError.at("USE-102", "", what, change)
        print(missing, file=sys.stderr)
        return missing.exit_code
    except SystemExit as end:  # rich and click end the process when a reader closes our output
        broken = isinstance(end.__context__, BrokenPipeError)
        return 0 if broken else end.code if isinstance(end.code, int) else 1
    except (KeyboardInterrupt, typer.Abort):
        return Stopped.exit_code
    except BrokenPipeError:  # the reader of our output has closed it
        sys.stderr.close()
        return 0
    return 0
