"""`tuning check`: everything that can be validated without downloading weights or data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import tuning.plan as plan
from tuning import presets
from tuning.console import Console
from tuning.data import formats
from tuning.data.problems import mixed_shapes
from tuning.errors import DataError, SpecError
from tuning.network.policy import load_headers
from tuning.network.retry import Patience
from tuning.oci import delivery
from tuning.oci.delivery import Access
from tuning.pipeline import evaluating, mixing, sizing, start
from tuning.pipeline.endings import together
from tuning.pipeline.options import Options, base_reference
from tuning.sources import base, fetch, hub_dataset, local, stores, verify
from tuning.sources.hub import read_token
from tuning.sources.local import File
from tuning.spec import Settings, Spec, mixture
from tuning.trackers import place

# What reads rows comes late: a plan, which the base install can make, imports this room as well.
if TYPE_CHECKING:
    from tuning.data.first_rows import FirstRows
    from tuning.data.vocabulary import Vocabulary

    # Part of the mixture, name and size of a file, and what its rows are
    CheckedFile = tuple[int, str, int | None, FirstRows]


def check(spec: Spec, options: Options, console: Console) -> Iterator[str]:
    """Validate model, data and destination; yields a line for each part that passed.

    Raises one error with all problems.
    """
    access, found = replace(options.access, patience=delivery.QUICK), _Found()
    passed = together(
        lambda: _check_model(spec, options, access, console, found),
        lambda: _check_data(spec, options, access, found),
        lambda: _check_destination(spec, access),
        lambda: _check_trackers(spec, options),
        lambda: _check_evaluation(spec),
    )
    _check_template(spec, found, read_token(options.access.hub_token_file))
    if spec.settings.objective is None:  # what the rows are trained for decides over it, too
        for objective in {formats.objective_of(shape, None) for shape in found.shapes} - {"sft"}:
            found.draft(replace(spec, settings=replace(spec.settings, objective=objective)))
    for lines in passed:
        yield from lines


@dataclass
class _Found:
    """What the parts of a check learn for others."""

    draft: Callable[[Spec], object] = lambda spec: None  # makes the plan of a spec for the model
    model: base.Base | None = None  # but of an image
    shapes: list[formats.Shape] = field(default_factory=list)  # of the rows of each part
    chats: str | None = None  # a file that holds conversations


def _check_model(
    spec: Spec, options: Options, access: Access, console: Console, found: _Found
) -> list[str]:
    here = plan.planned_device(spec)
    token = read_token(options.access.hub_token_file)
    known, found.model = sizing.read_base(spec, access=access, token=token)
    plan.refuse_unsupported(spec, known, here)
    spec = start.known(spec, known, access=access)
    _check_tokens(spec)

    def planned() -> list[str]:
        sized = sizing.sized(spec, known, here, console=console)
        found.draft = partial(plan.draft, here=here, base=sized)
        return [f"plan: {_fit(plan.draft(spec, here=here, base=sized))}"]

    name, _ = base_reference(spec)

    def compared() -> list[str]:
        if found.model is None:
            return []
        if found.model.folder is None and presets.find(spec.base_model or spec.preset):
            return []  # known to be whole
        count = sizing.compared(known, found.model, token=token, console=console)
        if not count:
            return ["weights: not compared with the base's class, which loading does"]
        return [f"weights: {count:,} tensors, all that its class has"]

    revision = "" if known.revision == name else f" at {known.revision[:19]}"
    lines = together(compared, planned)
    return [f"model: {name}{revision}", *lines[0], *lines[1]]


def _check_template(spec: Spec, found: _Found, token: str | None) -> None:
    """Raise DataError for conversations, if the base is known to have no chat template."""
    settings, model = spec.settings, found.model
    if not found.chats or settings.chat_template or settings.start_adapter:
        return
    if model is None or model.folder:  # whose rows were rendered
        return
    if base.companion(model, "chat_template.jinja", token=token):
        return
    config = base.companion(model, "tokenizer_config.json", token=token)
    with suppress(ValueError):  # loading the tokenizer says more
        if config and verify.json_object(config).get("chat_template"):
            return
    if base.companion(model, "chat_template.json", token=token):
        return
    what = "holds conversations, but the base model has no chat template"
    change = "set ModelConfig.chat_template, or take the model's instruct variant"
    raise DataError.at("DATA-244", found.chats, what, change)


def _check_tokens(spec: Spec) -> None:
    """Raise SpecError for new tokens that do not suit the tokenizer, where that is at hand."""
    folder, s = Path(spec.base_model or ""), spec.settings
    if s.new_tokens and spec.base_model and folder.is_dir():
        from tuning.data.tokenizer import load_tokenizer

        load_tokenizer(folder, s.new_tokens, s.chat_template)


def _fit(decided: plan.Plan) -> str:
    """The rows trained at once and the memory they take, in one line."""
    batch = f"{decided.placement.micro_batch} x {decided.recipe.max_length} tokens at once"
    if decided.fit is None:
        return f"{batch} on {decided.device}; the memory they take is not known"
    held = f"; {decided.placement.text}" if decided.placement.ranks > 1 else ""
    if odd := decided.device.odd:
        held += f"; {odd}, unless you set {decided.device.without}"
    return f"{batch} take {decided.fit.memory.total / 2**30:.1f} GiB on {decided.device}{held}"


def _check_data(spec: Spec, options: Options, access: Access, found: _Found) -> list[str]:
    source = spec.source
    if source.image and not source.urls:
        size = sum(blob.size for blob in access.look(source.image).layers)
        return [
            f"data: {source.image}, {size:,} bytes compressed; a run checks its rows after the pull"
        ]
    token = read_token(options.access.hub_token_file)
    pin = partial(
        hub_dataset.pin,
        policy=options.policy,
        token=token,
        patience=Patience(tries=1),
    )
    pinned = together(*(partial(pin, url) for url in hub_dataset.named(source)))
    files = together(*_first_rows(spec, options, pinned, token))
    firsts: dict[int, tuple[str, formats.Shape]] = {}
    odd = []
    for part, shown, _, first in files:
        if first.shape:
            before = firsts.setdefault(part, (shown, first.shape))
            if first.shape.name != before[1].name:
                odd.append(mixed_shapes(shown, first.shape, *before))
    if odd:
        raise DataError(odd)
    found.shapes = [shape for _, shape in firsts.values()]
    found.chats = next((shown for _, shown, _, first in files if first.chats), None)
    notes = [note for each in pinned for note in each.notes()]
    notes += local.split_notes(Path(source.folder)) if source.folder and not source.within else []
    return [
        f"data: {shown}, {'size unknown' if size is None else f'{size:,} bytes'}, {first}"
        for _, shown, size, first in files
    ] + [f"data: {note}" for note in notes]


def _first_rows(
    spec: Spec, options: Options, pinned: list[hub_dataset.Pinned], token: str | None
) -> Iterator[Callable[[], CheckedFile]]:
    """A call for each file of the data that reads its first rows. Raises as fetch does."""
    source = spec.source
    found: list[File | fetch.Seen] = list(fetch.on_this_machine(source))
    if source.urls:
        secrets = options.data_secrets
        own = load_headers(secrets) if secrets else None
        found += fetch.check(
            source,
            policy=options.policy,
            credentials=hub_dataset.headers(source, token, own),
            pinned=pinned,
            keys=stores.load_keys(secrets, options.policy),
        )
    names = [(each.url, each.shown) for each in found]
    names += [(source.urls.index(p.url), p.shown(entry)) for p in pinned for entry in p.files]
    vocabulary = _vocabulary(spec)
    for each, part in zip(found, mixing.assigned(spec, names), strict=False):
        yield partial(_read, each, part, spec.settings, vocabulary)


def _read(
    file: File | fetch.Seen, part: int, settings: Settings, vocabulary: Vocabulary
) -> CheckedFile:
    from tuning.data.first_rows import check_file, check_head

    own = settings.sources[part] if settings.sources else settings
    names = (getattr(own, name) or getattr(settings, name) for name in mixture.COLUMNS)
    columns = replace(formats.Columns(*names), objective=settings.objective)
    extension = settings.dataset_extension
    if isinstance(file, File):
        rows = check_file(
            file.path, file.shown, columns=columns, extension=extension, vocabulary=vocabulary
        )
    else:
        rows = check_head(
            file.head,
            file.shown,
            whole=file.size == len(file.head),
            columns=columns,
            extension=extension,
            vocabulary=vocabulary,
        )
    return part, file.shown, file.size, rows


def _vocabulary(spec: Spec) -> Vocabulary:
    """The token ids that the base has rows for, where that is known without the network."""
    from tuning.data.vocabulary import Vocabulary, embedding_rows

    folder = Path(spec.base_model) if spec.base_model else None
    if folder and folder.is_dir() and not spec.settings.start_adapter:  # it has its own template
        return Vocabulary(
            embedding_rows(folder),
            folder,
            spec.settings.chat_template,
            spec.settings.new_tokens or (),
            spec.settings.train_on or "assistant",
        )
    try:
        base = plan.known_base(spec)
    except SpecError:
        return Vocabulary()  # checking the model says more
    rows = base.facts.vocab if base.facts else None
    return Vocabulary(rows, new_tokens=spec.settings.new_tokens or ())


def _check_trackers(spec: Spec, options: Options) -> list[str]:
    place.refuse(spec, options.policy, options.tracker_secrets, here=False)
    return [f"trackers: {', '.join(names)}"] if (names := spec.settings.report_to) else []


def _check_evaluation(spec: Spec) -> list[str]:
    asked = evaluating.tasks(spec)
    return [f"evaluation: {', '.join(spec.evaluate)}"] if asked else []


def _check_destination(spec: Spec, access: Access) -> list[str]:
    delivery.check(spec.destination, access)
    delivery.claim(spec.destination, access, run_id=None, own=())
    repository = spec.destination.hub and f"hf://{spec.destination.hub[0]}"
    return [f"destination: {spec.destination.image or repository or 'local'}"]
