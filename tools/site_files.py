"""Hook of mkdocs: files outside docs/ that pages link to are part of the site, as `files/PATH`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)")


def on_files(files: Any, config: Any) -> Any:
    """Add what pages link to as `](../PATH)`."""
    from mkdocs.structure.files import File

    pages = [path.read_text() for path in Path(config["docs_dir"]).glob("*.md")]
    for name in sorted({name for page in pages for name in OUTSIDE.findall(page)}):
        files.append(
            File.generated(config, f"files/{name}", abs_src_path=str((ROOT / name).resolve()))
        )
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let those links lead there."""
    return OUTSIDE.sub(r"](files/\1", markdown)
