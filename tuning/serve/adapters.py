"""Which models a server offers: the base, each adapter by itself, all of them together.

An adapter that cannot be had or does not fit is refused by name, with the reason, and the others
are served. The model of all adapters together is not served then: it would be another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tuning import adapter as adapters
from tuning.console import Console
from tuning.errors import Problem, SpecError, TuningError
from tuning.oci import delivery
from tuning.oci.delivery import Access
from tuning.serve import mixture
from tuning.serve.names import Wanted

Kind = Literal["base", "adapter", "combined"]


@dataclass(frozen=True)
class Ready:
    """An adapter that is here and fits the base model as far as its config tells."""

    wanted: Wanted
    found: adapters.Adapter
    digest: str  # sha256 of its weights file
    template: str | None  # of its own


@dataclass(frozen=True)
class Refused:
    """An adapter that is not served, and why."""

    name: str
    problems: tuple[Problem, ...]

    def to_json(self) -> dict[str, Any]:
        """For /readyz, which anybody may read: no places, only what is wrong."""
        first = self.problems[0]
        return {"name": self.name, "code": first.code, "reason": first.what}


@dataclass(frozen=True)
class Model:
    """A name that requests can ask for."""

    name: str
    kind: Kind
    weights: tuple[float, ...]  # of each loaded adapter
    version: str  # which bytes answer: "base", or digests with strengths
    template: str | None = None


def fetch(
    wanted: Sequence[Wanted],
    *,
    config: dict[str, Any],
    own_template: str | None,
    distrust: Callable[[str], str | None],
    access: Access,
    console: Console,
    held: ExitStack,
) -> tuple[list[Ready], list[Refused]]:
    """The adapters that fit the base whose config.json is `config`, and the others with reasons.

    Their folders are there until `held` is closed. `own_template` is the base's chat template;
    `distrust` says why another is not used.
    """
    ready: list[Ready] = []
    refused: list[Refused] = []
    for one in wanted:
        try:
            at_hand = delivery.at_hand(one.source, access=access, console=console)
            folder = held.enter_context(at_hand)
            assert folder is not None
            ready.append(_inspect(one, folder, config, own_template, distrust))
        except TuningError as error:
            refused.append(_refuse(one, error, console))
        except OSError as error:
            what, change = f"cannot be read ({error.strerror})", "look at its permissions"
            problem = SpecError.at("SERVE-121", str(error.filename or ""), what, change)
            refused.append(_refuse(one, problem, console))
    return ready, refused


def put(
    ready: Sequence[Ready], *, model: Any, console: Console
) -> tuple[mixture.Mixture, list[Ready], list[Refused]]:
    """Put the adapters on the loaded base model; those that do not fit it after all are refused,
    and so are those whose numbers make it say nothing."""
    parts, kept, refused = [], [], []
    for one in ready:
        try:
            parts.append(mixture.load(one.found, model))
        except TuningError as error:
            refused.append(_refuse(one.wanted, error, console))
        else:
            kept.append(one)
    mixed = mixture.Mixture(model, parts)
    if silent := mixture.silent(model, mixed):
        mixed.remove()
        for i in silent:
            what, change = "makes numbers that are not finite", "train it again"
            problem = SpecError.at("MODEL-208", str(kept[i].found.folder), what, change)
            refused.append(_refuse(kept[i].wanted, problem, console))
        parts = [each for i, each in enumerate(parts) if i not in silent]
        kept = [each for i, each in enumerate(kept) if i not in silent]
        mixed = mixture.Mixture(model, parts)
    for one in kept:
        console.say(f"Adapter {one.wanted.name} is loaded (sha256:{one.digest[:12]}).")
    return mixed, kept, refused


def _refuse(one: Wanted, error: TuningError, console: Console) -> Refused:
    console.say(f"Adapter {one.name} is refused:\n{error}", style="yellow")
    return Refused(one.name, error.problems)


def _inspect(
    one: Wanted,
    folder: Path,
    config: dict[str, Any],
    own_template: str | None,
    distrust: Callable[[str], str | None],
) -> Ready:
    found = adapters.inspect(folder)
    if problems := adapters.misfits(found, config):
        raise SpecError(problems)
    template = _template(folder)
    if template in (None, own_template):
        template = None
    elif reason := distrust(template or ""):
        change = "remove its chat_template.jinja, so that the base model's is used"
        raise SpecError.at("SERVE-120", str(folder), reason, change)
    return Ready(one, found, found.sha256, template)


def _template(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except UnicodeDecodeError:
        change = "remove its chat_template.jinja, so that the base model's is used"
        raise SpecError.at(
            "SERVE-120", str(folder), "its chat template is no text", change
        ) from None


def offer(
    ready: Sequence[Ready], refused: Sequence[Refused], *, base: str, combined: str
) -> list[Model]:
    """The models to choose from."""
    zeros = (0.0,) * len(ready)
    found = [Model(base, "base", zeros, "base")]
    for i, one in enumerate(ready):
        own = (*zeros[:i], one.wanted.strength, *zeros[i + 1 :])
        found.append(Model(one.wanted.name, "adapter", own, _version(one), one.template))
    if ready and not refused and combined not in [model.name for model in found]:
        templates = {one.template for one in ready}
        every = tuple(one.wanted.strength for one in ready)
        template = templates.pop() if len(templates) == 1 else None
        version = " ".join(map(_version, ready))
        found.append(Model(combined, "combined", every, version, template))
    return found


def _version(one: Ready) -> str:
    return f"{one.wanted.name}@sha256:{one.digest[:12]}*{one.wanted.strength:g}"
