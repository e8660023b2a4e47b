"""The story of a run on one screen, and the process that lives it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tuning import files, plan
from tuning import spec as specs
from tuning.console import Console
from tuning.errors import TuningError
from tuning.pipeline import endings, finishing, journal, preparing, training, weights
from tuning.pipeline import outcome as result
from tuning.pipeline import progress_server as progress
from tuning.pipeline.finishing import Summary
from tuning.pipeline.options import Options
from tuning.pipeline.run import Run, Value, key_of
from tuning.sources import base
from tuning.spec import Spec


def live(spec: Spec, options: Options, console: Console) -> Summary:
    """Live the whole story of `spec` in `options.run_dir`, from where the journal says it stands.

    Raises the error that ended it, after the journal and the termination log have it, too.
    """
    with (
        _stop_asked() as stop,
        journal.opened(options.run_dir) as book,
        progress.served(options.run_dir, name=spec.name, port=options.port),
    ):
        run = Run(spec, options, console, book, stop)
        try:
            summary = _story(run)
        except Exception as error:
            raise _told(run, error) from error
        result.write_termination(_outcome(summary))
        return summary


def _story(run: Run) -> Summary:
    """One screen: what happens, in order."""
    inputs = _inputs(run)
    done = run.book.stands("finish", inputs, unless=("train", "package"))
    if done is not None and all(path.exists() for path in finishing.left_by(run)):
        run.console.say("Already finished; nothing was done.")
        return Summary.from_json(done)
    files.sweep(run.folder)
    files.write(run.folder / "spec.yaml", specs.dump(run.spec), mode=0o600)  # URLs' tokens
    run.dim(run.spec.notes)

    preparing.judge(run)
    model = preparing.base_model(run)
    known = preparing.check(run, model)
    data = preparing.fetch_data(run)
    with weights.coming(run, model) as coming, run.training_ahead() as run.ahead:
        rows = preparing.tokenise(run, data, coming.tokenizer, model)
        decided, packed = preparing.decide(run, rows, data, known)
        trained = training.train(run, decided, packed, model, weights=coming.folder)
    digest = finishing.package(run, decided, trained, packed, model)
    references = finishing.deliver(run, decided, digest)
    return finishing.finish(run, inputs, decided, trained, digest, references)


@dataclass(frozen=True)
class Prepared:
    """Data as a run would prepare it: the data child's answers, and the choice between them."""

    tokenised: Value
    packing: plan.Packing
    packed: Value
    samples: list[Value]  # first rows, token by token: preview.json


def prepare(spec: Spec, options: Options, console: Console) -> Prepared:
    """Fetch, tokenise and pack the data of `spec`, without weights, GPU or destination.

    It is the first part of `live` in the same run directory, which does not do it again. Raises
    what a run would.
    """
    with _stop_asked() as stop, journal.opened(options.run_dir) as book:
        run = Run(spec, options, console, book, stop)
        try:
            return _data_part(run)
        except Exception as error:
            raise endings.known(error, run.phase, run.folder) from error


def _data_part(run: Run) -> Prepared:
    model = preparing.base_model(run)
    known = preparing.known_base(run, model)
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


@contextmanager
def _stop_asked() -> Iterator[threading.Event]:
    """SIGTERM and SIGINT set the event that this yields; a second signal changes nothing."""
    asked = threading.Event()
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: asked.set()) for number in signals}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _told(run: Run, error: Exception) -> TuningError:
    """Record how the story ended, and give the error that a person should see."""
    known = endings.known(error, run.phase, run.folder)
    outcome = result.failed(run.phase, known, result.progress(run.folder))
    with suppress(OSError):  # a full disk is told all the same
        run.book.append(run.phase, "fail", code=outcome.code, message=outcome.message)
    result.write_termination(outcome)
    return known


def _outcome(summary: Summary) -> result.Outcome:
    """A finished run's outcome."""
    training = summary.training
    return result.Outcome(
        phase="finish",
        code=0,
        step=training["steps"],
        steps=training["steps"],
        loss=training["loss_last"],
        digest=summary.digest,
        peak_memory_bytes=training["peak_memory_bytes"],
        base_revision=summary.base_revision,
    )


def _inputs(run: Run) -> str:
    """What a finished run depends on, without the network: the spec and the local files."""
    local = list(run.spec.source.files)
    if (held := run.spec.source.folder) is not None and held.is_dir():
        local += sorted(path for path in held.rglob("*") if path.is_file())
    if run.spec.base_model and (folder := Path(run.spec.base_model)).is_dir():
        local += sorted(path for path in folder.iterdir() if path.is_file())
    found = [(path, path.stat()) for path in local if path.exists()]
    stats = [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in found]
    return key_of(asdict(run.spec), stats, run.options.questions)
