"""The typer application, and the exit code of every way it can end."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from typing import Annotated

import typer

import tuning
from tuning import files, gpu_errors
from tuning.cli import words
from tuning.errors import Problem, Stopped, TuningError, UsageError, not_installed

app = typer.Typer(
    name="tuning",
    help="""Fine-tune a language model, and get the adapter as one OCI image.

    \b
    tuning plan MODEL                     what would be done, and why
    tuning preview MODEL DATA             what the data becomes, token by token
    tuning run MODEL DATA -o WHERE        do it; the same command again goes on
    tuning init                           the same as a YAML, for a cluster too
    tuning chat --base MODEL --adapter IMAGE --compare
    tuning serve --base MODEL --adapter NAME=IMAGE
    """,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


COMPLETE = "_TUNING_COMPLETE"  # what a shell's completion script sets
_CTRL_C = 130
_UTF8 = "write it in UTF-8; a file whose name is not has to be renamed"


@app.callback()
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Print the version, or the help if no command is named."""
    if version:
        print(tuning.__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run the command line and return its exit code (docs/errors.md)."""
    if not sys.stderr.isatty():  # no progress bars in a log
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    signal.signal(signal.SIGTERM, _interrupt)  # so that scratch folders are removed
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional kernels
    if COMPLETE in os.environ:
        from typer._completion_classes import completion_init

        completion_init()
    if wrong := [word for word in sys.argv[1:] if not files.is_utf8(word)]:
        words = (Problem("USE-111", ascii(word)[1:-1], "is not UTF-8", _UTF8) for word in wrong)
        return _refused(UsageError(words))
    try:
        code = app(standalone_mode=False)  # typer returns the code of Exit and of Ctrl-C
        if isinstance(code, int) and code:
            return Stopped.exit_code if code == _CTRL_C else code
    except TuningError as error:
        return _refused(error)
    except typer.Exit as end:
        return end.exit_code
    except typer.TyperException as error:
        return _refused(UsageError.at("USE-101", "", error.format_message(), "see --help"))
    except ModuleNotFoundError as error:
        return _refused(not_installed(error))
    except SystemExit as end:  # rich and click end the process when a reader closes our output
        broken = isinstance(end.__context__, BrokenPipeError)
        return 0 if broken else end.code if isinstance(end.code, int) else 1
    except (KeyboardInterrupt, typer.Abort):
        return Stopped.exit_code
    except BrokenPipeError:  # the reader of our output has closed it
        sys.stderr.close()
        return 0
    except (RuntimeError, AssertionError) as error:
        if (meaning := gpu_errors.known(error)) is None:
            raise
        return _refused(meaning)
    return 0


def _refused(error: TuningError) -> int:
    """Print `error`, for a program on stdout as well; returns its exit code."""
    error = words.told(error)
    print(error, file=sys.stderr)
    if "--json" in sys.argv[1:]:
        print(json.dumps({"error": error.report()}, indent=2, ensure_ascii=False))
    return error.exit_code
