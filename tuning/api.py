"""Python in place of the command line: load, plan, check, preview, run and pull (docs/python.md).

    import tuning

    spec = tuning.load(model="org/model", data="rows.csv", output="oci:adapter")
    result = tuning.run(spec, on_step=print)
    print(result.digest, result.losses[-1])

`tuning` itself has these names. Each function does what the command of the same name does and
raises what it prints: a `TuningError` with its code, place, fact and remedy. None needs torch in
this process, and rooms are imported where they are needed, so that `plan` starts at once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tuning.plan as plans
from tuning import spec as specs
from tuning.console import Console
from tuning.data import eval_tasks
from tuning.errors import TuningError, UsageError
from tuning.network.policy import Policy
from tuning.plan import Plan, device, prices
from tuning.spec import Spec
from tuning.trackers import place

if TYPE_CHECKING:
    from tuning.pipeline import Options

__all__ = [
    "LiveChart",
    "Logins",
    "Result",
    "Spec",
    "TuningError",
    "check",
    "load",
    "plan",
    "preview",
    "pull",
    "run",
]

Where = str | PathLike[str]
Step = dict[str, Any]  # a record of metrics.jsonl: step, steps, loss, lr, tokens_per_second, ...


@dataclass(frozen=True)
class Logins:
    """Files with logins, and what is trusted. None of them holds a secret itself."""

    push_secret: Path | None = None  # dockerconfigjson; None: docker's own
    pull_secret: Path | None = None
    hub_token_file: Path | None = None
    secrets: Path | None = None  # a folder with push/, pull/, hub/, data/ and trackers/
    policy_file: Path | None = None
    allow_hosts: tuple[str, ...] = ()  # private hosts that data may come from
    ca: Path | None = None
    insecure: bool = False  # plain http to the registry


NONE = Logins()  # docker's and the hub's own, and where a Job mounts them


@dataclass(frozen=True)
class Result:
    """A finished run."""

    digest: str  # of the adapter image
    references: tuple[str, ...]  # where the image can be pulled from
    run_id: str
    run_dir: Path
    adapter: Path  # PEFT folder
    report: Path  # HTML
    base: str  # for `chat --base`, or `from_pretrained`
    losses: tuple[tuple[int, float], ...]  # (step, loss), as logged
    eval_losses: tuple[tuple[int, float], ...]  # of held-out rows
    training: dict[str, Any] = field(repr=False)  # as `run --json` has it under "training"


class LiveChart:
    """An `on_step` that draws the loss in a notebook while the run goes on: `LiveChart()`."""

    def __init__(self) -> None:
        self._records: list[Step] = []
        self._drawn = 0.0  # time.monotonic() of the last drawing
        self._display: Any = None

    def __call__(self, record: Step) -> None:
        """Draw again, at most once a second and at the last step."""
        self._records.append(record)
        now, is_last = time.monotonic(), record["step"] == record.get("steps")
        if now - self._drawn < 1 and not is_last:
            return
        from tuning.pipeline import report

        notebook: Any = import_module("IPython.display")
        self._drawn, drawn = now, notebook.HTML(report.figure(self._records))
        if self._display is None:  # as it stays outside of a notebook
            self._display = notebook.display(drawn, display_id=True)
        else:
            self._display.update(drawn)


def load(
    file: Where | None = None,
    *,
    model: str | None = None,
    data: str | Sequence[str] = (),
    output: str | None = None,
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
    instance: str | None = None,
    logins: Logins = NONE,
) -> Spec:
    """The Workspace in `file` with what the keywords replace, or one of `model` and `data`.

    `settings` are keys of docs/config-keys.md, such as `{"learning_rate": 1e-4}`; the other
    keywords are the command line's. Raises SpecError with all problems.
    """
    allowed = logins.allow_hosts
    if logins.policy_file:
        allowed += tuple(Policy.load(logins.policy_file).allow_hosts)
    named = (data,) if isinstance(data, str) else tuple(data)
    overrides = specs.Overrides(
        base_model=None if file is None else model,
        data=() if file is None else named,
        instance=instance,
        output=output,
        allow_hosts=allowed,
        method=method,
        set=tuple(f"{key}={json.dumps(value)}" for key, value in (settings or {}).items()),
    )
    if file is not None:
        return specs.load(Path(file), overrides=overrides)
    if model is None or not named:
        change = 'write load("workspace.yaml"), or load(model=MODEL, data=DATA)'
        raise UsageError.at("USE-109", "load", "names no file, and not both model and data", change)
    return specs.from_command_line(model, named, overrides=overrides)


def plan(spec: Spec | Where, *, logins: Logins = NONE, quiet: bool = False) -> Plan:
    """What a run would do, each number with its reason, without weights or GPU.

    Raises SpecError where nothing fits, RefusedError or TransientError of the hub.
    """
    spec = _spec(spec)
    place.refuse(spec, None, None, here=False)
    eval_tasks.refuse_names(spec.evaluate)
    here = device.detect()
    if plans.is_enough(spec, here) and not spec.settings.start_adapter:
        decided = plans.draft(spec, here=here)
    else:
        from tuning import pipeline
        from tuning.oci.delivery import BRIEF

        options, console = _options(spec, logins), Console(quiet=quiet)
        access = replace(options.access, patience=BRIEF)
        token = pipeline.read_token(access.hub_token_file)
        decided = pipeline.draft(spec, here=here, token=token, access=access, console=console)
    if file := logins.policy_file:
        decided = prices.load(file).priced(decided, spec, source=file.name)
    return decided


def check(spec: Spec | Where, *, logins: Logins = NONE, quiet: bool = False) -> list[str]:
    """A line for each part that passed: model, plan, data, destination. Nothing is downloaded.

    Raises one TuningError with all problems.
    """
    from tuning import pipeline

    spec = _spec(spec)
    return list(pipeline.check(spec, _options(spec, logins), Console(quiet=quiet)))


def preview(
    spec: Spec | Where,
    *,
    rows: int = 3,
    run_dir: Where | None = None,
    logins: Logins = NONE,
    quiet: bool = False,
) -> dict[str, Any]:
    """What the data becomes, as `preview --json` prints it; `rows` of them token by token.

    Fetches data and tokenizer; `run` in the same run directory goes on from there. Raises
    DataError and what a run raises before it trains.
    """
    from tuning import pipeline
    from tuning.pipeline.preview import summarise

    spec = _spec(spec)
    options = _options(spec, logins, run_dir)
    return summarise(pipeline.prepare(spec, options, Console(quiet=quiet)), rows=rows)


def run(
    spec: Spec | Where,
    *,
    run_dir: Where | None = None,
    on_step: Callable[[Step], object] | None = None,
    ask: Sequence[str] = (),
    ranks: int | None = None,
    logins: Logins = NONE,
    quiet: bool = False,
) -> Result:
    """Tune: check, fetch, plan, train, package, push; the same call again goes on.

    `on_step` gets each new record of metrics.jsonl, in this thread: `step`, `steps`, `loss`, `lr`,
    `tokens_per_second`, or `eval_loss` of held-out rows. What it raises stops the run with its
    state saved, and is raised here. `ask` are questions for base and tuned model at the end.
    `run_dir` is `runs/<name>` by default. Raises TuningError; Stopped after an interrupt.
    """
    from tuning import pipeline

    spec = _spec(spec)
    options = _options(spec, logins, run_dir)
    options = replace(options, questions=tuple(ask), ranks=ranks, on_step=on_step)
    done = pipeline.execute(spec, options, Console(quiet=quiet))
    return Result(
        digest=done.digest,
        references=done.references,
        run_id=done.run_id,
        run_dir=options.run_dir,
        adapter=Path(done.adapter),
        report=options.run_dir / "report.html",
        base=done.base,
        losses=_series(options.run_dir, "loss"),
        eval_losses=_series(options.run_dir, "eval_loss"),
        training=done.training,
    )


def pull(
    image: str,
    folder: Where,
    *,
    base: str | None = None,
    keys: Sequence[Path] = (),
    logins: Logins = NONE,
    quiet: bool = False,
) -> Path:
    """Fetch an adapter image (or `oci:DIR`), verify it, and return its new PEFT folder.

    `base` refuses an adapter of another base model; each of `keys` (cosign, PEM) is a required
    signature. Raises RefusedError, TransientError or SpecError.
    """
    from tuning.oci import delivery
    from tuning.oci.policy import Trust

    access = delivery.Access(
        pull_secret=logins.pull_secret,
        ca=logins.ca,
        insecure=logins.insecure,
        trust=Trust.of(logins.policy_file, keys),
        patience=delivery.BRIEF,
    )
    delivery.pull(image, Path(folder), access=access, console=Console(quiet=quiet), base=base)
    return Path(folder)


def _spec(spec: Spec | Where) -> Spec:
    return spec if isinstance(spec, Spec) else load(spec)


def _options(spec: Spec, logins: Logins, run_dir: Where | None = None) -> Options:
    from tuning import pipeline

    folder = Path(run_dir) if run_dir is not None else None
    return pipeline.gather(spec, run_dir=folder, **vars(logins))


def _series(run_dir: Path, name: str) -> tuple[tuple[int, float], ...]:
    """The values `name` of metrics.jsonl by step."""
    from tuning.pipeline import outcome

    records = outcome.records(run_dir)
    return tuple((r["step"], r[name]) for r in records if isinstance(r.get(name), float))
