"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from registries import Registry


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


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that asks for no login; tests use repositories of their own."""
    from registries import Registry

    with Registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def repository(request: pytest.FixtureRequest) -> str:
    """A repository that nobody else uses."""
    return f"tests/r{abs(hash(request.node.nodeid)):x}"


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout folder of an image that the run `run-1` made; the adapter is beside it."""
    import adapters

    folder = tmp_path_factory.mktemp("built")
    adapters.build(folder)
    return folder / "image"
