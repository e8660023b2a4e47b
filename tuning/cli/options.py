"""Options of the commands, each declared once, and the spec and access that they make up.

Rooms are imported where they are needed, so that `--help`, `presets` and `plan` start at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tuning.errors import Problem
    from tuning.oci.delivery import Access
    from tuning.pipeline import Machines
    from tuning.spec import Spec

# What to tune: a model and data, or a Workspace and what replaces parts of it
Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Preset, org/model of the hub, or folder."),
]
Dataset = Annotated[
    list[str] | None,
    typer.Argument(metavar="DATA", help="Files, URLs, a folder, or ORG/NAME of the hub."),
]
File = Annotated[
    Path | None,
    typer.Option(
        "-f", "--file", metavar="FILE", help="Workspace YAML (kaito.sh), in place of them."
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Preset, org/model or folder instead of the file's."),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE|URL|ORG/NAME",
        help="Data instead of the file's, ORG/NAME a dataset of the hub; may be repeated.",
    ),
]
Instance = Annotated[
    str | None, typer.Option(metavar="TYPE", help="Size for this machine type, not for this one.")
]
Output = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--output",
        metavar="WHERE",
        help="oci:DIR, dir:DIR, hf://ORG/NAME or an image "
        "[default: the file's; without a file, the run directory's image].",
    ),
]
TuningMethod = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="METHOD",
        help="lora or qlora (4-bit base) [default: the file's; without a file, lora].",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A key of docs/config-keys.md, such as learning_rate=1e-4; repeatable.",
    ),
]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(metavar="HOST", help="A private host that data may come from; repeatable."),
]

# A run on this machine
RunDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Run directory [default: runs/<name>].")
]
EndedRun = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run directory.")]
Secrets = Annotated[
    Path | None,
    typer.Option(
        envvar="TUNING_SECRETS",
        metavar="DIR",
        help="Folder with push/, pull/, hub/ and data/ secrets.",
    ),
]
Ask = Annotated[
    list[str] | None,
    typer.Option(metavar="QUESTION", help="Ask base and tuned model at the end; repeatable."),
]
Evaluate = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE|NAMES",
        help="Measure base and adapter on it at the end, as `eval --tasks`; repeatable.",
    ),
]
ProgressPort = Annotated[
    int | None, typer.Option(metavar="PORT", help="Serve progress on this port meanwhile.")
]
Ranks = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="GPUs to use, or processes on a CPU [default: all]."),
]
Nodes = Annotated[
    int, typer.Option(min=1, metavar="N", help="Machines of this job; run this on each of them.")
]
NodeRank = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="K",
        envvar="JOB_COMPLETION_INDEX",
        help="Number of this machine among --nodes; 0 has the run directory.",
    ),
]
Meet = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Where the machines of --nodes meet, on machine 0."),
]
Record = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Append planned and measured memory and speed, as JSON."),
]
Grace = Annotated[
    float, typer.Option(min=6, metavar="SECONDS", help="From SIGTERM to SIGKILL, here.")
]
Rows = Annotated[int, typer.Option(min=0, max=20, help="Sample rows to show.")]

# Logins, and what is trusted; the environment variables hold paths, as the options do
PushSecret = Annotated[
    Path | None,
    typer.Option(
        envvar="TUNING_PUSH_SECRET",
        metavar="FILE",
        help="dockerconfigjson for the push [default: docker's own].",
    ),
]
PullSecret = Annotated[
    Path | None,
    typer.Option(
        envvar="TUNING_PULL_SECRET",
        metavar="FILE",
        help="dockerconfigjson for the pull [default: docker's own].",
    ),
]
HubToken = Annotated[
    Path | None,
    typer.Option(
        envvar="TUNING_HUB_TOKEN_FILE", metavar="FILE", help="File with a token for gated models."
    ),
]
PolicyFile = Annotated[
    Path | None,
    typer.Option(envvar="TUNING_POLICY", metavar="FILE", help="The administrator's policy file."),
]
CaFile = Annotated[
    Path | None,
    typer.Option(
        "--ca", envvar="TUNING_CA", metavar="FILE", help="CA certificates to trust (PEM)."
    ),
]
Insecure = Annotated[bool, typer.Option(help="Talk plain http to the registry.")]
KeyFile = Annotated[
    list[Path] | None,
    typer.Option(
        "--key",
        envvar="TUNING_KEY",
        metavar="FILE",
        help="Refuse an image without a signature by this key (cosign).",
    ),
]

# Models and adapters
Base = Annotated[str, typer.Option(metavar="MODEL", help="Preset, org/model, image or folder.")]
BaseRevision = Annotated[
    str | None,
    typer.Option(metavar="COMMIT", help="The base's revision on the hub [default: pinned]."),
]
BaseOfAdapter = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Refuse an adapter for another base model.")
]
AnyBase = Annotated[bool, typer.Option("--any-base", help="Take an adapter of another base model.")]
_ADAPTER = typer.Option(metavar="IMAGE|DIR", help="Adapter image, oci:DIR or folder.")
Adapter = Annotated[str, _ADAPTER]
OptionalAdapter = Annotated[str | None, _ADAPTER]
Question = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="Ask this and leave; repeatable.")
]
Method = Annotated[
    str | None,
    typer.Option(metavar="METHOD", help="lora or qlora, if the adapter does not say."),
]

Revision = Annotated[
    str | None, typer.Option(metavar="COMMIT", help="Revision on the hub [default: pinned].")
]

# A server
ServedAdapter = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=WHERE[@STRENGTH]",
        help="Adapter image, oci:DIR or folder, with a strength from 0 to 1; repeatable.",
    ),
]
CombinedName = Annotated[
    str, typer.Option(metavar="NAME", help="What all adapters together are called.")
]
BaseName = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="What the base is called [default: its own name]."),
]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
AnyHost = Annotated[
    bool,
    typer.Option("--any-host", help="Without a key, answer to any name (behind a login)."),
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        envvar="TUNING_API_KEY_FILE",
        metavar="FILE",
        help="Keys, one a line; then every path wants one.",
    ),
]
Precision = Annotated[
    str, typer.Option(metavar="HOW", help="auto, float32, bfloat16, float16 or 4bit.")
]
Context = Annotated[
    int | None, typer.Option(min=16, metavar="TOKENS", help="Longest prompt with its answer.")
]
LongestAnswer = Annotated[int, typer.Option(min=1, help="Longest answer.")]
Concurrent = Annotated[int, typer.Option(min=1, max=256, help="Answers at once.")]
Queue = Annotated[int, typer.Option(min=0, help="Answers that may wait for room.")]
TimeLimit = Annotated[float, typer.Option(min=1, help="Seconds for one request.")]
Linger = Annotated[float, typer.Option(min=0, help="Seconds of new requests after SIGTERM.")]
DrainSeconds = Annotated[float, typer.Option(min=0, help="Seconds for what runs then.")]

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def silence_libraries() -> None:
    """Drop Python warnings: those of libraries tell the user of a command nothing."""
    import warnings

    warnings.simplefilter("ignore")


def access_of(key: list[Path] | None, policy: Path | None, **more: Any) -> Access:
    """How registries are reached and trusted; each --key is a required signature.

    A user waits: a registry that does not answer is given up after a minute, unless `patience`
    says otherwise.
    """
    from tuning.oci.delivery import BRIEF, Access
    from tuning.oci.policy import Trust

    return Access(trust=Trust.of(policy, key or ()), **{"patience": BRIEF} | more)


def spec_of(
    model: str | None,
    dataset: list[str] | None,
    file: Path | None,
    base_model: str | None,
    data: list[str] | None,
    instance: str | None,
    output: str | None,
    method: str | None,
    assigned: list[str] | None,
    *,
    allow_host: list[str] | None = None,
    policy: Path | None = None,
    needs_data: bool = True,
) -> Spec:
    """The spec of MODEL and DATA, or in `file` with what the command line replaces.

    The policy file may allow hosts too. Raises UsageError for neither or both, SpecError.
    """
    from tuning import spec as specs
    from tuning.cli import words
    from tuning.errors import SpecError

    _check_named(model, dataset, file, base_model, data, needs_data=needs_data)
    allowed = tuple(allow_host or ())
    if policy:
        from tuning.network.policy import Policy

        allowed += tuple(Policy.load(policy).allow_hosts)
    overrides = specs.Overrides(
        base_model=base_model,
        data=tuple(data or ()),
        instance=instance,
        output=output,
        allow_hosts=allowed,
        method=method,
        set=tuple(assigned or ()),
    )
    words.remember(overrides, has_file=file is not None)
    problems = _unknown_instance(instance)
    try:
        if file is not None:
            spec = specs.load(file, overrides=overrides)
        else:
            spec = specs.from_command_line(
                str(model), tuple(dataset or ()), overrides=overrides, needs_data=needs_data
            )
    except SpecError as error:
        raise SpecError([*problems, *error.problems]) from None
    if problems:
        raise SpecError(problems)
    return spec


def _unknown_instance(instance: str | None) -> tuple[Problem, ...]:
    """The problem of --instance, told with those of the spec and not once they are mended."""
    from tuning import presets
    from tuning.errors import SpecError

    try:
        if instance:
            presets.instance(instance)
    except SpecError as error:
        return error.problems
    return ()


def _check_named(
    model: str | None,
    dataset: list[str] | None,
    file: Path | None,
    base_model: str | None,
    data: list[str] | None,
    *,
    needs_data: bool,
) -> None:
    """Raise UsageError unless either a file, or a model and data, are named."""
    from tuning.errors import UsageError

    if model is not None and file is not None:
        change = "leave out -f, or give --base-model and --data in place of MODEL and DATA"
        raise UsageError.at("USE-105", model, "MODEL stands beside -f FILE", change)
    if file is not None:
        return
    if model is None:
        what = "there is neither MODEL and DATA nor -f FILE"
        raise UsageError.at("USE-105", "", what, "see --help; `tuning init` writes a FILE")
    if base_model or data:
        flag = "--base-model" if base_model else "--data"
        change = "give it in place of MODEL or DATA"
        raise UsageError.at(
            "USE-105", flag, "replaces a part of -f FILE, and there is none", change
        )
    if needs_data and not dataset:
        what = "there is a MODEL, but no DATA"
        change = f"add a file, a URL, a folder or ORG/NAME of the hub after {model}"
        raise UsageError.at("USE-105", "DATA", what, change)


def machines(nodes: int, node: int, meet: str | None) -> Machines:
    """This machine among `nodes`. Raises UsageError."""
    from tuning.errors import UsageError
    from tuning.pipeline import Machines

    if nodes == 1:
        return Machines()
    host, _, port = (meet or "").rpartition(":")
    if not (host and port.isdigit() and 0 < int(port) < 1 << 16):
        what = f"--nodes {nodes} needs the place where they meet"
        change = f"name machine 0 and a free port there, as in --meet {host or 'HOST'}:29400"
        raise UsageError.at("USE-104", "--meet", what, change)
    if node >= nodes:
        what = f"is {node}, but --nodes {nodes} are numbered from 0 to {nodes - 1}"
        raise UsageError.at("USE-104", "--node-rank", what, "give each machine its own number")
    return Machines(nodes, node, str(meet))
