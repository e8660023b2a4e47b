"""A mixture's parts and the files of the run: what the data child, the recipe and `check` need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import tuning.plan as plan
from tuning.spec import Spec, mixture

File = tuple[int | None, str]  # the number of the input's URL that named it, what it is called


def assigned(spec: Spec, files: Iterable[File]) -> list[int]:
    """The number of each file's part; 0 for all, without a mixture.

    Raises SpecError for files of no part and parts without a file.
    """
    names = [("" if url is None else spec.source.urls[url], shown) for url, shown in files]
    parts = spec.settings.sources
    return mixture.assign(parts, names) if parts else [0] * len(names)


def requested(spec: Spec, files: list[dict[str, Any]]) -> dict[str, Any]:
    """What the step "tokenise" is told of a mixture: each file's part, the parts, and the seed."""
    if spec.settings.sources is None:
        return {}
    parts = assigned(spec, [(file["url"], file["shown"]) for file in files])
    return {
        "files": [file | {"part": part} for file, part in zip(files, parts, strict=True)],
        "sources": [asdict(part) for part in spec.settings.sources],
        "seed": plan.split_seed(spec.settings),
    }


def recorded(spec: Spec, files: list[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """The mixture for the recipe: of each part what is set and its files' hashes, but no path."""
    told = requested(spec, files)
    return tuple(
        {name: value for name, value in part.items() if value is not None and name != "path"}
        | {"data": [file["sha256"] for file in told["files"] if file["part"] == number]}
        for number, part in enumerate(told.get("sources", ()))
    )
