"""The page of the command `preview`: what the data becomes.

It draws what `pipeline.preview` says. Trained tokens are coloured, or in ⟦ ⟧ where there are no
colours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import rich.console
from rich.text import Text

Value = dict[str, Any]

BAR = 40  # characters of the histogram's longest bar
TRAINED, UNTRAINED = "bold green", "dim"
OPEN, CLOSE = "⟦", "⟧"


def page(content: Value, *, colours: bool) -> Iterator[Text]:
    """The lines of the page."""
    if "sources" in content:
        yield from _sources(content["sources"])
    else:
        yield Text(f"{content['shape']['name']}: {content['shape']['reason']}", style="bold")
        yield Text(f"learnt as {content['rendering']}")
    yield Text("")
    for file in content["files"]:
        kind = " in ".join(part for part in (file["format"], file["compression"]) if part)
        yield Text(f"{file['rows']:>10,} rows  {_visible(file['shown'])} ({kind})")
    for reason, rows in content["dropped"].items():
        yield Text(f"{rows:>10,} rows left out: {reason}", style="yellow")
    yield Text("")
    yield Text(
        f"{content['tokens']:,} tokens, {content['trained_tokens']:,} of them trained "
        f"({content['trained_share']:.1%})"
    )
    yield from _histogram(content)
    yield from _lengths(content)
    for note in content["notes"]:
        yield Text(f"note: {note}", style="dim")
    for sample in content["samples"]:
        yield Text("")
        yield Text(_visible(sample["where"]), style="underline")
        yield tokens(sample["tokens"], colours=colours)
    if content["samples"]:
        marks = "green" if colours else f"in {OPEN} {CLOSE}"
        yield Text(f"\nTokens {marks} are trained; the others are only read.", style="dim")


def _sources(sources: Sequence[Value]) -> Iterator[Text]:
    """The parts of a mixture as a table."""
    yield Text("      rows  held out      tokens  trained tokens", style="bold")
    for each in sources:
        counts = f"{each['rows']:>10,}{each['held_out']:>10,}{each['tokens']:>12,}"
        share = f"{each['trained_tokens']:>10,} {each['trained_share']:>4.0%}"
        yield Text(f"{counts} {share}  {_visible(each['path'])}")
        shape = each["shape"]
        yield Text(f"{'':49}{shape['name']}: {shape['reason']}; learnt as {each['rendering']}")


def _histogram(content: Value) -> Iterator[Text]:
    bins = content["lengths"]["histogram"]
    most = max(rows for _, _, rows in bins)
    digits = max(len(f"{last:,}") for _, last, _ in bins)
    yield Text("tokens a row")
    for first, last, rows in bins:
        bar = "█" * max(1, round(BAR * rows / most)) if rows else ""
        cut = " longer than max_length" if first > content["max_length"] else ""
        style = "yellow" if cut else ""
        name = f"{first:>{digits},}" + (f"-{last:<{digits},}" if last > first else "")
        yield Text(f"  {name} {bar} {rows:,}{cut}", style=style)


def _lengths(content: Value) -> Iterator[Text]:
    lengths, over = content["lengths"], content["over_length"]
    yield Text(
        f"mean {lengths['mean']:,.0f}, median {lengths['p50']:,}, 95 % up to {lengths['p95']:,}, "
        f"longest {lengths['max']:,}"
    )
    yield Text(f"max_length {content['max_length']:,}: {content['max_length_reason']}")
    if over["rows"]:
        done = ", ".join(f"{over[k]:,} {k}" for k in ("truncated", "split", "dropped") if over[k])
        lost = f"{over['lost_tokens']:,} tokens lost"
        for key, what in (("lost_answers", "left out"), ("cut_answers", "cut short")):
            lost += f", {over[key]:,} answers {what}" if over[key] else ""
        text = f"{over['rows']:,} rows are longer ({over['policy']}): {done}; {lost}"
        yield Text(text, style="yellow")
    else:
        yield Text("no row is longer, nothing is cut")
    train, held_out = content["train"], content["eval"]
    packed = f", packed, {train['efficiency']:.1%} full" if content["packing"] else ""
    yield Text(f"{train['rows']:,} training rows of {train['documents']:,} documents{packed}")
    if held_out:
        yield Text(f"{held_out['documents']:,} rows held out to evaluate on")


def tokens(spelled: Sequence[Sequence[Any]], *, colours: bool) -> Text:
    """One row; `spelled` holds [text, trained] for each token."""
    line = Text()
    for trained, group in groupby(spelled, key=lambda token: bool(token[1])):
        text = _visible("".join(token[0] for token in group))
        if colours:
            line.append(text, style=TRAINED if trained else UNTRAINED)
        else:
            line.append(f"{OPEN}{text}{CLOSE}" if trained else text)
    return line


def _visible(text: str) -> str:
    """`text` with its control characters escaped."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def has_colours(out: rich.console.Console) -> bool:
    """Whether `out` shows colours: a terminal, unless NO_COLOR is set."""
    return out.color_system is not None and not out.no_color


def show(content: Value) -> None:
    """Print the page on stdout, coloured if it is a terminal and NO_COLOR is not set."""
    out = rich.console.Console(highlight=False)
    for line in page(content, colours=has_colours(out)):
        out.print(line, soft_wrap=True)
