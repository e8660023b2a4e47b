"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_base(family, **shape)`: the folder of a tiny random model, each made once."""
    made: dict[tuple[Any, ...], Path] = {}

    def folder(family: str, **shape: Any) -> Path:
        import tiny_models  # imports torch

        key = (family, *sorted(shape.items()))
        if key not in made:
            made[key] = tiny_models.build(family, tmp_path_factory.mktemp(family), **shape)
        return made[key]

    return folder
