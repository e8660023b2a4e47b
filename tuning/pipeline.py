"""The story of a run, and the torch-free parent process that lives it.

Every phase is remembered in the journal under a key of what it depends on, so the same command
again goes on where it stopped, and a changed spec redoes what it changes. Signals only set a flag:
a phase that can stop stops at its next safe point and the run ends with exit code 75.
"""

from __future__ import annotations

import importlib.metadata
import logging
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tuning import (
    base,
    card,
    delivery,
    device,
    fetch,
    files,
    formats,
    image,
    journal,
    live,
    network,
    plan,
    presets,
    process,
    result,
    threads,
    watchdog,
)
from tuning import spec as specs
from tuning.console import Console, Report
from tuning.data.glance import HEAD, glance
from tuning.delivery import Access
from tuning.errors import (
    Killed,
    OutOfMemoryError,
    Problem,
    SpecError,
    Stopped,
    TransientError,
    TuningError,
)
from tuning.plan import Plan
from tuning.spec import Spec

log = logging.getLogger(__name__)

Value = dict[str, Any]
JOB_SECRETS, JOB_MODELS = Path("/etc/tuning/secrets"), Path("/models")
RECIPE_LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes")
LAST_SECONDS = 5.0  # of the grace period, for the parent's own last words
DATA_SETTINGS = (
    "messages_column",
    "context_column",
    "response_column",
    "dataset_extension",
    "chat_template",
    "train_on",
)


@dataclass(frozen=True)
class Options:
    """What the command line says about this machine; nothing in it changes the adapter."""

    run_dir: Path
    access: Access = field(default_factory=Access)
    policy: fetch.Policy = field(default_factory=fetch.Policy)
    hub_token_file: Path | None = None
    data_secrets: Path | None = None  # folder of headers for private URLs, by host
    cache: Path | None = None  # base weights; the hub's usual cache folder if not given
    questions: tuple[str, ...] = ()
    port: int | None = None
    grace: float = 30.0  # seconds between SIGTERM and SIGKILL, as Kubernetes counts them
    watchdog: Callable[[], watchdog.Watchdog] = watchdog.Watchdog  # one for each training child


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

    def to_json(self) -> Value:
        """For `run --json` and the journal."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Value) -> Summary:
        """The summary that `to_json` wrote down."""
        return cls(**record | {"references": tuple(record["references"])})


def run(spec: Spec, options: Options, console: Console) -> Summary:
    """Live the whole story of `spec` in `options.run_dir`, from where the journal says it stands.

    Raises the error that ended it, after the journal and the termination log have it, too.
    """
    with (
        _stop_asked() as stop,
        journal.opened(options.run_dir) as book,
        live.served(options.run_dir, name=spec.name, port=options.port),
    ):
        story = _Story(spec, options, console, book, stop)
        try:
            summary = story.live()
        except Exception as error:
            raise story.told(error) from error
        result.write_termination(story.outcome(summary))
        return summary


@dataclass(frozen=True)
class Prepared:
    """Data as a run would prepare it: the data child's answers, and the choice between them."""

    tokenised: Value
    packing: plan.Packing
    packed: Value
    samples: list[Value]  # first rows, token by token: preview.json


def prepare(spec: Spec, options: Options, console: Console) -> Prepared:
    """Fetch, tokenise and pack the data of `spec`, without weights, GPU or destination.

    It is the first part of `run` in the same run directory, which does not do it again. Raises what
    a run would.
    """
    with _stop_asked() as stop, journal.opened(options.run_dir) as book:
        story = _Story(spec, options, console, book, stop)
        try:
            return story.prepare()
        except Exception as error:
            raise story.known(error) from error


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


@dataclass
class _Story:
    spec: Spec
    options: Options
    console: Console
    book: journal.Journal
    stop: threading.Event
    phase: str = "start"
    ahead: process.Ahead | None = None  # the training child, while it only loads its libraries

    def live(self) -> Summary:
        """One screen: what happens, in order."""
        inputs = self._inputs()
        done = self.book.stands("finish", inputs, unless=("train", "package"))
        if done is not None:
            self.console.say("Already finished; nothing was done.")
            return Summary.from_json(done)
        files.sweep(self.folder)
        files.write(self.folder / "spec.yaml", specs.dump(self.spec), mode=0o600)  # URLs' tokens
        for note in self.spec.notes:
            self.console.say(f"  {note}", style="dim")

        self._judge()
        model = self._base()
        self._check(model)
        data = self._fetch()
        weights = self._weights(model)
        with self._training_ahead() as self.ahead:
            rows = self._tokenise(data, weights, model)
            decided, packed = self._plan(rows, data, weights, model)
            held = self._claim(decided.recipe.run_id)
            training = self._train(decided, packed, weights, model, held=held)
        digest = self._package(decided, training, packed, model)
        references = self._deliver(decided, digest)
        return self._finish(inputs, decided, training, digest, references)

    def prepare(self) -> Prepared:
        """The data part of the story alone."""
        model = self._base()
        config = base.check(model, token=self._token(), cache=self.options.cache)
        known = self._known(model, config)
        data = self._fetch()
        self._begin("weights")
        tokenizer = base.fetch_tokenizer(
            model, cache=self.options.cache, token=self._token(), stop=self.stop.is_set
        )
        rows = self._tokenise(data, tokenizer, model)
        chosen = plan.packing(self.spec, known, _lengths(rows))
        packed = self._pack(rows, chosen)
        samples = files.read_json(self.folder / "data" / "tokenised" / "preview.json")
        return Prepared(rows, chosen, packed, samples)

    # What goes wrong, told once: to the journal, to the termination log, to the caller.

    def told(self, error: Exception) -> TuningError:
        """Record how the story ended, and give the error that a person should see."""
        known = self.known(error)
        outcome = result.failed(self.phase, known, result.progress(self.folder))
        with suppress(OSError):  # a full disk is told all the same
            self.book.append(self.phase, "fail", code=outcome.code, message=outcome.message)
        result.write_termination(outcome)
        return known

    def known(self, error: Exception) -> TuningError:
        """`error` as one that a person can read; the traceback of a bug goes into a file."""
        known = error if isinstance(error, TuningError) else process.disk_full(error)
        if known is None:
            path = self.folder / "traceback.txt"
            path.write_text("".join(traceback.format_exception(error)))
            known = TuningError.at(
                "RUN-199",
                self.phase,
                f"internal error, {type(error).__name__}; the traceback is in {path}",
                "report it with that file",
            )
        return known

    def outcome(self, summary: Summary) -> result.Outcome:
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
        )

    # Small things that every phase needs.

    @property
    def folder(self) -> Path:
        return self.options.run_dir

    def _begin(self, phase: str, title: str = "") -> None:
        """Enter a phase; a stop that was asked for since the last one takes effect here."""
        if self.stop.is_set():
            raise _stopped(self.phase)
        self.phase = phase
        if title:
            self.console.say(title)

    def _child(
        self, room: str, request: Value, *, tick: Callable[[], None] = lambda: None
    ) -> Value:
        """The answer of a child process; its request, answer and output are kept in `log/`."""
        logs = self.folder / "log"
        logs.mkdir(exist_ok=True)
        output = logs / f"{self.phase}.log"
        try:
            return process.run(
                room,
                logs / f"{self.phase}.json",
                request,
                log=output,
                keep_open=(self.book.lock,),
                stop_asked=self.stop.is_set,
                tick=tick,
                grace=max(1.0, self.options.grace - LAST_SECONDS),
                ahead=self.ahead if room == "train" else None,
            )
        except process.Hung as hung:
            raise _hang(hung, self.phase, output) from None
        except process.ChildDied as died:
            if self.stop.is_set():
                raise _stopped(self.phase) from None
            raise _death(died, self.phase, output) from None

    def _training_ahead(self) -> AbstractContextManager[process.Ahead | None]:
        """A training child that loads its libraries meanwhile, where there is training to do."""
        if (self.folder / "adapter").exists():
            return nullcontext()
        logs = self.folder / "log"
        logs.mkdir(exist_ok=True)
        return process.Ahead("train", log=logs / "train.log", keep_open=(self.book.lock,))

    def _unless_stopped(self, work: Callable[[], Value]) -> Value:
        """What blocking `work` gives, or Stopped soon after a signal, whatever it waits for."""
        (done,) = threads.side_by_side([work], at_once=1, stop=self.stop.is_set)
        if isinstance(done, InterruptedError):
            raise _stopped(self.phase)
        if isinstance(done, BaseException):
            raise done
        return done

    def _room(self, need: int) -> None:
        """Refuse to begin what the disk is known to be too small for."""
        free = shutil.disk_usage(self.folder).free
        if free < need:
            what = f"{self.phase} takes about {need:,} bytes here, where {free:,} are free"
            change = "free some space, or name a larger disk with --run-dir"
            raise SpecError.at("RUN-121", str(self.folder), what, change)

    def _token(self) -> str | None:
        return read_token(self.options.hub_token_file)

    # Each phase of the story, in its order.

    def _inputs(self) -> str:
        """What a finished run depends on, without the network: the spec and the local files."""
        local = list(self.spec.source.files)
        if self.spec.base_model and (folder := Path(self.spec.base_model)).is_dir():
            local += sorted(path for path in folder.iterdir() if path.is_file())
        found = [(path, path.stat()) for path in local if path.exists()]
        stats = [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in found]
        return _key(asdict(self.spec), stats, self.options.questions)

    def _judge(self) -> None:
        """Refuse at once what the spec alone shows to be impossible here, before any network."""
        self._begin("judge")
        try:
            known = plan.known_base(self.spec)
        except plan.Unknown:
            return  # its config has to be fetched first
        plan.refuse_unsupported(self.spec, known, device.detect())

    def _base(self) -> base.Base:
        self._begin("base")
        name, revision = base_reference(self.spec)
        if Path(name).is_dir():  # a folder may have changed: looked at afresh at every start
            return base.resolve(name, revision=None, token=None)

        def work() -> Value:
            token, cache = self._token(), self.options.cache
            return base.resolve(name, revision=revision, token=token, cache=cache).to_json()

        return base.Base.from_json(self.book.do("base", _key(name, revision), work))

    def _check(self, model: base.Base) -> None:
        """What can be refused in seconds is refused here, all of it in one pass."""
        self._begin("check", "Checking model, machine and destination ...")
        here = device.detect()
        if self.spec.instance and plan.device_of(self.spec.instance).name != here.name:
            self.console.say(f"  {self.spec.instance} is named, but this is {here}", style="dim")
        destination, access, own = self.spec.destination, self.options.access, self._own()
        together(
            lambda: self._check_model(model, here),
            lambda: delivery.check(destination, access),
            lambda: delivery.claim(destination, access, run_id=None, own=own),
        )

    def _check_model(self, model: base.Base, here: device.Device) -> None:
        config = base.check(model, token=self._token(), cache=self.options.cache)
        plan.refuse_unsupported(self.spec, self._known(model, config), here)

    def _own(self) -> tuple[str, ...]:
        """Digests that this run directory put out before."""
        return tuple(value["digest"] for value in self.book.values("package"))

    def _known(self, model: base.Base, config: Value) -> plan.Base:
        return plan.base_from_config(declared_name(self.spec), model.revision, config)

    def _fetch(self) -> list[Value]:
        self._begin("fetch")
        source = self.spec.source

        def work() -> Value:
            with self.console.work("Fetching data", unit="bytes") as report:
                found = fetch.fetch(
                    source,
                    self.folder / "data" / "files",
                    policy=self.options.policy,
                    credentials=self._credentials(),
                    pull_image=self.options.access.pull_data,
                    progress=report,
                    stop=self.stop.is_set,
                )
            return {"files": [file.to_json() for file in found]}

        if source.files or source.folder:  # may have changed: hashed at every start
            done = work()
        else:
            done = self.book.do("fetch", _key(asdict(source)), work)
        found: list[Value] = done["files"]
        return found

    def _credentials(self) -> network.Headers | None:
        folder = self.options.data_secrets
        return fetch.load_headers(folder) if folder else None

    def _weights(self, model: base.Base) -> Path:
        self._begin("weights")
        if model.folder is not None:
            return model.folder
        with self.console.work(f"Fetching {model.name}", unit="bytes") as report:
            return base.fetch(
                model,
                cache=self.options.cache,
                token=self._token(),
                progress=report,
                stop=self.stop.is_set,
            )

    def _tokenise(self, data: list[Value], weights: Path, model: base.Base) -> Value:
        self._begin("tokenise", "Reading and tokenising the data ...")
        settings = self.spec.settings
        request = {
            "step": "tokenise",
            "files": data,
            "base": str(weights),
            "out": str(self.folder / "data" / "tokenised"),
            "settings": {name: getattr(settings, name) for name in DATA_SETTINGS},
        }
        key = _key([file["sha256"] for file in data], model.revision, request["settings"])
        if self.book.done("tokenise", key) is None:
            self._room(sum(file["size"] for file in data))
        done = self.book.do("tokenise", key, lambda: self._child("data", request) | {"key": key})
        self.console.say(
            f"  {done['rows']:,} rows, {done['tokens']:,} tokens, "
            f"{done['trained_tokens'] / done['tokens']:.0%} of them trained: "
            f"{done['shape']['name']} ({done['shape']['reason']})"
        )
        self._dim(done["notes"])
        return done

    def _dim(self, notes: list[str]) -> None:
        for note in notes:
            self.console.say(f"  {note}", style="dim")

    def _plan(
        self, rows: Value, data: list[Value], weights: Path, model: base.Base
    ) -> tuple[Plan, Value]:
        """The plan with real lengths, and the packed rows.

        The recipe is frozen the first time; a later start keeps it and only places it anew.
        """
        self._begin("plan")
        known = self._known(model, base.verify(weights))
        versions = {name: importlib.metadata.version(name) for name in RECIPE_LIBRARIES}
        here = device.detect()
        decided = plan.make(self.spec, known, here, lengths=_lengths(rows), versions=versions)
        key = _key(rows["key"], self.spec.method, asdict(self.spec.settings), versions)
        kept = self.book.done("plan", key)
        recipe = plan.recipe_from_json(kept["recipe"]) if kept else decided.recipe
        packed = self._pack(rows, plan.Packing.of(recipe))
        count = packed["train"]["rows"]
        if kept:
            decided = plan.again(decided, recipe, known, self.spec, rows=count)
        else:
            hashes = tuple(file["sha256"] for file in data)
            decided = plan.freeze(decided, self.spec, rows=count, data=hashes)
            self.book.do("plan", key, lambda: {"recipe": asdict(decided.recipe)})
        files.write_json(self.folder / "plan.json", decided.to_json())
        if not (self.folder / "adapter").exists():
            self._room(plan.disk_bytes(decided.recipe, known))
        return decided, packed

    def _pack(self, rows: Value, chosen: plan.Packing) -> Value:
        self._begin("pack")
        settings = self.spec.settings
        request = {
            "step": "pack",
            "tokenised": str(self.folder / "data" / "tokenised"),
            "out": str(self.folder / "data" / "packed"),
            "max_length": chosen.max_length,
            "packing": chosen.packing,
            "shuffle": chosen.shuffle,
            "seed": chosen.seed,
            "shuffle_seed": settings.shuffle_seed,
            "train_share": chosen.train_share,
            "batch": settings.micro_batch,
        }
        key = _key(rows["key"], request)
        done = self.book.do("pack", key, lambda: self._child("data", request))
        self._dim(done["notes"])
        return done

    def _claim(self, run_id: str) -> str | None:
        """Look at the tag again, now that the run id is known: before the GPU is used.

        Gives the digest of this very run if another machine has pushed it already.
        """
        self._begin("tag")
        destination, access = self.spec.destination, self.options.access
        return delivery.claim(destination, access, run_id=run_id, own=self._own())

    def _adopt(self, held: str) -> Value:
        """Take the adapter of this very run from the registry instead of training it again."""
        self.console.say(f"The registry holds this very run: {held}. Nothing is trained.")
        adapter = self.folder / "adapter"
        shutil.rmtree(adapter, ignore_errors=True)
        name = f"{self.spec.destination.image}".partition("@")[0] + f"@{held}"
        access = replace(self.options.access, pull_secret=self.options.access.push_secret)
        delivery.pull(name, adapter, access=access, console=self.console)
        weights = files.digest_file(adapter / "adapter_model.safetensors")
        return card.training(files.read_json(adapter / "tuning.json")) | {"adapter_sha256": weights}

    def _train(
        self, decided: Plan, packed: Value, weights: Path, model: base.Base, *, held: str | None
    ) -> Value:
        recipe = decided.recipe
        key = _key(recipe.run_id, self.options.questions)
        if held is not None and self.book.done("train", key) is None:
            self._begin("train")
            return self.book.do("train", key, lambda: self._adopt(held))
        size = f"{recipe.global_batch} x {recipe.max_length} tokens"
        self._begin("train", f"Training {recipe.steps:,} steps of {size} on {decided.device} ...")
        request = {
            "run": str(self.folder),
            "base": str(weights),
            "base_name": recipe.base_model,
            "base_revision": model.revision,
            "preset": self.spec.preset,
            "recipe": asdict(recipe),
            "placement": asdict(decided.placement),
            "train": packed["train"]["path"],
            "eval": packed["eval"]["path"] if packed["eval"] else None,
            "adapter": str(self.folder / "adapter"),
            "questions": list(self.options.questions),
            "chat_template": self.spec.settings.chat_template,
            "packed": str(self.options.cache or base.memory()),
            "save_steps": self.spec.settings.save_steps,
        }

        def work() -> Value:
            with self.console.work("Training", unit="steps") as report:
                return self._fitting(request, decided, report)

        return self.book.do("train", key, work)

    def _fitting(self, request: Value, decided: Plan, report: Report) -> Value:
        """Train; whenever memory runs out, go on from the last checkpoint with less at a time.

        Out of memory is the child's own word or the kernel's SIGKILL. The journal remembers both,
        so that a later start begins where this one had got to. The run id stays.
        """
        ways = plan.fallbacks(decided.placement)
        key = _key(decided.recipe.run_id, asdict(ways[0]), decided.device.name)
        known = sum((r["event"], r["key"]) == ("oom", key) for r in self.book.records)
        first = min(known, len(ways) - 1)
        for number, way in enumerate(ways[first:], first):
            if number:
                self.console.say(f"  out of memory before, so now {_way(way)}", style="yellow")
            placed = request | {"placement": asdict(way)}
            try:
                return self._child("train", placed, tick=self._watched(report))
            except (OutOfMemoryError, Killed) as error:
                if error.exit_code not in (OutOfMemoryError.exit_code, 128 + signal.SIGKILL):
                    raise
                self.book.append("train", "oom", key, way=_way(way), message=str(error))
        raise OutOfMemoryError.at(
            "RUN-140",
            decided.device.name,
            f"out of memory with each of: {'; '.join(map(_way, ways))}",
            "use a machine with more memory, a smaller model or method qlora, or lower max_length",
        )

    def _watched(self, report: Report) -> Callable[[], None]:
        """A tick that reports each step, and raises Hung when the child is silent for too long."""
        dog = self.options.watchdog()
        names = ("metrics.jsonl", "checkpoints", "adapter", f"log/{self.phase}.log")
        paths = [self.folder / name for name in names]

        def tick() -> None:
            self._report_step(report)
            now, progress = time.monotonic(), result.progress(self.folder)
            signs = [path.stat().st_mtime_ns for path in paths if path.exists()]
            dog.hear(signs, step=progress["step"] if progress else None, now=now)
            if (silence := dog.silence(now)) is not None:
                raise process.Hung(silence)

        return tick

    def _report_step(self, report: Report) -> None:
        now = result.progress(self.folder)
        if now is not None:
            note = f"loss {now['loss']:.3f}  {now['tokens_per_second']:,.0f} tokens/s"
            report(now["step"], now["steps"], note)

    def _package(self, decided: Plan, training: Value, packed: Value, model: base.Base) -> str:
        """The adapter folder gets its card and becomes an image; gives the image's digest."""
        self._begin("package", "Building the image ...")
        recipe = decided.recipe
        facts = card.Facts(
            preset=self.spec.preset,
            licence=model.licence,
            rows=packed["train"]["documents"],
            trained_tokens=packed["train"]["trained_tokens"],
            trainable=training["trainable"],
            total=training["total"],
            loss_by_step=list(enumerate(training["loss_by_step"], 1)),
            loss_before=training["eval_loss_before"],
            loss_after=training["eval_loss_after"],
        )

        def work() -> Value:
            folder = self.folder / "adapter"
            self._room(2 * sum(path.stat().st_size for path in folder.iterdir()))
            card.write(folder, recipe=asdict(recipe), run_id=recipe.run_id, facts=facts)
            built = image.build(
                folder,
                self.folder / "image",
                preset=self.spec.preset,
                run_id=recipe.run_id,
                annotations=card.labels(asdict(recipe), facts=facts),
            )
            return {"digest": built.digest}

        key = _key(recipe.run_id, training["adapter_sha256"])
        digest: str = self.book.do("package", key, work)["digest"]
        return digest

    def _deliver(self, decided: Plan, digest: str) -> tuple[str, ...]:
        self._begin("push")

        def work() -> Value:
            with self.console.work("Pushing", unit="bytes") as show:

                def report(done: float, total: float | None, note: str) -> None:
                    if self.stop.is_set():
                        raise InterruptedError
                    show(done, total, note)

                references = delivery.deliver(
                    self.spec.destination,
                    self.options.access,
                    layout=self.folder / "image",
                    adapter=self.folder / "adapter",
                    run_id=decided.recipe.run_id,
                    own=self._own(),
                    progress=report,
                )
            return {"references": references}

        key = _key(digest, asdict(self.spec.destination))
        done = self.book.do("push", key, lambda: self._unless_stopped(work))
        return tuple(done["references"])

    def _finish(
        self, inputs: str, decided: Plan, training: Value, digest: str, references: tuple[str, ...]
    ) -> Summary:
        self._begin("finish")
        adapter = self.folder / "adapter"
        summary = Summary(
            name=self.spec.name,
            run_id=decided.recipe.run_id,
            digest=digest,
            references=references or (f"oci:{self.folder / 'image'}",),
            adapter=str(adapter),
            adapter_bytes=(adapter / "adapter_model.safetensors").stat().st_size,
            base=self.spec.base_model or self.spec.preset,
            training=training
            | {
                f"eval_perplexity_{when}": card.perplexity(training[f"eval_loss_{when}"])
                for when in ("before", "after")
            },
        )
        files.write(self.folder / "report.html", live.report(self.folder, name=self.spec.name))
        self.book.do("finish", inputs, summary.to_json)
        return summary


def together(*checks: Callable[[], object]) -> None:
    """Run every check; raise one error with the problems of all, of the first one's kind."""
    errors: list[TuningError] = []
    for check in checks:
        try:
            check()
        except TuningError as error:
            errors.append(error)
    if errors:
        found = (problem for error in errors for problem in error.problems)
        raise type(errors[0])(dict.fromkeys(found))


def base_reference(spec: Spec) -> tuple[str, str | None]:
    """Where the base weights are: a folder, or a hub id and the revision to take."""
    return _reference(spec.base_model or spec.preset, spec.settings.revision)


def _reference(name: str, revision: str | None) -> tuple[str, str | None]:
    if Path(name).is_dir():
        return name, None
    preset = presets.find(name)
    return (preset.hub_id, revision or preset.revision) if preset else (name, revision)


def declared_name(spec: Spec) -> str:
    """What the adapter calls its base: the hub id that the spec names, also for a folder."""
    preset = presets.find(spec.preset)
    return preset.hub_id if preset else spec.preset


def options(
    spec: Spec,
    *,
    run_dir: Path | None = None,
    push_secret: Path | None = None,
    pull_secret: Path | None = None,
    hub_token_file: Path | None = None,
    secrets: Path | None = None,
    allow_hosts: tuple[str, ...] = (),
    policy_file: Path | None = None,
    ca: Path | None = None,
    insecure: bool = False,
    questions: tuple[str, ...] = (),
    port: int | None = None,
) -> Options:
    """The options of a command line: what was not named is looked for where a Job mounts it."""
    mounted = secrets or JOB_SECRETS

    def found(named: Path | None, name: str) -> Path | None:
        place = mounted / name
        return named if named is not None else place if place.is_dir() else None

    policy = fetch.Policy.load(policy_file) if policy_file else fetch.Policy()
    token = hub_token_file or found(None, "hub")
    return Options(
        run_dir=run_dir or Path("runs") / spec.name,
        access=Access(
            push_secret=found(push_secret, "push"),
            pull_secret=found(pull_secret, "pull"),
            ca=ca,
            insecure=insecure,
        ),
        policy=policy.with_hosts(allow_hosts),
        hub_token_file=token / "HF_TOKEN" if token and token.is_dir() else token,
        data_secrets=found(None, "data"),
        cache=JOB_MODELS if JOB_MODELS.is_dir() else None,
        questions=questions,
        port=port,
    )


def base_folder(name: str, *, token_file: Path | None, console: Console) -> Path:
    """The weights of a preset, hub model or folder, fetched if they are not here yet."""
    where, revision = _reference(name, None)
    token = read_token(token_file)
    found = base.resolve(where, revision=revision, token=token)
    if found.folder is not None:
        return found.folder
    with console.work(f"Fetching {found.name}", unit="bytes") as report:
        return base.fetch(found, cache=None, token=token, progress=report)


def read_token(path: Path | None) -> str | None:
    """The hub token in the file at `path`. Raises SpecError if it cannot be read."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        what = f"cannot be read ({type(error).__name__})"
        raise SpecError.at("HUB-101", str(path), what, "name a file with the token") from None


def check(spec: Spec, options: Options) -> Iterator[str]:
    """Everything that can be refused before a byte of weights moves; a line for each good thing."""
    here = plan.device_of(spec.instance) if spec.instance else device.detect()
    name, revision = base_reference(spec)
    token = read_token(options.hub_token_file)
    good: list[str] = []

    def model() -> None:
        found = base.resolve(name, revision=revision, token=token)
        config = base.check(found, token=token)
        known = plan.base_from_config(declared_name(spec), found.revision, config)
        plan.refuse_unsupported(spec, known, here)
        good.append(f"model: {name} at {found.revision[:19]}")

    def data() -> None:
        if spec.source.urls:
            secrets = options.data_secrets
            headers = fetch.load_headers(secrets) if secrets else None
            found = fetch.check(spec.source, policy=options.policy, credentials=headers)
            firsts = [(seen.shown, seen.size, seen.head) for seen in found]
        elif spec.source.image is None:
            local = fetch.fetch(spec.source, Path(), policy=options.policy)
            firsts = [(file.shown, file.size, _head(file.path)) for file in local]
        else:
            return
        together(*(partial(first_rows, *first) for first in firsts))

    def first_rows(shown: str, size: int | None, head: bytes) -> None:
        s = spec.settings
        columns = formats.Columns(s.messages_column, s.context_column, s.response_column)
        what = glance(
            head, shown, whole=size == len(head), columns=columns, extension=s.dataset_extension
        )
        bytes_ = f"{size:,} bytes" if size is not None else "size unknown"
        good.append(f"data: {shown}, {bytes_}, {what}")

    def destination() -> None:
        delivery.check(spec.destination, options.access)
        delivery.claim(spec.destination, options.access, run_id=None, own=())
        good.append(f"destination: {spec.destination.image or 'local'}")

    together(model, data, destination)
    yield from good


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD)


def _key(*parts: Any) -> str:
    """A short hash of plain values; paths count as their text."""
    return files.digest(files.canonical(_plain(parts)))[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _lengths(rows: Value) -> plan.Lengths:
    return plan.Lengths(rows["rows"], rows["tokens"], rows["lengths"]["max"])


def _stopped(phase: str) -> Stopped:
    return Stopped.at(
        "RUN-110", phase, "stopped by a signal, state saved", "run the same command again to go on"
    )


def _way(placement: plan.Placement) -> str:
    checkpointing = " with gradient checkpointing" if placement.checkpointing else ""
    return f"{placement.micro_batch} x {placement.accumulation} rows{checkpointing}"


def _hang(hung: process.Hung, phase: str, output: Path) -> TransientError:
    return TransientError.at(
        "RUN-112",
        phase,
        f"no sign of life for {hung.seconds:.0f} s, so the process was killed; where each of its "
        f"threads stood is at the end of {output}",
        "run the same command again; it goes on from the last checkpoint",
    )


def _death(died: process.ChildDied, phase: str, output: Path) -> TuningError:
    if died.status >= 0:
        what = f"internal error; the traceback is in {output}"
        return TuningError.at("RUN-198", phase, what, "report it with that file")
    number = -died.status
    name = signal.Signals(number).name
    why = " (mostly the kernel, out of memory)" if number == signal.SIGKILL else ""
    problem = Problem(
        "RUN-111",
        phase,
        f"the process was killed by {name}{why}",
        f"give it more memory, or run the same command again to go on; see {output}",
    )
    return Killed([problem], signal=number)
