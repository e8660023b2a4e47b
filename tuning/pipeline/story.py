"""The phases of a run, in order, on one screen."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import tuning.plan as plan
from tuning import files
from tuning import spec as specs
from tuning.console import Console
from tuning.data import eval_tasks
from tuning.errors import TransientError, TuningError
from tuning.pipeline import (
    endings,
    evaluating,
    finishing,
    journal,
    outcome,
    preparing,
    progress_server,
    start,
    tracking,
    training,
    weights,
)
from tuning.pipeline.finishing import Summary
from tuning.pipeline.options import Options
from tuning.pipeline.run import Run, Value, key_of
from tuning.pipeline.stopping import stop_on_signal
from tuning.sources import base
from tuning.spec import Spec

REPAIRS = 8  # times that a run begins again at one start because an output is damaged
T = TypeVar("T")


def execute(spec: Spec, options: Options, console: Console) -> Summary:
    """Run `spec` in `options.run_dir` from the first phase that its journal does not hold.

    Raises the error that ended the run, once it is in the journal and the termination log, and
    ModuleNotFoundError at once where the extra `train` is not installed.
    """
    _need("torch", "transformers", "pyarrow")
    with (
        stop_on_signal() as stop,
        journal.opened(options.run_dir) as opened,
        progress_server.served(
            options.run_dir, name=spec.name, port=options.port, host=options.host
        ),
    ):
        run = Run(spec, options, console, opened, stop)
        try:
            summary = _repairing(run, _phases)
        except Exception as error:
            known = _record_failure(run, error)
            raise run.raised or known from error
        training.give_steps(run)  # those of an earlier start, if nothing was trained
        if run.raised:
            raise run.raised
        outcome.write_termination(_success(summary, run.folder))
        return summary


def _need(*names: str) -> None:
    """Miss a library of the children here, where it can be told, not in their logs."""
    for name in names:
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _phases(run: Run) -> Summary:
    inputs = _inputs(run)
    summary = finishing.finished(run, inputs)
    if summary is not None:
        run.console.say("Already finished; nothing was done.")
        tracking.catch_up(run, summary.run_id)
        return summary
    run.journal.append(run.phase, "begin", name=run.spec.name)
    files.sweep(run.folder)
    files.write(run.folder / "spec.yaml", specs.dump(run.spec), mode=0o600)  # URLs may hold tokens
    run.note(run.spec.notes)

    preparing.validate(run)
    with run.prewarm_training() as run.prewarmed:  # libraries take longer than all before a step
        return _validated(run, inputs)


def _validated(run: Run, inputs: str) -> Summary:
    """The phases of a run whose spec this device can train."""
    model = preparing.base_model(run)
    known = preparing.check(run, model)
    data = preparing.fetch_data(run)
    asked = evaluating.tasks(
        run.spec, run.options.evaluate, run.folder / "data" / "files" / "image"
    )
    evaluating.note_trained(run, data)
    with weights.background_download(run, model) as download:
        preparing.check_questions(run, download.tokenizer)
        rows = preparing.tokenise(run, data, download.tokenizer, model)
        preparing.tell(run, rows)
        decided, packed = preparing.decide(run, rows, data, known)
        recipe = decided.recipe
        outcome.take_up(run.folder, recipe.run_id)
        is_trained = training.is_trained(run, recipe.run_id)
        with tracking.followed(
            run, recipe.to_json(), recipe.run_id, trained=is_trained
        ) as at_trackers:
            trained = training.train(run, decided, packed, model, weights=download.folder)
            digest = finishing.package(run, decided, trained, packed, model)
            references = finishing.deliver(run, decided, digest)
            at_trackers |= finishing.facts(trained, digest, references)
        measured = evaluating.evaluate(
            run, asked, run_id=recipe.run_id, digest=digest, weights=download.folder
        )
    return finishing.finish(run, inputs, decided, trained, digest, references, measured)


def _repairing(run: Run, work: Callable[[Run], T]) -> T:
    """The result of `work`, which is begun again when an output turns out to be damaged."""
    if run.journal.dropped:
        what = f"{run.journal.dropped} damaged lines of {run.journal.path} were dropped"
        run.console.say(f"{what}; what they told of is done again.", style="yellow")
    spec = run.spec
    for _ in range(REPAIRS):
        run.spec = spec  # as it was read: a start adapter gives it its shape
        try:
            return work(run)
        except journal.Damaged as damaged:
            run.console.say(f"{damaged}: it is made again.", style="yellow")
            last = damaged
    what = f"differs each time after the phase {last.phase} has made it again"
    change = "look at the disk or the machine's memory, or name another disk with --run-dir"
    raise TransientError.at("RUN-123", str(last.path), what, change)


@dataclass(frozen=True)
class Prepared:
    """The data as a run prepares it: results of the data child, and how the rows are packed."""

    tokenised: Value
    packing: plan.Packing
    packed: Value
    samples: list[Value]  # first rows, token by token: preview.json


def prepare(spec: Spec, options: Options, console: Console) -> Prepared:
    """Fetch, tokenise and pack the data of `spec`, without weights, GPU or destination.

    `execute` in the same run directory does not repeat it. Raises what a run would.
    """
    _need("transformers", "pyarrow")
    with stop_on_signal() as stop, journal.opened(options.run_dir) as opened:
        run = Run(spec, options, console, opened, stop)
        try:
            return _repairing(run, _data_phases)
        except Exception as error:
            raise endings.known(error, run.phase, run.folder) from error


def _data_phases(run: Run) -> Prepared:
    model = preparing.base_model(run)
    known = preparing.known_base(run, model)
    run.start = start.fetch(run, model, known)
    data = preparing.fetch_data(run)
    run.begin("weights")
    tokenizer = base.fetch_tokenizer(
        model, cache=run.options.cache, token=run.token(), stop=run.stop.is_set
    )
    rows = preparing.tokenise(run, data, tokenizer, model)
    chosen = plan.packing(run.spec, known, preparing.lengths(rows))
    packed = preparing.pack(run, rows, chosen)
    samples = files.read_json(run.folder / "data" / "tokenised" / "preview.json")
    return Prepared(rows, chosen, packed, samples)


def _record_failure(run: Run, error: Exception) -> TuningError:
    """Write `error` to the journal and the termination log; returns it as a TuningError."""
    known = endings.known(error, run.phase, run.folder)
    shown = tracking.links(run.folder)
    failure = outcome.failed(run.phase, known, outcome.progress(run.folder), shown)
    with suppress(OSError):  # a full disk must not hide the error
        run.journal.append(run.phase, "fail", code=failure.code, message=failure.message)
    finishing.write_report(run)
    outcome.write_termination(failure)
    return known


def _success(summary: Summary, folder: Path) -> outcome.Outcome:
    training = summary.training
    return outcome.Outcome(
        phase="finish",
        code=0,
        step=(training.get("stopped") or {"at": training["steps"]})["at"],
        steps=training["steps"],
        loss=training["loss_last"],
        digest=summary.digest,
        peak_memory_bytes=training["peak_memory_bytes"],
        base_revision=summary.base_revision,
        trackers=tracking.links(folder),
    )


def _inputs(run: Run) -> str:
    """The key of a finished run: the spec and the local files, without the network."""
    local = list(run.spec.source.files)
    if (data := run.spec.source.folder) is not None and data.is_dir():
        local += sorted(path for path in data.rglob("*") if path.is_file())
    if run.spec.base_model and (folder := Path(run.spec.base_model)).is_dir():
        local += sorted(path for path in folder.iterdir() if path.is_file())
    local += start.contents(run.spec.settings.start_adapter)
    local += map(Path, eval_tasks.split(run.options.evaluate)[0])
    existing = [(path, path.stat()) for path in local if path.exists()]
    stats = [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in existing]
    return key_of(asdict(run.spec), stats, run.options.questions, *run.options.evaluate)
