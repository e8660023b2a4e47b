"""From a trained adapter to an image in its place, and the words that tell of it."""

from __future__ import annotations

import datetime
from dataclasses import asdict, dataclass
from pathlib import Path

from tuning import files
from tuning.adapter import WEIGHTS
from tuning.oci import delivery
from tuning.pipeline import model_card, report
from tuning.pipeline.run import Run, Value, key_of
from tuning.plan import Plan
from tuning.sources import base


@dataclass(frozen=True)
class Summary:
    """What a finished run tells: journaled, so that a repeated command tells it again."""

    name: str
    run_id: str
    digest: str
    references: tuple[str, ...]  # where the image can be had
    adapter: str
    adapter_bytes: int
    base: str  # what to give to `chat --base`
    training: Value  # the training child's answer
    planned: Value  # peak_bytes, tokens_per_second, seconds: as far as they were foretold
    base_revision: str | None = None  # commit of the hub, or "sha256:..." of a local folder's files

    def to_json(self) -> Value:
        """For `run --json` and the journal."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Value) -> Summary:
        """The summary that `to_json` wrote down."""
        return cls(**record | {"references": tuple(record["references"])})


def left_by(run: Run) -> tuple[Path, ...]:
    """What a finished run has left on this machine."""
    return (run.folder / "adapter" / WEIGHTS, *_delivered(run))


def _delivered(run: Run) -> tuple[Path, ...]:
    """What tells that the adapter is where it should be, as far as that is a folder."""
    wanted = run.spec.destination
    found = [wanted.layout / "index.json"] if wanted.layout else []
    return (*found, *([wanted.folder / WEIGHTS] if wanted.folder else []))


def package(run: Run, decided: Plan, training: Value, packed: Value, model: base.Base) -> str:
    """The adapter folder gets its card and becomes an image; gives the image's digest."""
    run.begin("package", "Building the image ...")
    recipe = decided.recipe
    facts = model_card.Facts(
        preset=run.spec.preset,
        licence=model.licence,
        rows=packed["train"]["documents"],
        trained_tokens=packed["train"]["trained_tokens"],
        trainable=training["trainable"],
        total=training["total"],
        loss_by_step=list(enumerate(training["loss_by_step"], 1)),
        loss_before=training["eval_loss_before"],
        loss_after=training["eval_loss_after"],
        best_step=training["best_step"],
    )

    def work() -> Value:
        folder = run.folder / "adapter"
        run.room(2 * sum(path.stat().st_size for path in folder.iterdir()))
        model_card.write(folder, recipe=asdict(recipe), run_id=recipe.run_id, facts=facts)
        built = delivery.package(
            folder,
            run.folder / "image",
            preset=run.spec.preset,
            run_id=recipe.run_id,
            annotations=model_card.labels(asdict(recipe), facts=facts),
            destination=run.spec.destination,
            access=run.options.access,
        )
        return {"digest": built.digest}

    key = key_of(
        recipe.run_id, training["adapter_sha256"], run.spec.preset, *run.spec.destination.form
    )
    left = (run.folder / "image" / "index.json",)
    digest: str = run.book.do("package", key, work, leaves=left)["digest"]
    return digest


def deliver(run: Run, decided: Plan, digest: str) -> tuple[str, ...]:
    """Put the image wherever it should be; gives the references under which it can be had."""
    run.begin("push")

    def work() -> Value:
        with run.console.work("Pushing", unit="bytes") as show:

            def report(done: float, total: float | None, note: str) -> None:
                if run.stop.is_set():
                    raise InterruptedError
                show(done, total, note)

            references = delivery.deliver(
                run.spec.destination,
                run.options.access,
                layout=run.folder / "image",
                adapter=run.folder / "adapter",
                run_id=decided.recipe.run_id,
                own=run.own(),
                progress=report,
                run=run.folder,
                say=run.console.say,
            )
        return {"references": references}

    key = key_of(digest, asdict(run.spec.destination))
    done = run.book.do("push", key, lambda: run.unless_stopped(work), leaves=_delivered(run))
    return tuple(done["references"])


def finish(
    run: Run, inputs: str, decided: Plan, training: Value, digest: str, references: tuple[str, ...]
) -> Summary:
    """Write the report, and the summary that a repeated command tells again."""
    run.begin("finish")
    adapter = run.folder / "adapter"
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
        training=training
        | {
            f"eval_perplexity_{when}": model_card.perplexity(training[f"eval_loss_{when}"])
            for when in ("before", "after")
        },
    )
    if run.options.record is not None and training["seconds"]:
        _keep(run.options.record, decided, training)
    files.write(run.folder / "report.html", report.page(run.folder, name=run.spec.name))
    run.book.do("finish", inputs, summary.to_json)
    return summary


def _keep(path: Path, decided: Plan, training: Value) -> None:
    """Append what was planned and what was measured; for `benchmarks/results/plan.jsonl`."""
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
        "measured": {
            "peak_bytes": training["peak_memory_bytes"],
            "tokens_per_second": training["tokens_per_second"],
            "seconds": training["seconds"],
        },
    }
    with path.open("ab") as file:
        file.write(files.canonical(record) + b"\n")
