"""Write the files that are generated from the code. Run by `make docs`; tests compare them."""

from __future__ import annotations

import json
from pathlib import Path

import error_codes

from jobs.api import crd, options
from tuning import files, presets, spec
from tuning.plan import fit_page
from tuning.plan.schema import schema
from tuning.spec import keys

ROOT = Path(__file__).resolve().parents[1]


def generated() -> dict[Path, str]:
    """Every generated file and its text."""
    return {
        ROOT / "docs" / "config-keys.md": keys.page(),
        ROOT / "configs" / "deploy" / "crd" / "workspaces.kaito.sh.yaml": crd.text(),
        ROOT / "docs" / "operator-options.md": options.markdown(),
        ROOT / "docs" / "errors.md": error_codes.page(),
        ROOT / "docs" / "fit.md": fit_page.markdown(),
        ROOT / "docs" / "presets.md": presets.markdown(),
        ROOT / "configs" / "plan.schema.json": json.dumps(schema(), indent=2) + "\n",
        ROOT / "configs" / "workspace.schema.json": json.dumps(spec.json_schema(), indent=2) + "\n",
    }


if __name__ == "__main__":
    for path, text in generated().items():
        path.parent.mkdir(exist_ok=True)
        files.write(path, text)
