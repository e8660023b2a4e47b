"""The page of faults names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_every_fault_has_a_test_that_exists() -> None:
    """O1 to O29, N1 to N9; a test that is renamed is renamed there, too."""
    page = (TESTS / "cluster" / "faults.md").read_text()
    code = "".join(path.read_text() for path in TESTS.glob("**/test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", page))

    assert set() == {name for name in named if f"def {name}(" not in code}
    rows = re.findall(r"^\| ([ON])(\d+) .*`test_", page, re.M)
    assert [("O", str(i)) for i in range(1, 30)] + [("N", str(i)) for i in range(1, 10)] == rows
