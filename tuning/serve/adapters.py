"""The models that a server offers: the base, each adapter by itself, all adapters combined.

An adapter that cannot be fetched or does not fit is rejected by name, with the reason, and the
others are served. The combined model is not served then, because it would be a different model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tuning import adapter as adapters
from tuning.console import Console
from tuning.data.chat_rewrites import as_trained
from tuning.errors import Problem, SpecError, TuningError
from tuning.oci import delivery
from tuning.oci.delivery import Access
from tuning.serve import multi_lora, new_tokens
from tuning.serve.adapter_specs import AdapterSpec
from tuning.serve.new_tokens import Tokens

Kind = Literal["base", "adapter", "combined"]


@dataclass(frozen=True)
class ReadyAdapter:
    """A fetched adapter whose config fits the base model."""

    spec: AdapterSpec
    adapter: adapters.Adapter
    digest: str  # sha256 of its weights file
    template: str | None  # its own chat template, if it differs from the base's
    tokens: Tokens | None = None  # its new ones, once they have rows in the model


@dataclass(frozen=True)
class RejectedAdapter:
    """An adapter that is not served, with the reasons."""

    name: str
    problems: tuple[Problem, ...]

    def to_json(self) -> dict[str, Any]:
        """For /readyz, which needs no key: the reason without paths."""
        first = self.problems[0]
        return {"name": self.name, "code": first.code, "reason": first.what}


@dataclass(frozen=True)
class ServedModel:
    """A model that requests can name."""

    name: str
    kind: Kind
    weights: tuple[float, ...]  # one per loaded adapter
    version: str  # "base", or the digests and strengths of its adapters
    template: str | None = None
    tokens: Tokens | None = None  # that the base has not


def fetch(
    specs: Sequence[AdapterSpec],
    *,
    config: dict[str, Any],
    base_template: str | None,
    template_problem: Callable[[str], str | None],
    access: Access,
    console: Console,
    folders: ExitStack,
    weights: Callable[[], str | None] = lambda: None,
) -> tuple[list[ReadyAdapter], list[RejectedAdapter]]:
    """Fetch the adapters; returns those that fit the base's `config` (config.json), and the others.

    Closing `folders` removes their folders. `base_template` is the base's chat template;
    `template_problem` says why another cannot be used. `weights` gives the base's identity
    (sources.base.weights_of); an adapter of another base is served with a warning.
    """
    ready: list[ReadyAdapter] = []
    rejected: list[RejectedAdapter] = []
    for spec in specs:
        try:
            at_hand = delivery.at_hand(spec.source, access=access, console=console)
            folder = folders.enter_context(at_hand)
            assert folder is not None
            one = _inspect(spec, folder, config, base_template, template_problem)
            for doubt in adapters.other_weights(one.adapter, weights):
                text = f"Adapter {spec.name} {doubt.what}: its answers may be nonsense."
                console.say(text, style="yellow")
            ready.append(one)
        except TuningError as error:
            rejected.append(_reject(spec, error, console))
        except OSError as error:
            what, change = f"cannot be read ({error.strerror})", "check its permissions"
            problem = SpecError.at("SERVE-121", str(error.filename or ""), what, change)
            rejected.append(_reject(spec, problem, console))
    return ready, rejected


def place_tokens(
    ready: Sequence[ReadyAdapter], *, tokenizer: Any, model: Any, console: Console
) -> tuple[list[ReadyAdapter], list[RejectedAdapter]]:
    """Give the new tokens of each adapter rows in `model`; rejects those that do not fit."""
    placed, rejected = [], []
    first: int | None = None
    for one in ready:
        try:
            tokens = new_tokens.place(one.adapter, tokenizer, model, first=first)
        except TuningError as error:
            rejected.append(_reject(one.spec, error, console))
        else:
            placed.append(replace(one, tokens=tokens))
            first = tokens.after if tokens else first
    return placed, rejected


def attach(
    ready: Sequence[ReadyAdapter], *, model: Any, console: Console
) -> tuple[multi_lora.MultiLora, list[ReadyAdapter], list[RejectedAdapter]]:
    """Attach the adapters to the loaded base model.

    Rejects those whose tensors do not fit it, and those with which its logits are not finite.
    """
    weights, kept, rejected = [], [], []
    for one in ready:
        try:
            weights.append(multi_lora.load(one.adapter, model))
        except TuningError as error:
            rejected.append(_reject(one.spec, error, console))
        else:
            kept.append(one)
    loras = multi_lora.MultiLora(model, weights)
    if overflowing := multi_lora.overflowing(model, loras):
        loras.remove()
        for i in overflowing:
            what, change = "makes numbers that are not finite", "train it again"
            problem = SpecError.at("MODEL-208", str(kept[i].adapter.folder), what, change)
            rejected.append(_reject(kept[i].spec, problem, console))
        weights = [each for i, each in enumerate(weights) if i not in overflowing]
        kept = [each for i, each in enumerate(kept) if i not in overflowing]
        loras = multi_lora.MultiLora(model, weights)
    for one in kept:
        console.say(f"Adapter {one.spec.name} is loaded (sha256:{one.digest[:12]}).")
    return loras, kept, rejected


def _reject(spec: AdapterSpec, error: TuningError, console: Console) -> RejectedAdapter:
    console.say(f"Adapter {spec.name} is refused:\n{error}", style="yellow")
    return RejectedAdapter(spec.name, error.problems)


def _inspect(
    spec: AdapterSpec,
    folder: Path,
    config: dict[str, Any],
    base_template: str | None,
    template_problem: Callable[[str], str | None],
) -> ReadyAdapter:
    adapter = adapters.inspect(folder)
    if problems := adapters.misfits(adapter, config):
        raise SpecError(problems)
    path, template = folder / "chat_template.jinja", None
    change = "remove its chat_template.jinja, so that the base model's is used"
    try:
        template = path.read_text(encoding="utf-8") if path.is_file() else None
    except UnicodeDecodeError:
        what = "its chat template is not UTF-8 text"
        raise SpecError.at("SERVE-120", str(folder), what, change) from None
    if template == base_template:
        template = None
    if template is not None and (reason := template_problem(template)):
        raise SpecError.at("SERVE-120", str(folder), reason, change)
    if (own := template or base_template) and (text := as_trained(folder, own)) != own:
        template = text
    return ReadyAdapter(spec, adapter, adapter.sha256, template)


def offered(
    ready: Sequence[ReadyAdapter], rejected: Sequence[RejectedAdapter], *, base: str, combined: str
) -> list[ServedModel]:
    """The models that requests can name."""
    zeros = (0.0,) * len(ready)
    models = [ServedModel(base, "base", zeros, "base")]
    for i, one in enumerate(ready):
        own = (*zeros[:i], one.spec.strength, *zeros[i + 1 :])
        models.append(
            ServedModel(one.spec.name, "adapter", own, _version(one), one.template, one.tokens)
        )
    tokens = [one.tokens for one in ready if one.tokens]
    clash = len(tokens) > 1  # a text that both add would be two tokens
    if ready and not rejected and not clash and combined not in [model.name for model in models]:
        templates = {one.template for one in ready}
        strengths = tuple(one.spec.strength for one in ready)
        template = templates.pop() if len(templates) == 1 else None
        version = " ".join(map(_version, ready))
        own_tokens = tokens[0] if tokens else None
        models.append(ServedModel(combined, "combined", strengths, version, template, own_tokens))
    return models


def _version(one: ReadyAdapter) -> str:
    return f"{one.spec.name}@sha256:{one.digest[:12]}*{one.spec.strength:g}"
