"""Write the files that are generated from the code. Run by `make docs`; tests compare them."""

from __future__ import annotations

import json
from pathlib import Path

import cli_page
import error_codes
import fit_page
import keys_page
import models_page
import options_page
import plan_schema
import presets_page
import write_chart

from jobs.api import crd
from tuning import files, spec

ROOT = Path(__file__).resolve().parents[1]


def generated() -> dict[Path, str]:
    """Every generated file and its text."""
    return {
        ROOT / "docs" / "config-keys.md": keys_page.markdown(),
        ROOT / "configs" / "deploy" / "crd" / "workspaces.kaito.sh.yaml": crd.text(),
        ROOT / "docs" / "operator-options.md": options_page.markdown(),
        ROOT / "docs" / "cli.md": cli_page.markdown(),
        ROOT / "docs" / "errors.md": error_codes.page(),
        ROOT / "docs" / "fit.md": fit_page.markdown(),
        ROOT / "docs" / "models.md": models_page.markdown(),
        ROOT / "docs" / "presets.md": presets_page.markdown(),
        ROOT / "configs" / "plan.schema.json": json.dumps(plan_schema.schema(), indent=2) + "\n",
        ROOT / "configs" / "workspace.schema.json": json.dumps(spec.json_schema(), indent=2) + "\n",
        **write_chart.written(),
    }


if __name__ == "__main__":
    for path, text in generated().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, text)
