"""`init`: what is no model, data or place is refused, and the file says what to type."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuning.cli import documents
from tuning.errors import TuningError

TINY = Path(__file__).parents[2] / "examples" / "tiny-model"


def written(file: str, *, data: str = "rows.csv", where: str = "oci:out") -> str:
    """What `init` wrote."""
    documents.init(Path(file), model=str(TINY), data=[data], where=where, method="lora", yes=True)
    return Path(file).read_text()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with rows."""
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("question,answer\n1,2\n")


@pytest.mark.parametrize(
    ("file", "data", "where", "said"),
    [
        ("oci:foo", "rows.csv", "oci:out", "USE-107 oci:foo: .* give it with --where"),
        ("w.yaml", str(TINY), "oci:out", "SPEC-124 .* is the folder of a model, not of data"),
        ("w.yaml", "rows.csv", "rowss.csv", "SPEC-109 --where: .* has no registry"),
    ],
)
def test_what_is_no_file_data_or_place_is_refused(
    file: str, data: str, where: str, said: str
) -> None:
    """Nothing is written."""
    with pytest.raises(TuningError, match=said):
        written(file, data=data, where=where)
    assert ["rows.csv"] == [path.name for path in Path().iterdir()]


def test_commands_stand_at_the_end_of_their_lines() -> None:
    """So that they can be copied; a name that was made up is said to be one."""
    lines = written("w.yaml").splitlines()
    image = written("other.yaml", where="registry.example.com/a:1")

    assert all(
        any(line.endswith(f": tuning {c} -f w.yaml") for line in lines) for c in ("plan", "run")
    )
    assert "imagePushSecret is" in image
    assert not any("imagePushSecret" in line for line in lines)


def test_a_folder_of_rows_may_hold_a_config() -> None:
    """Only weights beside it make it a model's."""
    Path("data").mkdir()
    Path("data/config.json").write_text("{}")
    Path("data/rows.csv").write_text("question,answer\n1,2\n")

    assert "data" in written("w.yaml", data="data")
