"""docs/data.md keeps its word: every row it shows is of the shape it is shown for."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from tuning.data.formats import Columns, detect, to_example
from tuning.data.formats.values import Name

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
ROWS = re.findall(r"^\| ([a-z-]+) \| `(\{.*\})` \|", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("shape", "row"), ROWS, ids=[shape for shape, _ in ROWS])
def test_each_example_row_is_of_its_shape(shape, row):
    """It is detected as that shape, and can be trained on."""
    found = detect(json.loads(row), Columns())

    assert shape == found.name
    assert to_example(json.loads(row), found)


def test_every_shape_has_an_example():
    """The table leaves none out."""
    assert set(get_args(Name)) == {shape for shape, _ in ROWS}
