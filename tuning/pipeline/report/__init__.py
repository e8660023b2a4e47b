"""Run directory -> one HTML page: what was trained, how it went, what came of it, how to use it.

One self-contained file that needs no script and loads nothing. `write` makes `report.html` in the
run directory, with answers of the models and rows of the evaluation split. `served` is the page of
the progress port, which others in a cluster can reach: it reloads itself, without row or answer.
"""

from __future__ import annotations

import html
import string
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from tuning import files
from tuning.errors import SpecError
from tuning.pipeline import journal, tracking
from tuning.pipeline.report import curves, lists, parts
from tuning.pipeline.report import private as privates
from tuning.pipeline.report import record as records
from tuning.pipeline.report.markup import note, text

NAME = "report.html"
PAGE = string.Template(Path(__file__).with_name("page.html").read_text("utf-8"))
RELOAD = '<meta http-equiv="refresh" content="5">'
DAMAGED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
Part = Callable[[], str]


def write(run: Path) -> Path:
    """Write report.html into the run directory `run`; returns its path."""
    files.write(run / NAME, page(run))
    return run / NAME


def rewrite(run: Path) -> Path:
    """`write` for a run directory that nobody uses, say once its adapter was evaluated.

    Raises SpecError for a folder that is none, TransientError while a run uses it.
    """
    if not (run / "journal.jsonl").is_file():
        what, change = "is no run directory: it has no journal.jsonl", "name the --run-dir of a run"
        raise SpecError.at("RUN-102", str(run), what, change)
    with journal.opened(run):
        return write(run)


def page(run: Path) -> str:
    """The page of a run that has ended, for those who may read its run directory."""
    record, private = records.read(run), records.read_private(run)
    own = [partial(privates.answers, private), partial(privates.evaluation, private)]
    return _page(record.name, _parts(record, own, live=False))


def figure(metrics: list[dict[str, Any]]) -> str:
    """The curves of records of metrics.jsonl with their style, as HTML for a notebook."""
    style = PAGE.template.split("<style>")[1].split("</style>")[0]
    drawn = curves.curves(records.Record(Path(), [], {}, metrics))
    # a frame of its own: the page's style must not reach the notebook's
    page = html.escape(f"<style>{style}</style>{drawn}")
    return f'<iframe srcdoc="{page}" style="border: 0; width: 100%; height: 36rem"></iframe>'


def served(run: Path, *, name: str) -> str:
    """The page of a run that goes on, for the network."""
    return _page(name, _parts(records.read(run), [], live=True), reload=RELOAD)


def _parts(record: records.Record, private: Iterable[Part], *, live: bool) -> Iterable[Part]:
    return (
        partial(parts.heading, record, live=live),
        partial(_trackers, record.folder),
        partial(parts.tiles, record),
        partial(curves.curves, record),
        *private,
        partial(parts.subject, record),
        partial(parts.comparison, record),
        partial(lists.commands, record),
        partial(lists.settings, record),
        partial(lists.events, record),
    )


def _page(name: str, made: Iterable[Part], *, reload: str = "") -> str:
    return PAGE.substitute(reload=reload, name=text(name), parts="".join(map(_made, made)))


def _made(part: Part) -> str:
    """The HTML of a part; a remark if what it is made of is damaged."""
    try:
        return part()
    except DAMAGED:
        return note("A part is missing here: a file of the run directory is damaged.")


def _trackers(run: Path) -> str:
    """Links to the run's pages at its trackers."""
    links = tracking.links(run).items()
    return "".join(
        f'<p>{text(name)}: <a href="{text(link)}" rel="noreferrer">{text(link)}</a></p>'
        for name, link in links
        if link.startswith(("http://", "https://"))
    )
