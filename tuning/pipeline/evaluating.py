"""The evaluation that a run is asked for: base beside adapter, once the adapter is delivered.

It is the last thing before the report, in a child of its own, so that nothing in it takes back the
adapter or the exit code: a failure is a warning with the command that measures by hand. The image
is made and pushed before anything is measured, and its digest is that of the recipe; so results are
in `evaluation.json` of the run directory and in a statement attached to the image, never in it; of
a repository of the hub, in one more commit of its model card.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from tuning import files, process
from tuning.adapter import WEIGHTS
from tuning.data import eval_tasks
from tuning.data.eval_tasks import Tasks
from tuning.errors import SpecError, TransientError, TuningError
from tuning.oci import delivery
from tuning.pipeline.run import Run, Value, key_of
from tuning.spec import Spec

FILE = "evaluation.json"
PHASE = "evaluate"
TRIES = 2  # starts that may end without a result: a killed pod comes again, but not forever
_ONLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")  # lm-eval fetches the data of its tasks


def tasks(spec: Spec, asked: Sequence[str] = (), image: Path | None = None) -> Tasks | None:
    """What to measure: `asked` on the command line, or else by the annotation; None for nothing.

    The annotation's files lie in the data's folder, or in that of an `image` once it is pulled:
    before, they are left out. Raises SpecError, DataError or UsageError.
    """
    if asked:
        return eval_tasks.read(asked, where="--evaluate")
    if not spec.evaluate:
        return None
    questions, named = eval_tasks.split(spec.evaluate)
    folder = image if spec.source.image else spec.source.folder
    if questions and folder is None and not spec.source.image:
        what = f"names the file {questions[0]}, and the data is in no folder or image"
        change = "name tasks of lm-eval, give the data as a volume or image, or use --evaluate FILE"
        raise SpecError.at("SERVE-136", eval_tasks.ANNOTATION, what, change)
    return eval_tasks.read(
        spec.evaluate if folder else named,
        where=eval_tasks.ANNOTATION,
        folder=folder or Path(),
    )


def note_trained(run: Run, data: Sequence[Value]) -> None:
    """Warn of files of --evaluate that are among the training data."""
    hashes = {each["sha256"] for each in data}
    for name in eval_tasks.split(run.options.evaluate)[0]:
        if files.digest_file(Path(name)) in hashes:
            what = f"--evaluate {name}: is trained on, too, so it measures what was memorised"
            run.console.say(what, style="yellow")


def evaluate(
    run: Run, what: Tasks | None, *, run_id: str, digest: str, weights: Callable[[], Path]
) -> Value | None:
    """Measure the base in the folder `weights` and the delivered adapter.

    Returns `{"tasks": ...}` as `evaluation.json` has them, or `{"problem": str}`; None if nothing
    is asked. Whatever happens meanwhile, a stop signal included, is a warning.
    """
    _forget_others(run)
    if what is None:
        return None
    key = key_of(digest, what.to_json())
    done = run.journal.current(PHASE, key)
    if done and ("problem" in done or (run.folder / FILE).exists()):
        return done
    run.begin(PHASE, "Evaluating base and adapter ...")
    try:
        record = _measure(run, what, key, weights)
        value: Value = {"tasks": record["tasks"]}
        delivery.deliver_evaluation(
            run.spec.destination,
            run.options.access,
            layout=run.folder / "image",
            adapter=run.folder / "adapter",
            run_id=run_id,
            record=record,
            say=partial(run.console.say, style="yellow"),
        )
    except Exception as error:
        value = {"problem": _fact(error)}
        run.console.say(f"Not evaluated: {value['problem']}", style="yellow")
        where = f"What it printed is in {_log(run)}. " if _log(run).exists() else ""
        text = f"{where}The adapter is delivered. By hand: {_by_hand(run)}"
        run.console.say(text, style="yellow")
    run.stop.clear()  # what is left of the run takes a moment
    with suppress(OSError):
        run.journal.append(PHASE, "end", key, value=value, outputs={})
    return value


def _fact(error: Exception) -> str:
    """What happened; its remedy is the command by hand."""
    if isinstance(error, TuningError):
        return "; ".join(f"{p.code} {p.where}: {p.what}" for p in error.problems)[:1000]
    return f"{type(error).__name__}: {error}"[:1000]


def _measure(run: Run, what: Tasks, key: str, weights: Callable[[], Path]) -> Value:
    mine = [r for r in run.journal.records if (r["phase"], r["key"]) == (PHASE, key)]
    if sum(r["event"] == "start" for r in mine) >= TRIES:
        what_ = f"was killed {TRIES} times"
        raise TransientError.at("SERVE-137", PHASE, what_, "give it more memory, or fewer tasks")
    run.journal.append(PHASE, "start", key)
    (run.folder / FILE).unlink(missing_ok=True)  # of other tasks
    base = run.spec.base_model or run.spec.preset
    request = {
        "base": str(weights()),
        "base_name": base,
        "adapter": str(run.folder / "adapter"),
        "tasks": what.to_json(),
    }
    run.phase = PHASE  # waiting for weights is a phase, too
    online = {name: os.environ.get(name, "0") for name in _ONLINE} if what.named else {}
    record = run.child("serve.evaluation", request, tick=_heard(run), environment=online)
    files.write_json(run.folder / FILE, record)
    return record


def _log(run: Run) -> Path:
    return run.folder / "log" / f"{PHASE}.log"


def _heard(run: Run) -> Callable[[], None]:
    """A tick that raises process.Hung once the child has said nothing for long."""
    log, dog = _log(run), run.options.watchdog()

    def tick() -> None:
        now = time.monotonic()
        dog.observe(log.stat().st_size if log.exists() else 0, step=None, now=now)
        if (silent := dog.silence(now)) is not None:
            raise process.Hung(silent)

    return tick


def _forget_others(run: Run) -> None:
    """Remove the results of another adapter: of this run, trained again to other bytes, say."""
    path = run.folder / FILE
    with suppress(OSError, ValueError, LookupError, TypeError):
        of = files.read_json(path)["adapter_sha256"]
        if of == files.digest_file(run.folder / "adapter" / WEIGHTS):
            return
    path.unlink(missing_ok=True)


def _by_hand(run: Run) -> str:
    """The command that measures what the run could not."""
    source, asked = run.spec.source, run.options.evaluate
    folder = run.folder / "data" / "files" / "image" if source.image else source.folder or Path()
    questions, named = eval_tasks.split(asked or run.spec.evaluate)
    words = [*(name if asked else str(folder / name) for name in questions), *named]
    command = ["python", "-m", "tuning", "eval", "--base", run.spec.base_model or run.spec.preset]
    command += ["--adapter", str(run.folder / "adapter"), "--tasks", ",".join(words)]
    return shlex.join([*command, "--run-dir", str(run.folder)])
