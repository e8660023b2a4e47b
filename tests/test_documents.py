"""The files that are generated from the code are those in the tree."""

from pathlib import Path

import pytest
import write_docs

GENERATED = write_docs.generated()


@pytest.mark.parametrize("path", GENERATED, ids=lambda path: path.name)
def test_a_generated_file_is_current(path: Path) -> None:
    """`make docs` would write it as it is."""
    assert GENERATED[path] == path.read_text(encoding="utf-8"), "run: make docs"
