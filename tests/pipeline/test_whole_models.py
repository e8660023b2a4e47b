"""Whole models: what cannot be written is refused before anything is fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tuning.console import Console
from tuning.errors import SpecError
from tuning.oci.delivery import Access
from tuning.pipeline import whole_models


@pytest.mark.parametrize("command", ["merged", "exported", "packaged"])
def test_a_folder_with_files_is_refused_before_the_models_are_looked_for(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base and the adapter need not exist for it."""
    full = tmp_path / "full"
    full.mkdir()
    (full / "adapter_config.json").touch()
    common: dict[str, Any] = {"token_file": None, "access": Access(), "console": Console()}
    fit: dict[str, Any] = {"method": None, "any_base": False}

    with pytest.raises(SpecError, match=r"REG-103|IMAGE-103"):
        match command:
            case "merged":
                whole_models.merged("org/none", "oci:none", f"dir:{full}", **common, **fit)
            case "exported":
                more = {"merged": True, "with_base": False}
                whole_models.exported("org/none", "oci:none", full, **common, **fit, **more)
            case _:
                more = {"revision": None, "overwrite": False}
                whole_models.packaged("org/none", f"oci:{full}", **common, **more)
    assert "ing ..." not in capsys.readouterr().err
    assert ["adapter_config.json"] == [path.name for path in full.iterdir()]
