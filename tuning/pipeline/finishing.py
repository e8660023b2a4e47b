"""The phases after training: package, push, finish; and the summary of a run."""

from __future__ import annotations

import datetime
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from tuning import files
from tuning import spec as specs
from tuning.adapter import WEIGHTS
from tuning.errors import RefusedError, SpecError
from tuning.oci import delivery
from tuning.oci.layout.check import check_layout
from tuning.pipeline import model_card, report
from tuning.pipeline.journal import Damaged
from tuning.pipeline.run import Run, Value, key_of
from tuning.plan import Plan
from tuning.sources import base


@dataclass(frozen=True)
class Summary:
    """The summary of a finished run; journaled, so that the same command again prints it."""

    name: str
    run_id: str
    digest: str
    references: tuple[str, ...]  # where the image can be pulled from
    adapter: str
    adapter_bytes: int
    base: str  # for `chat --base`
    training: Value  # the training child's result
    planned: Value  # peak_bytes, tokens_per_second, seconds; None where not predicted
    base_revision: str | None = None  # commit of the hub, or "sha256:..." of a local folder's files
    evaluation: Value | None = None  # what `evaluating.evaluate` returns
    folder: str | None = None  # where the adapter's files were copied to (dir:DIR, a volume)

    def to_json(self) -> Value:
        """For `run --json` and the journal."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Value) -> Summary:
        """The inverse of `to_json`."""
        return cls(**record | {"references": tuple(record["references"])})


PHASES = ("train", "package", "push", "finish")  # whose outputs a finished run has


def finished(run: Run, inputs: str) -> Summary | None:
    """The summary of the run if it is finished and everything that it made is as it was made.

    What differs is recorded as damaged, so that its phase is repeated.
    """
    record = run.journal.current("finish", inputs, unless=PHASES[:-1])
    there = (run.folder / "adapter" / WEIGHTS, *_delivered(run))
    if record is None or not all(path.exists() for path in there):
        return None
    try:
        run.journal.verify(*PHASES)
    except Damaged as damaged:
        run.console.say(f"{damaged}: it is made again.", style="yellow")
        return None
    return Summary.from_json(record)


def _delivered(run: Run) -> tuple[Path, ...]:
    """The files of the layout and of the folder that the adapter is delivered to."""
    layout, folder = run.spec.destination.layout, run.spec.destination.folder
    image, adapter = run.folder / "image", run.folder / "adapter"
    return (
        *((layout / path.relative_to(image) for path in _files(image)) if layout else ()),
        *((folder / path.relative_to(adapter) for path in _files(adapter)) if folder else ()),
    )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def package(run: Run, decided: Plan, training: Value, packed: Value, model: base.Base) -> str:
    """Write the model card, build the image, return its digest."""
    run.begin("package", "Building the image ...")
    recipe = decided.recipe
    facts = model_card.Facts(
        preset=run.spec.preset,
        licence=model.licence,
        weights=model.weights,
        rows=packed["train"]["documents"],
        trained_tokens=packed["train"]["trained_tokens"],
        trainable=training["trainable"],
        total=training["total"],
        loss_by_step=list(enumerate(training["loss_by_step"], 1)),
        loss_before=training["eval_loss_before"],
        loss_after=training["eval_loss_after"],
        rewards=model_card.rewards(training),
        best_step=training["best_step"],
        stopped=training.get("stopped"),
        ends=tuple(training.get("ends") or ()),
        datasets=[each.origin for each in run.datasets],
    )

    lost: list[str] = []

    def work() -> Value:
        folder = run.folder / "adapter"
        run.require_space(2 * sum(path.stat().st_size for path in folder.iterdir()))
        model_card.write(
            folder, recipe=recipe.to_json(), run_id=recipe.run_id, facts=facts, lost=lost.append
        )
        built = delivery.package(
            folder,
            run.folder / "image",
            preset=run.spec.preset,
            run_id=recipe.run_id,
            base_model=recipe.base_model,
            annotations=model_card.labels(recipe.to_json(), facts=facts),
            destination=run.spec.destination,
            access=run.options.access,
        )
        if (bad := check_layout(run.folder / "image", built.digest)) is not None:
            raise run.journal.damaged("package", bad)
        run.journal.verify("train")  # what was packaged is what was trained
        run.note(lost)
        return {"digest": built.digest}

    def outputs(_: Value) -> list[Path]:
        index = run.folder / "image" / "index.json"
        return sorted({index, *_files(run.folder / "adapter"), *_files(run.folder / "image")})

    key = key_of(
        recipe.run_id, training["adapter_sha256"], run.spec.preset, *run.spec.destination.form
    )
    done = run.journal.do("package", key, work, outputs=outputs, needs=("train",))
    digest: str = done["digest"]
    return digest


def deliver(run: Run, decided: Plan, digest: str) -> tuple[str, ...]:
    """Deliver the image to its destinations; returns the references to pull it from."""
    run.begin("push")
    image = run.folder / "image"

    def work() -> Value:
        if run.journal.outputs("package") is None and (bad := check_layout(image, digest)):
            raise run.journal.damaged("package", bad)  # built by a version without digests
        save_inputs(run, decided)  # the provenance statement is made of them
        with run.console.work("Pushing", unit="bytes") as show:

            def report(done: float, total: float | None, note: str) -> None:
                if run.stop.is_set():
                    raise InterruptedError
                show(done, total, note)

            references = delivery.deliver(
                run.spec.destination,
                run.options.access,
                layout=image,
                adapter=run.folder / "adapter",
                run_id=decided.recipe.run_id,
                own=run.own_digests(),
                progress=report,
                run=run.folder,
                say=run.console.say,
            )
        folder = run.spec.destination.folder
        return {
            "references": references,
            "folder": folder and str(folder.absolute()),
            "insecure": run.options.access.insecure,
        }

    key = key_of(digest, asdict(run.spec.destination))
    try:
        done = run.journal.do(
            "push",
            key,
            partial(run.interruptible, work),
            outputs=lambda _: _delivered(run),
            needs=("package",),
        )
    except (SpecError, RefusedError):
        run.journal.verify("package")  # a registry noticed what has rotted since
        raise
    return tuple(done["references"]) or (f"oci:{image}",)


def facts(training: Value, digest: str, references: tuple[str, ...]) -> Value:
    """What a tracker shows of a finished run beside its curves."""
    names = ("eval_loss_before", "eval_loss_after", "best_step")
    known = {name: training[name] for name in names if training.get(name) is not None}
    return known | {"image": ", ".join(references), "image_digest": digest}


def save_inputs(run: Run, decided: Plan) -> None:
    """Write spec.yaml, which may hold tokens in URLs, and plan.json."""
    files.write(run.folder / "spec.yaml", specs.dump(run.spec), mode=0o600)
    files.write_json(run.folder / "plan.json", decided.to_json())


def finish(
    run: Run,
    inputs: str,
    decided: Plan,
    training: Value,
    digest: str,
    references: tuple[str, ...],
    evaluation: Value | None = None,
) -> Summary:
    """Write the report and the summary."""
    run.begin("finish")
    adapter, copied = run.folder / "adapter", run.spec.destination.folder
    summary = Summary(
        name=run.spec.name,
        run_id=decided.recipe.run_id,
        digest=digest,
        references=references or (f"oci:{run.folder / 'image'}",),
        adapter=str(adapter),
        adapter_bytes=(adapter / WEIGHTS).stat().st_size,
        base=run.spec.base_model or run.spec.preset,
        planned=decided.predicted(),
        base_revision=decided.recipe.base_revision,
        evaluation=evaluation,
        folder=str(copied) if copied else None,
        training=training
        | {
            f"eval_perplexity_{when}": None
            if decided.recipe.objective
            else model_card.perplexity(training[f"eval_loss_{when}"])
            for when in ("before", "after")
        },
    )
    names = ("spec.yaml", "plan.json")
    written = [path for name in names if (path := run.folder / name).is_file()]
    before = PHASES[:-1]

    def work() -> Value:
        _report(run, decided, training)  # the journal says by now that the adapter is delivered
        return summary.to_json()

    run.journal.do("finish", inputs, work, outputs=lambda _: written, needs=before, unless=before)
    return summary


def _report(run: Run, decided: Plan, training: Value) -> None:
    """The record of the run and its report; what fails is a note, the adapter is delivered."""
    try:
        if run.options.record is not None and training["seconds"]:
            _append_record(run.options.record, decided, training)
    except Exception as error:
        _log(run, error)
        run.note([f"no record was appended: {type(error).__name__}: {str(error)[:200]}"])
    write_report(run)


def write_report(run: Run) -> None:
    """Write report.html; a failure is a note, so that it hides neither an adapter nor an error."""
    try:
        report.write(run.folder)
    except Exception as error:
        _log(run, error)
        run.note([f"the report was not written: {type(error).__name__}: {str(error)[:200]}"])


def _log(run: Run, error: Exception) -> None:
    with suppress(OSError), (run.folder / "log" / "finish.log").open("a") as log:
        log.write("".join(traceback.format_exception(error)))


def _append_record(path: Path, decided: Plan, training: Value) -> None:
    """Append planned and measured values as JSON, as in `benchmarks/results/plan.jsonl`."""
    recipe = decided.recipe
    record = {
        "date": datetime.date.today().isoformat(),
        "device": decided.device.name,
        "base": recipe.base_model,
        "method": recipe.method,
        "rank": recipe.rank,
        "max_length": recipe.max_length,
        "placement": asdict(decided.placement),
        "versions": recipe.versions,
        "planned": decided.predicted(),
        "calibrated": training.get("calibrated"),
        "measured": {
            "peak_bytes": training["peak_memory_bytes"],
            "tokens_per_second": training["tokens_per_second"],
            "seconds": training["seconds"],
        },
    }
    with path.open("ab") as file:
        file.write(files.canonical(record) + b"\n")
