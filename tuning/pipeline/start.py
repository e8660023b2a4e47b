"""The adapter to go on from (`start_adapter`): fetched, fitted to the base, and its shape taken.

Training goes on in the shape of the adapter: its rank, scale and projections replace the plan's
choices, its tokens come before new ones, and its chat template is kept. A setting of the user that
says otherwise is refused, since other matrices could not hold its weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import tuning.plan as plan
from tuning import adapter as adapters
from tuning import files
from tuning.adapter import Adapter
from tuning.errors import Problem, SpecError
from tuning.oci import delivery, inspection
from tuning.oci.access import Access
from tuning.oci.layout.manifest import layout_of
from tuning.pipeline.run import Run, Start, Value, key_of
from tuning.sources import base
from tuning.spec import Spec, reference

PHASE = "start_adapter"
KEY = "ModelConfig.start_adapter"
# Setting -> its name for people
SHAPE = {
    "rank": "LoraConfig.r",
    "alpha": "LoraConfig.lora_alpha",
    "rslora": "LoraConfig.use_rslora",
    "dora": "LoraConfig.use_dora",
    "target_modules": "LoraConfig.target_modules",
    "exclude_modules": "LoraConfig.exclude_modules",
    "layers": "LoraConfig.layers_to_transform",
}


def fetch(run: Run, model: base.Base, known: plan.Base) -> Start | None:
    """The start adapter of the run, checked against its base; gives the run's spec its shape.

    An image is pulled into the run directory once. Raises SpecError, RefusedError, TransientError.
    """
    named = run.spec.settings.start_adapter
    if named is None:
        return None
    run.begin(PHASE)
    folder = delivery.named_folder(named)
    if folder is None:
        folder = run.folder / "start"
        pull = partial(_pull, run, named, folder)
        local = [files.digest_file(path) for path in contents(named) if path.name == "index.json"]
        run.journal.do(PHASE, key_of(named, local), pull, outputs=lambda _: _files(folder))
        run.journal.verify(PHASE)
    found = adapters.inspect(delivery.adapter_folder(folder))
    problems = [
        *adapters.other_base(found, None if model.folder else known.name),
        *adapters.other_weights(found, lambda: model.weights),
        *adapters.misfits(found, known.config),
    ]
    if problems:
        raise SpecError(problems)
    recipe = _recipe(found.folder)
    from tuning.data.tokenizer import added_by  # which the base install has not

    tokens = [text for text, _ in added_by(found).values()]
    if len(tokens) != len(found.token_ids):
        what = "trains rows of tokens that its tokenizer.json does not add"
        raise SpecError.at("MODEL-143", KEY, what, "start from another adapter")
    template = folder / "chat_template.jinja"
    own = template.read_text(encoding="utf-8") if template.is_file() else None
    run.note([f"goes on from {named}: rank {found.rank}, {len(found.modules)} projections"])
    if (method := recipe.get("method")) not in (None, run.spec.method):
        run.note([f"it was trained with {method}, over other roundings of the base's weights"])
    run.spec = shaped(run.spec, found, known, tokens, own if recipe.get("chat_template") else None)
    return Start(found.folder, found.sha256)


def _pull(run: Run, named: str, folder: Path) -> Value:
    """Pull the adapter image or unpack the layout `named` into the new `folder`."""
    run.console.say(f"Fetching the adapter to go on from, {named} ...")
    shutil.rmtree(folder, ignore_errors=True)
    access = _access(run.spec, run.options.access, named)
    return {"digest": delivery.pull(named, folder, access=access, console=run.console)}


def _access(spec: Spec, access: Access, named: str) -> Access:
    """With the login of the push, if the adapter is in the registry that the run pushes to."""
    image = spec.destination.image
    if image is None or named.startswith(("oci:", "/")):
        return access
    same = reference.parse(image).registry == reference.parse(named).registry
    return replace(access, pull_secret=access.push_secret) if same else access


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _recipe(folder: Path) -> Mapping[str, Any]:
    """The recipe that the adapter in `folder` records, or nothing."""
    try:
        recipe = files.read_json(folder / "tuning.json")["recipe"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return recipe if isinstance(recipe, dict) else {}


def known(spec: Spec, model: plan.Base, *, access: Access) -> Spec:
    """`spec` with the shape of its start adapter, for a plan: no weights are fetched.

    Raises SpecError, RefusedError or TransientError.
    """
    named = spec.settings.start_adapter
    if named is None:
        return spec
    seen = inspection.inspect(named, access=_access(spec, access, named))
    if seen.config is None or seen.problems:
        what = "; ".join(seen.problems)[:400]
        raise SpecError.at("MODEL-143", KEY, f"cannot be used: {what}", "name another adapter")
    found = Adapter(Path(named), seen.config, dict(seen.tensors))
    problems = adapters.misfits(found, model.config) if model.config else []
    if problems:
        raise SpecError(problems)
    return shaped(spec, found, model, seen.new_tokens, None)


def shaped(
    spec: Spec, adapter: Adapter, model: plan.Base, tokens: Iterable[str], template: str | None
) -> Spec:
    """`spec` with the shape of `adapter`. Raises SpecError for a setting that says otherwise."""
    settings, shape = spec.settings, _shape(adapter, model)
    problems = [
        Problem(
            "MODEL-144",
            SHAPE[name],
            f"is {_shown(getattr(settings, name))}, and {_shown(value)} in start_adapter",
            "remove it: the adapter goes on as it is",
        )
        for name, value in shape.items()
        if _differs(name, getattr(settings, name), value)
    ]
    if problems:
        raise SpecError(problems)
    new = [*tokens, *(token for token in settings.new_tokens or () if token not in tokens)]
    own: Value = {
        "new_tokens": tuple(new) or None,
        "chat_template": settings.chat_template or template,
    }
    return replace(spec, settings=replace(settings, **shape, **own))


def _shape(adapter: Adapter, model: plan.Base) -> dict[str, Any]:
    config = adapter.config
    names, layers = _named(adapter, model)
    return {
        "rank": adapter.rank,
        "alpha": float(config["lora_alpha"]),
        "rslora": config.get("use_rslora", False),
        "dora": config.get("use_dora", False),
        "target_modules": names,
        "exclude_modules": None,
        "layers": layers,
    }


def _named(
    adapter: Adapter, model: plan.Base
) -> tuple[tuple[str, ...] | None, tuple[int, ...] | None]:
    """The adapted projections by their short names and layers; by full names where a layer lacks
    some. No layers mean all of them. Experts are named as in the adapter's config.
    """
    places: dict[str, set[int]] = {}
    full: set[str] = set()
    parameters = adapter.config.get("target_parameters") or ()
    for module in adapter.modules:
        outer = module.replace(adapters.INNER, "")  # of an expert, the module that holds it
        number = next((int(part) for part in outer.split(".") if part.isdigit()), -1)
        held = {p.removesuffix(".weight") for p in parameters if _holds(outer, p)}
        full |= held or {outer}
        for end in held or {outer.rpartition(".")[2]}:
            places.setdefault(end, set()).add(number)
    if not places:  # the beginning of its weights did not say
        targets = adapter.config["target_modules"]
        return (tuple(targets) if isinstance(targets, list) else None), None
    layers, *others = places.values()
    if any(other != layers for other in others):
        return tuple(sorted(full)), None
    whole = model.facts is not None and layers == set(range(model.facts.layers))
    return tuple(sorted(places)), None if whole else tuple(sorted(layers))


def _holds(module: str, parameter: str) -> bool:
    """Whether the end `parameter` of a name is that of a parameter of `module`."""
    end = parameter.rpartition(".")[0]
    return bool(end) and (module == end or module.endswith(f".{end}"))


def _differs(name: str, set_: Any, value: Any) -> bool:
    """Whether the user set `name` to another value than the adapter's."""
    if set_ is None or (name == "target_modules" and "all-linear" in set_):
        return False
    if name == "target_modules":
        return _short(set_) != _short(value)
    if name == "exclude_modules":
        return False  # what it leaves out, the adapter has not
    return bool((tuple(sorted(set_)) if name == "layers" else set_) != value)


def _short(names: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else f"{value}"


def contents(named: str | None) -> list[Path]:
    """The files of a start adapter in a folder or a layout on this machine."""
    if named is None:
        return []
    folder = layout_of(named)[0] if named.startswith("oci:") else Path(named)
    return _files(folder) if folder.is_dir() else []
