"""ARCHITECTURE.md names files and rooms that exist, and the import contracts that are checked."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "ARCHITECTURE.md").read_text()


def test_every_path_on_the_page_exists() -> None:
    """A contributor who follows a path of the page finds the file."""
    table = PAGE.split("## Where to add")[1].split("\n\n`configs/` is")[0]
    paths = [
        path
        for path in re.findall(r"`([a-z_/.-]+/[a-z_/.-]*|[a-z_]+\.md)`", table)
        if "<" not in path
    ]
    missing = [path for path in paths if not (ROOT / path).exists()]

    assert len(paths) > 20
    assert [] == missing


def test_every_room_is_on_the_page() -> None:
    """Each folder and file at the top level of both packages has a line on the page."""
    for package in ("tuning", "jobs"):
        rooms = [
            path.name + "/" * path.is_dir()
            for path in (ROOT / package).iterdir()
            if not path.name.startswith(("_", "py."))
        ]

        assert [] == [room for room in rooms if f"`{room}`" not in PAGE]


def test_the_layers_on_the_page_are_those_that_lint_keeps() -> None:
    """The picture of the imports is the contract of .importlinter."""
    drawn = PAGE.split("## Imports")[1].split("```")[1]
    contracts = (ROOT / ".importlinter").read_text()
    for package in ("tuning", "jobs"):
        picture = drawn.split(f"{package}:")[1].split("jobs:")[0]
        floors = contracts.split(f"containers = {package}\nlayers =\n")[1].split("\n\n")[0]
        kept = [line.strip() for line in floors.splitlines() if line.strip()]
        if package == "tuning":
            kept.remove("__main__")

        assert kept == [" ".join(floor.split()) for floor in picture.split(">")]
