"""HTML of plain values: every text is escaped, and characters that do not show are spelt out."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from tuning.errors import printable


def text(value: Any) -> str:
    """`value` as text of a page, direction marks and control characters as escapes."""
    return html.escape(printable(str(value)))


def section(title: str, *parts: str) -> str:
    """A titled part of the page; empty without content."""
    body = "".join(parts)
    return f"<section><h2>{text(title)}</h2>\n{body}</section>\n" if body else ""


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]], *, kind: str = "") -> str:
    """A table with a heading for each row; empty without rows. None is an empty cell."""
    lines = [
        "<tr>"
        + "".join(
            f"<{'td' if n else 'th'}>{'' if cell is None else text(cell)}</{'td' if n else 'th'}>"
            for n, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    ]
    if not lines:
        return ""
    head = "".join(f"<th>{text(cell)}</th>" for cell in heads)
    top = f"<thead><tr>{head}</tr></thead>" if any(heads) else ""
    return f'<table class="{kind}">{top}<tbody>{"".join(lines)}</tbody></table>\n'


def note(words: Any) -> str:
    """A small remark."""
    return f'<p class="note">{text(words)}</p>\n'
