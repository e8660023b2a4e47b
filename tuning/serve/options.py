"""What a server is asked to be, in values and as words of a command line. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

from tuning.errors import SpecError, UsageError
from tuning.oci.delivery import Access
from tuning.plan import inference
from tuning.serve import names
from tuning.serve.names import Wanted

SHORTEST = 16  # characters of a key


@dataclass(frozen=True)
class Limits:
    """What one request may take at most."""

    tokens: int = 4096  # of one answer
    usual: int = 512  # of one answer, where a request does not say
    seconds: float = 600.0  # from the request to the end of its answer
    waiting: int = 128  # answers in the queue


@dataclass(frozen=True)
class Options:
    """What a server is asked to be."""

    base: str  # its name
    weights: Callable[[], Path]  # the base model's folder, fetched if need be
    wanted: tuple[Wanted, ...] = ()
    combined: str = "tuned"  # name of all adapters together
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[bytes, ...] = ()  # any of them opens; none: no key is asked for
    precision: inference.Precision = "auto"
    context: int | None = None
    requests: int = 32  # answers at once
    limits: Limits = Limits()
    linger: float = 5.0  # seconds between SIGTERM and the last new request
    grace: float = 60.0  # seconds for what runs then
    access: Access = field(default_factory=Access)


def options(
    base: str,
    *,
    adapters: Sequence[str],
    base_name: str | None,
    precision: str,
    key_file: Path | None = None,
    **others: Any,
) -> Options:
    """Options from a command line. Raises UsageError or SpecError.

    `adapters` are `NAME=WHERE[@STRENGTH]`; a base that is a folder is called as its folder;
    `others` are fields of Options.
    """
    if precision not in get_args(inference.Precision):
        what = f"{precision[:40]!r} is not known"
        change = f"write one of {', '.join(get_args(inference.Precision))}"
        raise UsageError.at("SERVE-106", "--precision", what, change)
    folder = Path(base)
    name = base_name or (folder.resolve().name if folder.is_dir() else base)
    wanted = tuple(map(names.parse, adapters))
    how = cast(inference.Precision, precision)
    keys = read_keys(key_file) if key_file else ()
    found = Options(name, wanted=wanted, precision=how, keys=keys, **others)
    names.check(found.wanted, base=found.base, combined=found.combined)
    return found


def read_keys(path: Path) -> tuple[bytes, ...]:
    """The keys in a file, one a line, so that an old and a new one hold while clients change.

    Raises SpecError if there is none, or one is too short to be a secret.
    """
    try:
        keys = tuple(line for raw in path.read_bytes().splitlines() if (line := raw.strip()))
    except OSError as error:
        what, change = f"cannot be read ({error.strerror})", "name a file with the key"
        raise SpecError.at("SERVE-103", str(path), what, change) from None
    if not keys or any(len(key) < SHORTEST for key in keys):
        what = f"holds a key of less than {SHORTEST} characters" if keys else "holds no key"
        change = "write one there: openssl rand -hex 32"
        raise SpecError.at("SERVE-103", str(path), what, change)
    return keys
