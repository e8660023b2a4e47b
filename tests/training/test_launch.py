"""The launcher of ranks: where machines meet, and what it says when they do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuning import process
from tuning.process import Group
from tuning.training import launch


def test_a_machine_is_reached_as_the_others_know_it() -> None:
    """Machine 0 by the name that all were given; another by its address on the way there."""
    assert "job-0.job" == launch._own_address(Group(nodes=2, node=0, meet="job-0.job:29400"))
    assert "127.0.0.1" == launch._own_address(Group(nodes=2, node=1, meet="127.0.0.1:29400"))
    assert "::1" == launch._own_address(Group(nodes=2, node=1, meet="::1:29400"))


@pytest.mark.slow
@pytest.mark.parametrize("meet", ["no.such.machine.invalid:29400", "127.0.0.1:9"])
def test_machines_that_do_not_meet_are_told_apart_from_failures(meet: str, tmp_path: Path) -> None:
    """A name that does not resolve, a port where nobody is: worth another try."""
    group = Group(nodes=2, node=1, meet=meet, patience=2)
    with pytest.raises(process.Apart):
        process.run("data", tmp_path / "r.json", {}, log=tmp_path / "log", group=group)
