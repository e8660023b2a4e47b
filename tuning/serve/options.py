"""Options of a server, and how a command line becomes them. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

from tuning.errors import SpecError, UsageError
from tuning.oci.delivery import Access
from tuning.plan import inference
from tuning.serve import adapter_specs
from tuning.serve.adapter_specs import AdapterSpec

MIN_KEY = 16  # characters


@dataclass(frozen=True)
class Limits:
    """Limits of requests."""

    tokens: int = 4096  # of one answer
    default_tokens: int = 512  # of one answer, where the request sets no limit
    seconds: float = 600.0  # from the request to the end of its answer
    waiting: int = 128  # answers in the queue


@dataclass(frozen=True)
class Options:
    """Options of a server."""

    base: str  # the base model's name
    weights: Callable[[], Path]  # returns the base model's folder, fetched if needed
    adapters: tuple[AdapterSpec, ...] = ()
    combined: str = "tuned"  # name of the combined model
    host: str = "127.0.0.1"
    any_host: bool = False  # without keys: whatever name a request has for this server
    port: int = 8000
    keys: tuple[bytes, ...] = ()  # each is valid; without keys no authorization is required
    precision: inference.Precision = "auto"
    context: int | None = None
    requests: int = 32  # concurrent answers
    limits: Limits = Limits()
    linger: float = 5.0  # seconds between SIGTERM and the last new request
    grace: float = 60.0  # seconds for running requests after that
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

    `adapters` are `NAME=SOURCE[@STRENGTH]`; a base folder without `base_name` is named by its last
    part; `others` are fields of Options.
    """
    if precision not in get_args(inference.Precision):
        what = f"{precision[:40]!r} is unknown"
        change = f"write one of {', '.join(get_args(inference.Precision))}"
        raise UsageError.at("SERVE-106", "--precision", what, change)
    folder = Path(base)
    name = base_name or (folder.resolve().name if folder.is_dir() else base)
    specs = tuple(map(adapter_specs.parse, adapters))
    known = cast(inference.Precision, precision)
    keys = read_keys(key_file) if key_file else ()
    options = Options(name, adapters=specs, precision=known, keys=keys, **others)
    adapter_specs.check(specs, base=options.base, combined=options.combined)
    return options


def read_keys(path: Path) -> tuple[bytes, ...]:
    """The keys in a file, one per line, so that old and new keys are valid during a rotation.

    Raises SpecError if there is none, or one is too short to be a secret.
    """
    try:
        keys = tuple(line for raw in path.read_bytes().splitlines() if (line := raw.strip()))
    except OSError as error:
        what, change = f"cannot be read ({error.strerror})", "name a file with the key"
        raise SpecError.at("SERVE-103", str(path), what, change) from None
    if not keys or any(len(key) < MIN_KEY for key in keys):
        what = f"holds a key of less than {MIN_KEY} characters" if keys else "holds no key"
        change = "write one there: openssl rand -hex 32"
        raise SpecError.at("SERVE-103", str(path), what, change)
    return keys
