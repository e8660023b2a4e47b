"""All problems of the data, collected in one pass."""

from __future__ import annotations

from collections.abc import Iterable

from tuning.data.formats import Shape
from tuning.errors import DataError, Problem

MAX_PROBLEMS = 10_000


def mixed_shapes(where: str, shape: Shape, first: str, first_shape: Shape) -> Problem:
    """The file or row at `where` has another shape than that at `first`."""
    what = (
        f"is of shape {shape.name} ({shape.reason}), but {first} is of shape "
        f"{first_shape.name} ({first_shape.reason})"
    )
    change = "train on one shape at a time: give every file the same columns"
    return Problem("DATA-215", where, what, change)


class Problems:
    """Collects problems until the data is read, or until there are too many."""

    def __init__(self) -> None:
        self._problems: list[Problem] = []

    def __len__(self) -> int:
        return len(self._problems)

    def extend(self, problems: Iterable[Problem]) -> None:
        """Add several problems. Raises DataError like `add`."""
        for problem in problems:
            self.add(problem.code, problem.where, problem.what, problem.change)

    def to_json(self) -> list[list[str]]:
        """The arguments of each Problem, for the result of a child process."""
        return [[p.code, p.where, p.what, p.change] for p in self._problems]

    def add(self, code: str, where: str, what: str, change: str) -> None:
        """Add a problem. Raises DataError with all of them at MAX_PROBLEMS."""
        self._problems.append(Problem(code, where, what, change))
        if len(self._problems) >= MAX_PROBLEMS:
            what = f"stopped reading after {MAX_PROBLEMS} problems"
            self._problems.append(Problem("DATA-299", where, what, "repair these first"))
            self.raise_all()

    def raise_all(self) -> None:
        """Raise DataError if there is any problem."""
        if self._problems:
            raise DataError(self._problems)
