"""The command line: parse, call, print; no logic.

stdout is data, stderr is talk. Rooms are imported by the command that needs them, so that `--help`,
`presets` and `plan` start at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import tuning
from tuning.errors import Stopped, TuningError, UsageError

if TYPE_CHECKING:
    from tuning.delivery import Access
    from tuning.spec import Spec

app = typer.Typer(
    name="tuning",
    help="""Fine-tune a language model from one YAML, and get the adapter as one OCI image.

    \b
    python -m tuning plan -f workspace.yaml     what would be done, and why
    python -m tuning preview -f workspace.yaml  what the data becomes, token by token
    python -m tuning run  -f workspace.yaml     do it; the same command again goes on
    python -m tuning chat --base MODEL --adapter IMAGE --compare
    python -m tuning serve --base MODEL --adapter NAME=IMAGE
    """,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

File = Annotated[
    Path, typer.Option("-f", "--file", metavar="FILE", help="Workspace YAML (kaito.sh).")
]
BaseModel = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Preset, org/model or folder instead of the file's."),
]
Data = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE|URL", help="Data instead of the file's; may be repeated."),
]
Instance = Annotated[
    str | None, typer.Option(metavar="TYPE", help="Size for this machine type, not for this one.")
]
Output = Annotated[
    str | None,
    typer.Option(metavar="WHERE", help="oci:DIR, dir:DIR or an image, instead of the file's."),
]
RunDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Run directory [default: runs/<name>].")
]
PushSecret = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="dockerconfigjson for the push [default: docker's own]."),
]
PullSecret = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="dockerconfigjson for the pull [default: docker's own]."),
]
HubToken = Annotated[
    Path | None, typer.Option(metavar="FILE", help="File with a token for gated models.")
]
Secrets = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder with push/, pull/, hub/ and data/ secrets."),
]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(metavar="HOST", help="A private host that data may come from; repeatable."),
]
PolicyFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The administrator's policy file.")
]
CaFile = Annotated[
    Path | None, typer.Option("--ca", metavar="FILE", help="CA certificates to trust (PEM).")
]
Insecure = Annotated[bool, typer.Option(help="Talk plain http to the registry.")]
KeyFile = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="Refuse an image without a signature by this key (cosign)."),
]
AnyBase = Annotated[
    bool, typer.Option("--any-base", help="Take an adapter that names another base model.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


@app.command()
def run(
    file: File,
    run_dir: RunDir = None,
    base_model: BaseModel = None,
    data: Data = None,
    instance: Instance = None,
    output: Output = None,
    push_secret: PushSecret = None,
    pull_secret: PullSecret = None,
    hub_token_file: HubToken = None,
    secrets: Secrets = None,
    allow_host: AllowHost = None,
    policy: PolicyFile = None,
    ca: CaFile = None,
    insecure: Insecure = False,
    ask: Annotated[
        list[str] | None,
        typer.Option(metavar="QUESTION", help="Ask base and tuned model at the end; repeatable."),
    ] = None,
    port: Annotated[
        int | None, typer.Option(metavar="PORT", help="Serve progress on this port meanwhile.")
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="GPUs to use, or processes on a CPU [default: all]."),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Append planned and measured memory and speed, as JSON."),
    ] = None,
    grace: Annotated[
        float, typer.Option(min=6, metavar="SECONDS", help="From SIGTERM to SIGKILL, here.")
    ] = 30.0,
    as_json: Json = False,
) -> None:
    """Tune: check, fetch, plan, train, package, push. The same command again goes on."""
    from tuning import pipeline, show
    from tuning.console import Console

    spec = _spec(file, base_model, data, instance, output, _hosts(allow_host, policy))
    options = pipeline.gather(
        spec,
        run_dir=run_dir,
        push_secret=push_secret,
        pull_secret=pull_secret,
        hub_token_file=hub_token_file,
        secrets=secrets,
        allow_hosts=tuple(allow_host or ()),
        policy_file=policy,
        ca=ca,
        insecure=insecure,
        questions=tuple(ask or ()),
        port=port,
        ranks=ranks,
        record=record,
        grace=grace,
    )
    summary = pipeline.live(spec, options, Console())
    if as_json:
        print(json.dumps(summary.to_json(), indent=2, sort_keys=True))
    else:
        print("\n".join(show.summary_lines(summary)))


@app.command()
def plan(
    file: File,
    base_model: BaseModel = None,
    data: Data = None,
    instance: Instance = None,
    output: Output = None,
    hub_token_file: HubToken = None,
    as_json: Json = False,
) -> None:
    """Show what a run would do, and why, without weights or GPU.

    A model that is not among the presets is looked up at the hub and simulated, which takes a few
    seconds and torch.
    """
    from tuning import device, show
    from tuning import plan as plans

    spec = _spec(file, base_model, data, instance, output)
    here = device.detect()
    if plans.is_enough(spec, here):
        decided = plans.draft(spec, here=here)
    else:
        from tuning import pipeline
        from tuning.console import Console

        token = pipeline.read_token(hub_token_file)
        decided = pipeline.draft(spec, here=here, token=token, console=Console())
    if as_json:
        print(json.dumps(decided.to_json(), indent=2, sort_keys=True))
        return
    print(show.plan_heading(spec, decided))
    show.display(show.plan_table(decided))
    if (memory := show.memory_table(decided)) is not None:
        show.display(memory)
    print("\n".join(f"note: {note}" for note in spec.notes), end="")


@app.command()
def check(
    file: File,
    base_model: BaseModel = None,
    data: Data = None,
    instance: Instance = None,
    output: Output = None,
    push_secret: PushSecret = None,
    pull_secret: PullSecret = None,
    hub_token_file: HubToken = None,
    allow_host: AllowHost = None,
    policy: PolicyFile = None,
    ca: CaFile = None,
    insecure: Insecure = False,
) -> None:
    """Check spec, base access, data and push rights in seconds; nothing is downloaded or left."""
    from tuning import pipeline
    from tuning.console import Console

    spec = _spec(file, base_model, data, instance, output, _hosts(allow_host, policy))
    options = pipeline.gather(
        spec,
        push_secret=push_secret,
        pull_secret=pull_secret,
        hub_token_file=hub_token_file,
        allow_hosts=tuple(allow_host or ()),
        policy_file=policy,
        ca=ca,
        insecure=insecure,
    )
    for line in pipeline.check(spec, options, Console()):
        print(line)


@app.command()
def preview(
    file: File,
    run_dir: RunDir = None,
    base_model: BaseModel = None,
    data: Data = None,
    instance: Instance = None,
    output: Output = None,
    push_secret: PushSecret = None,
    pull_secret: PullSecret = None,
    hub_token_file: HubToken = None,
    secrets: Secrets = None,
    allow_host: AllowHost = None,
    policy: PolicyFile = None,
    ca: CaFile = None,
    insecure: Insecure = False,
    rows: Annotated[int, typer.Option(min=0, max=20, help="Sample rows to show.")] = 3,
    as_json: Json = False,
) -> None:
    """Show what the data becomes: shape, lengths, what is cut, which tokens are trained.

    Fetches the data and the tokenizer, no weights; `run` in the same directory goes on from there.
    """
    from tuning import pipeline
    from tuning import preview as previews
    from tuning.console import Console

    spec = _spec(file, base_model, data, instance, output, _hosts(allow_host, policy))
    options = pipeline.gather(
        spec,
        run_dir=run_dir,
        push_secret=push_secret,
        pull_secret=pull_secret,
        hub_token_file=hub_token_file,
        secrets=secrets,
        allow_hosts=tuple(allow_host or ()),
        policy_file=policy,
        ca=ca,
        insecure=insecure,
    )
    found = previews.report(pipeline.prepare(spec, options, Console()), rows=rows)
    if as_json:
        print(json.dumps(found, indent=2, sort_keys=True))
    else:
        previews.show(found)


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(help="One preset or instance type.")] = None,
    instances: Annotated[bool, typer.Option(help="List instance types instead.")] = False,
    as_json: Json = False,
) -> None:
    """List the base models and machine types that are known by name."""
    from tuning import show

    records = show.catalogue(name, instances=instances)
    if as_json:
        print(json.dumps(records, indent=2, sort_keys=True))
    else:
        show.display(show.catalogue_table(records))


@app.command()
def pull(
    image: Annotated[str, typer.Argument(help="Image by tag or digest, or oci:DIR.")],
    folder: Annotated[Path, typer.Argument(help="New folder for the adapter.")],
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Refuse an adapter for another base model.")
    ] = None,
    key: KeyFile = None,
    pull_secret: PullSecret = None,
    policy: PolicyFile = None,
    ca: CaFile = None,
    insecure: Insecure = False,
) -> None:
    """Fetch an adapter image, verify it, and lay the PEFT folder down."""
    from tuning import delivery
    from tuning.console import Console

    access = _access(key, policy, pull_secret=pull_secret, ca=ca, insecure=insecure)
    digest = delivery.pull(image, folder, access=access, console=Console(), base=base)
    print(f"{digest} {folder}")


@app.command()
def chat(
    base: Annotated[str, typer.Option(metavar="MODEL", help="Preset, org/model or folder.")],
    adapter: Annotated[
        str | None, typer.Option(metavar="IMAGE|DIR", help="Adapter image, oci:DIR or folder.")
    ] = None,
    compare: Annotated[bool, typer.Option(help="Show the base model's answer, too.")] = False,
    question: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Ask this and leave; repeatable."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=4096)] = 256,
    any_base: AnyBase = False,
    key: KeyFile = None,
    pull_secret: PullSecret = None,
    hub_token_file: HubToken = None,
    policy: PolicyFile = None,
    ca: CaFile = None,
    insecure: Insecure = False,
) -> None:
    """Talk to a base model, with an adapter or with both side by side."""
    import warnings

    from tuning import delivery, pipeline, show
    from tuning.console import Console

    warnings.simplefilter("ignore")  # what libraries tell each other is no news to who chats
    console = Console()
    access = _access(key, policy, pull_secret=pull_secret, ca=ca, insecure=insecure)
    wanted = None if any_base else base
    with delivery.at_hand(adapter, access=access, console=console, base=wanted) as folder:
        weights = pipeline.base_folder(
            base, token_file=hub_token_file, console=console, access=access
        )
        from tuning.chat import Session  # seconds: torch

        session = Session(weights, folder, max_new_tokens=max_tokens)
    history: list[dict[str, str]] = []
    for asked in question or show.questions():
        answer, plain = session.ask(asked, history=history, compare=compare)
        print(show.answers(asked, answer, plain))
        if not question:
            history += [{"role": "user", "content": asked}]
            history += [{"role": "assistant", "content": answer}]


@app.command()
def serve(
    base: Annotated[str, typer.Option(metavar="MODEL", help="Preset, org/model or folder.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=WHERE[@STRENGTH]",
            help="Adapter image, oci:DIR or folder, with a strength from 0 to 1; repeatable.",
        ),
    ] = None,
    name: Annotated[
        str, typer.Option(metavar="NAME", help="What all adapters together are called.")
    ] = "tuned",
    base_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What the base is called [default: its own name]."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keys, one a line; then every path wants one."),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(metavar="HOW", help="auto, float32, bfloat16, float16 or 4bit."),
    ] = "auto",
    context: Annotated[
        int | None,
        typer.Option(min=16, metavar="TOKENS", help="Longest prompt with its answer."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 4096,
    concurrent: Annotated[int, typer.Option(min=1, max=256, help="Answers at once.")] = 32,
    queue: Annotated[int, typer.Option(min=0, help="Answers that may wait for room.")] = 128,
    time_limit: Annotated[float, typer.Option(min=1, help="Seconds for one request.")] = 600,
    linger: Annotated[
        float, typer.Option(min=0, help="Seconds of new requests after SIGTERM.")
    ] = 5,
    grace: Annotated[float, typer.Option(min=0, help="Seconds for what runs then.")] = 60,
    pull_secret: PullSecret = None,
    hub_token_file: HubToken = None,
    ca: CaFile = None,
    insecure: Insecure = False,
) -> None:
    """Answer over HTTP: a base model and adapters, each by its name; OpenAI's API and a page."""
    import warnings

    from tuning import delivery, pipeline
    from tuning.console import Console
    from tuning.serve import listening
    from tuning.serve import options as wanted

    console = Console()
    options = wanted.options(
        base,
        adapters=adapter or (),
        weights=lambda: pipeline.base_folder(base, token_file=hub_token_file, console=console),
        combined=name,
        base_name=base_name,
        host=host,
        port=port,
        key_file=api_key_file,
        precision=precision,
        context=context,
        requests=concurrent,
        limits=wanted.Limits(tokens=max_tokens, seconds=time_limit, waiting=queue),
        linger=linger,
        grace=grace,
        access=delivery.Access(pull_secret=pull_secret, ca=ca, insecure=insecure),
    )
    with listening.socket_for(options) as listener:
        shown = f"http://{host}:{listener.getsockname()[1]}"
        console.say(f"Listening on {shown}" + ("" if options.keys else ", without a key"))
        from tuning.serve import server  # torch, now that nothing simple is wrong

        warnings.simplefilter("ignore")  # what libraries tell each other is no news
        server.run(options, listener, console)


@app.command()
def version(
    verbose: Annotated[bool, typer.Option(help="Libraries and devices, for bug reports.")] = False,
) -> None:
    """Print the version."""
    from tuning import show

    print(tuning.__version__)
    if verbose:
        print("\n".join(show.environment()))


@app.command()
def inspect(
    image: Annotated[str, typer.Argument(help="Image by tag or digest, oci:DIR, or a folder.")],
    key: KeyFile = None,
    pull_secret: PullSecret = None,
    policy: PolicyFile = None,
    ca: CaFile = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Show what an adapter is: base, rank, run, size, signatures. Fetches no weights."""
    from tuning import inspection, show

    access = _access(key, policy, pull_secret=pull_secret, ca=ca, insecure=insecure)
    found = inspection.inspect(image, access=access).to_json()
    if as_json:
        print(json.dumps(found, indent=2, sort_keys=True))
    else:
        show.display(show.inspection_table(found))


@app.command()
def merge(
    base: Annotated[str, typer.Option(metavar="MODEL", help="Preset, org/model, image or folder.")],
    adapter: Annotated[
        str, typer.Option(metavar="IMAGE|DIR", help="Adapter image, oci:DIR or folder.")
    ],
    output: Annotated[str, typer.Option(metavar="WHERE", help="dir:DIR, oci:DIR or an image.")],
    method: Annotated[
        str | None,
        typer.Option(metavar="METHOD", help="lora or qlora, if the adapter does not say."),
    ] = None,
    any_base: AnyBase = False,
    key: KeyFile = None,
    push_secret: PushSecret = None,
    pull_secret: PullSecret = None,
    hub_token_file: HubToken = None,
    policy: PolicyFile = None,
    ca: CaFile = None,
    insecure: Insecure = False,
) -> None:
    """Put base and adapter together into one full model: a folder, or a model image."""
    import warnings

    from tuning import whole
    from tuning.console import Console

    warnings.simplefilter("ignore")  # what libraries tell each other is no news to who merges
    access = _access(
        key, policy, push_secret=push_secret, pull_secret=pull_secret, ca=ca, insecure=insecure
    )
    done = whole.merged(
        base,
        adapter,
        output,
        method=method,
        any_base=any_base,
        token_file=hub_token_file,
        access=access,
        console=Console(),
    )
    print(done)


@app.command()
def package_model(
    model: Annotated[str, typer.Argument(help="Preset, org/model or folder.")],
    output: Annotated[str, typer.Argument(metavar="WHERE", help="oci:DIR or an image.")],
    revision: Annotated[
        str | None, typer.Option(metavar="COMMIT", help="Revision on the hub [default: pinned].")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what the tag holds.")] = False,
    push_secret: PushSecret = None,
    hub_token_file: HubToken = None,
    policy: PolicyFile = None,
    ca: CaFile = None,
    insecure: Insecure = False,
) -> None:
    """Store a base model as an OCI image, for `--base-model oci://IMAGE` and image volumes."""
    from tuning import whole
    from tuning.console import Console

    access = _access(None, policy, push_secret=push_secret, ca=ca, insecure=insecure)
    done = whole.packaged(
        model,
        output,
        revision=revision,
        overwrite=overwrite,
        token_file=hub_token_file,
        access=access,
        console=Console(),
    )
    print(done)


def _access(key: list[Path] | None, policy: Path | None, **more: Any) -> Access:
    """How registries are reached; a --key is a rule that wants a signature by it."""
    from dataclasses import replace

    from tuning.delivery import Access
    from tuning.trust import Trust

    trust = Trust.load(policy) if policy else Trust()
    if key:
        trust = replace(trust, signatures="require", keys=tuple(key))
    return Access(trust=trust, **more)


def _spec(
    file: Path,
    base_model: str | None,
    data: list[str] | None,
    instance: str | None,
    output: str | None,
    allow_hosts: tuple[str, ...] = (),
) -> Spec:
    from tuning import spec as specs

    overrides = specs.Overrides(
        base_model=base_model,
        data=tuple(data or ()),
        instance=instance,
        output=output,
        allow_hosts=allow_hosts,
    )
    return specs.load(file, overrides=overrides)


def _hosts(allowed: list[str] | None, policy: Path | None) -> tuple[str, ...]:
    from tuning.fetch import Policy

    return (*(allowed or ()), *(Policy.load(policy).allow_hosts if policy else ()))


def main() -> int:
    """Run the command line and return its exit code (docs/errors.md)."""
    try:
        app(standalone_mode=False)
    except TuningError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except typer.Exit as leave:
        return leave.exit_code
    except typer.TyperException as error:
        usage = UsageError.at("USE-101", "", error.format_message(), "see --help")
        print(usage, file=sys.stderr)
        return usage.exit_code
    except ModuleNotFoundError as error:
        if (error.name or "tuning").partition(".")[0] == "tuning":
            raise
        what = f"this needs {error.name}, which is not installed"
        missing = UsageError.at("USE-102", "", what, "pip install 'tuning[train]', or make install")
        print(missing, file=sys.stderr)
        return missing.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return Stopped.exit_code
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        return 0
    return 0
