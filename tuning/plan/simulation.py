"""Models outside the presets: examined once by a child process, then remembered.

The child builds the model without memory, says how it is adapted, and simulates its steps. That
needs torch, no GPU and no weights, and takes some seconds. What it finds depends on the model's
shape, the libraries and this project's code, and is kept in the user's cache under a hash of them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tuning import files, process
from tuning.plan import coefficients, verdict
from tuning.plan.coefficients import Coefficients, Variant
from tuning.plan.verdict import Verdict
from tuning.safetensors import Tensor

log = logging.getLogger(__name__)

# What decides an answer, beside the libraries: another version may adapt another part of a model.
CODE = ("models/*.py", "training/simulate/*.py", "plan/*.py", "presets/*.py")
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
_NO_SHAPE = ("_name_or_path", "transformers_version", "max_position_embeddings", "rope_scaling")


class Impossible(Exception):
    """There is nothing to examine the model with; says why."""


@dataclass(frozen=True)
class Examined:
    """What the child found."""

    verdict: Verdict
    coefficients: Coefficients | None  # None: its steps follow no formula
    unsized: str = ""  # why there are none


def examine(
    config: dict[str, Any],
    *,
    variants: Iterable[Variant],
    chosen: Mapping[str, Sequence[Any] | None] = MappingProxyType({}),
    begin: Callable[[], None] = lambda: None,
    stop: Callable[[], bool] = lambda: False,
    keep_open: tuple[int, ...] = (),
    kept_in: Path | None = None,
) -> Examined:
    """How the model whose config.json is `config` is adapted, and what `memory.predict` needs.

    `chosen` are the recipe's targets, exclude and layers, if it has any. `begin` is called when the
    child is started. `kept_in` None is the user's own cache. Raises Impossible, and SpecError for
    what is chosen and not in the model.
    """
    asked = [asdict(variant.stored) for variant in variants]
    picked = dict(chosen) if any(chosen.values()) else None
    _require_torch()
    kept = (kept_in or files.cache_folder() / "memory") / f"{_key(config, asked, picked)}.json"
    if kept.is_file():
        with suppress(ValueError, KeyError, TypeError):
            return _examined(files.read_json(kept))
    begin()
    request = {"config": config, "variants": asked, "chosen": picked}
    answer = _ask("training.simulate.child", request, kept, stop_asked=stop, keep_open=keep_open)
    return _examined(answer)


def compare(
    name: str,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    begin: Callable[[], None] = lambda: None,
    kept_in: Path | None = None,
) -> bool:
    """Whether `tensors` are all weights of the class of `config`, where that can be said.

    `name` is the model's, for messages; `begin` and `kept_in` as of `examine`. Raises SpecError for
    weights that are missing or of another shape, and Impossible.
    """
    listed = {key: [tensor.dtype, list(tensor.shape)] for key, tensor in tensors.items()}
    _require_torch()
    kept = (kept_in or files.cache_folder() / "weights") / f"{_key(config, listed)}.json"
    if kept.is_file():
        with suppress(ValueError, KeyError):
            return bool(files.read_json(kept)["compared"])
    begin()
    request = {"config": config, "name": name, "tensors": listed}
    return bool(_ask("models.compare", request, kept)["compared"])


def possible() -> bool:
    """Whether the library that builds models is installed."""
    return importlib.util.find_spec("torch") is not None


def _require_torch() -> None:
    if not possible():
        raise Impossible("torch is not installed here")


def _ask(child: str, request: dict[str, Any], kept: Path, **how: Any) -> dict[str, Any]:
    """The answer of the module `child`, which is also written to `kept`."""
    with tempfile.TemporaryDirectory(prefix="tuning-") as scratch:
        paths = (Path(scratch) / "simulate.json", Path(scratch) / "log")
        try:
            answer = process.run(child, paths[0], request, log=paths[1], **how)
        except process.ChildDied as died:
            raise Impossible(str(died)) from None
    with suppress(OSError):  # a read-only home is no reason not to plan
        kept.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(kept, answer)
    return answer


def _examined(answer: dict[str, Any]) -> Examined:
    found = answer["coefficients"]
    return Examined(
        verdict.from_json(answer["verdict"]),
        found and coefficients.from_json(found),
        answer["unsized"],
    )


def _key(config: dict[str, Any], *asked: Any) -> str:
    shape = {name: value for name, value in config.items() if name not in _NO_SHAPE}
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return files.digest(files.canonical([_code(), shape, *asked, versions]))[:32]


@cache
def _code() -> str:
    """The hash of our own files that decide an answer."""
    package = Path(__file__).parents[1]
    paths = sorted(path for pattern in CODE for path in package.glob(pattern))
    return files.digest(b"".join(path.read_bytes() for path in paths))
