"""From a spec to a plan and packed rows: the phases before training."""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import tuning.plan as plan
from tuning import files
from tuning.console import Console
from tuning.data import read_progress
from tuning.network import policy
from tuning.oci import delivery, model_image
from tuning.oci.delivery import Access
from tuning.pipeline import evaluating, finishing, mixing, sizing, start
from tuning.pipeline.endings import together
from tuning.pipeline.options import base_reference, reference
from tuning.pipeline.run import Run, Value, key_of
from tuning.plan import Plan, backends
from tuning.sources import base, fetch, hub_dataset, local, stores
from tuning.sources.hub import read_token
from tuning.spec import mixture
from tuning.trackers import place

RECIPE_LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes")
DATA_SETTINGS = (*mixture.COLUMNS, "dataset_extension", "chat_template", "train_on")
LATER_SETTINGS = ("new_tokens", "objective")  # unknown to earlier versions: only if they are set


def validate(run: Run) -> None:
    """Validate what the spec alone decides on this device, before any network."""
    run.begin("judge")
    place.refuse(run.spec, run.options.policy, run.options.tracker_secrets)
    evaluating.tasks(run.spec, run.options.evaluate)
    backends.refuse_missing(run.spec.settings.attention)
    try:
        known = plan.known_base(run.spec)
    except plan.Unknown:
        return  # its config has to be fetched first
    plan.refuse_unsupported(run.spec, known, run.device())


def base_model(run: Run) -> base.Base:
    """The base with its revision pinned; a local folder is read again at every start."""
    run.begin("base")
    name, revision = base_reference(run.spec)
    access, cache = run.options.access, run.options.cache
    if model_image.is_image(name):  # a large download: check the destination first
        delivery.check(run.spec.destination, access)
    name = model_image.local(name, access=access, cache=cache, console=run.console)
    if Path(name).is_dir():
        return base.resolve(name, revision=None, token=None)

    def work() -> Value:
        token, cache = run.token(), run.options.cache
        return base.resolve(name, revision=revision, token=token, cache=cache).to_json()

    return base.Base.from_json(run.journal.do("base", key_of(name, revision), work))


def check(run: Run, model: base.Base) -> plan.Base:
    """Validate everything that needs no download, in one pass; returns the base."""
    run.begin("check", "Checking model, machine and destination ...")
    here = run.device()
    if run.spec.instance and plan.device_of(run.spec.instance).name != here.name:
        run.note([f"the spec names {run.spec.instance}, this machine has {here}"])
    destination, access, own = run.spec.destination, run.options.access, run.own_digests()

    def supported() -> plan.Base:
        known = known_base(run, model)
        plan.refuse_unsupported(run.spec, known, here)
        return known

    results: list[Any] = together(
        supported,
        lambda: delivery.check(destination, access),
        lambda: delivery.claim(destination, access, run_id=None, own=own),
    )
    run.start = start.fetch(run, model, results[0])
    known = sizing.sized(
        run.spec,
        results[0],
        here,
        console=run.console,
        stop=run.stop.is_set,
        keep_open=(run.journal.lock,),
    )
    bare = replace(run.spec, instance=None, nodes=1, gpus=None)  # of this machine
    plan.draft(bare, here=here, base=known)  # refuses what cannot fit
    return known


def known_base(run: Run, model: base.Base) -> plan.Base:
    """The base as its config describes it. Raises as base.check does."""
    config = base.check(model, token=run.token(), cache=run.options.cache)
    return plan.base_of(run.spec, config, revision=model.revision)


def fetch_data(run: Run) -> list[Value]:
    """The verified files of the data, as `local.File.to_json` writes them."""
    run.begin("fetch")
    source, secrets = run.spec.source, run.options.data_secrets
    keys = stores.load_keys(secrets, run.options.policy) if source.urls else None

    pinned = run.datasets = _datasets(run)

    def work() -> Value:
        with run.console.work("Fetching data", unit="bytes") as report:
            fetched = fetch.fetch(
                source,
                run.folder / "data" / "files",
                policy=run.options.policy,
                credentials=hub_dataset.headers(
                    source, run.token(), policy.load_headers(secrets) if secrets else None
                ),
                keys=keys,
                pinned=pinned,
                pull_image=run.options.access.pull_data,
                progress=report,
                stop=run.stop.is_set,
            )
        return {"files": [file.to_json() for file in fetched]}

    if source.files or source.folder:  # may have changed: hashed at every start
        done = work()
    else:
        named = fetch.stores_of(source, keys)  # the same URL is another file in another store
        commits = [[each.name, each.revision] for each in pinned]
        done = run.journal.do("fetch", key_of(asdict(source), *named, *commits), work)
    folder = run.folder / "data" / "files" / "image" if source.image else source.folder
    if folder and not source.within and not source.urls:
        run.note(local.split_notes(Path(folder)))
    files_: list[Value] = done["files"]
    run.note(local.copy_notes([local.File.from_json(each) for each in files_]))
    return files_


def _datasets(run: Run) -> tuple[hub_dataset.Pinned, ...]:
    """The datasets of the hub that the URLs name; the commit of the first start counts."""
    named = hub_dataset.named(run.spec.source)

    def work() -> Value:
        how = partial(
            hub_dataset.pin,
            policy=run.options.policy,
            token=run.token(),
            stop=run.stop.is_set,
        )
        return {"datasets": [how(url).to_json() for url in named]}

    if not named:
        return ()
    done = run.journal.do("datasets", key_of(named), work)
    pinned = tuple(map(hub_dataset.Pinned.from_json, done["datasets"]))
    run.note(note for each in pinned for note in each.notes())
    return pinned


def check_questions(run: Run, tokenizer: Path) -> None:
    """Refuse, before anything is trained, questions that the chat template cannot show."""
    if not run.options.questions or (run.folder / "adapter").exists():
        return
    run.begin("tokenise")
    request = {
        "step": "ask",
        "base": str(tokenizer),
        "chat_template": run.spec.settings.chat_template,
        "new_tokens": run.spec.settings.new_tokens,
        "questions": list(run.options.questions),
    }
    run.child("data", request)


def tokenise(run: Run, data: list[Value], tokenizer: Path, model: base.Base) -> Value:
    """The result of the step "tokenise" (tuning/data), with the key of its phase."""
    run.begin("tokenise", "Reading and tokenising the data ...")
    settings = run.spec.settings
    out = run.folder / "data" / "tokenised"
    request = {
        "step": "tokenise",
        "files": data,
        "base": str(tokenizer),
        "out": str(out),
        "settings": {name: getattr(settings, name) for name in DATA_SETTINGS}
        | {name: set_ for name in LATER_SETTINGS if (set_ := getattr(settings, name))},
        **mixing.requested(run.spec, data),
    }
    mixed = [request["seed"], *mixing.recorded(run.spec, data)] if settings.sources else []
    hashes = [file["sha256"] for file in data]
    key = key_of(hashes, model.revision, request["settings"], *mixed)
    if run.journal.done("tokenise", key) is None:
        run.require_space(sum(file["size"] for file in data))

    def work() -> Value:
        for file in data:
            if files.digest_file(Path(file["path"])) != file["sha256"]:
                raise run.journal.damaged("fetch", Path(file["path"]))
        with run.console.work("Reading and tokenising", unit="bytes") as report:

            def tick() -> None:
                if (progress := read_progress.read(out / "progress")) is not None:
                    report(*progress, "")

            return run.child("data", request, tick=tick) | {"key": key}

    names = ("rows.arrow", "preview.json", "tokenised.json")
    outputs = [out / name for name in names]
    return run.journal.do("tokenise", key, work, outputs=lambda _: outputs)


def tell(run: Run, done: Value) -> None:
    """Say what the tokenised rows `done` are; a preview has a page for it."""
    count = len(done.get("sources", ()))
    shape = f"{done['shape']['name']} ({done['shape']['reason']})"
    run.console.say(
        f"  {done['rows']:,} rows, {done['tokens']:,} tokens, "
        f"{done['trained_tokens'] / done['tokens']:.0%} of them trained: "
        + (f"a mixture of {count}" if count else shape)
    )
    run.note(done["notes"])


def decide(run: Run, rows: Value, data: list[Value], known: plan.Base) -> tuple[Plan, Value]:
    """The plan with real lengths, and the packed rows.

    The recipe is frozen the first time; a later start keeps it and derives the placement again.
    """
    run.begin("plan")
    versions = {name: importlib.metadata.version(name) for name in RECIPE_LIBRARIES}
    here = run.device(again=True)
    going_on = run.start.sha256 if run.start else None
    decided = plan.make(
        run.spec, known, here, lengths=lengths(rows), versions=versions, start=going_on
    )
    parts = (rows["key"], run.spec.method, asdict(run.spec.settings), versions, known.name)
    key = key_of(*parts, *filter(None, [going_on]))
    kept = run.journal.done("plan", key)
    recipe = plan.recipe_from_json(kept["recipe"]) if kept else decided.recipe
    packed = pack(run, rows, plan.Packing.of(recipe))
    count = packed["train"]["rows"]
    if kept:
        decided = plan.resume(decided, recipe, known, run.spec, rows=count)
    else:
        hashes = tuple(file["sha256"] for file in data)
        sources = mixing.recorded(run.spec, data)
        decided = plan.freeze(decided, run.spec, rows=count, data=hashes, sources=sources)
        run.journal.do("plan", key, lambda: {"recipe": asdict(decided.recipe)})
    finishing.save_inputs(run, decided)
    if not (run.folder / "adapter").exists():
        run.require_space(plan.disk_bytes(decided.recipe, known))
    return decided, packed


def pack(run: Run, rows: Value, chosen: plan.Packing) -> Value:
    """The result of the step "pack" (tuning/data)."""
    run.begin("pack")
    settings = run.spec.settings
    request = {
        "step": "pack",
        "tokenised": str(run.folder / "data" / "tokenised"),
        "out": str(run.folder / "data" / "packed"),
        "max_length": chosen.max_length,
        "packing": chosen.packing,
        "shuffle": chosen.shuffle,
        "seed": chosen.seed,
        "shuffle_seed": settings.shuffle_seed,
        "train_share": chosen.train_share,
        "over_length": settings.over_length,
        "batch": settings.micro_batch,
    }
    key = key_of(rows["key"], request)
    work = partial(run.child, "data", request)
    done = run.journal.do("pack", key, work, outputs=_packed, needs=("tokenise",))
    run.note(done["notes"])
    return done


def _packed(done: Value) -> list[Path]:
    parts = [Path(done[name]["path"]) for name in ("train", "eval") if done[name]]
    return [*parts, parts[0].with_name("packed.json")]


def lengths(rows: Value) -> plan.Lengths:
    """The lengths in the result of the step "tokenise"."""
    documents = rows["documents"] if "documents" in rows else rows["rows"]
    longest = rows["lengths"]["max"]
    return plan.Lengths(documents, rows["tokens"], longest, rows.get("objective", "sft"))


def base_folder(
    name: str,
    *,
    token_file: Path | None,
    console: Console,
    access: Access | None = None,
    revision: str | None = None,
) -> Path:
    """The folder with the weights of a preset, hub model, image or folder; downloads if needed.

    `revision` is the hub's; None means the preset's, or main.
    """
    where, revision = reference(name, revision)
    where = model_image.local(where, access=access or Access(), console=console)
    token = read_token(token_file)
    model = base.resolve(where, revision=revision, token=token)
    if model.folder is not None:
        return model.folder
    with console.work(f"Fetching {model.name}", unit="bytes") as report:
        return base.fetch(model, token=token, progress=report)
