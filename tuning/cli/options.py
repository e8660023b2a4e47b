"""Options that several commands have, and what they make of them.

Rooms are imported where they are needed, so that `--help`, `presets` and `plan` start at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tuning.oci.delivery import Access
    from tuning.spec import Spec

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


def access_of(key: list[Path] | None, policy: Path | None, **more: Any) -> Access:
    """How registries are reached; a --key is a rule that wants a signature by it."""
    from dataclasses import replace

    from tuning.oci.delivery import Access
    from tuning.oci.policy import Trust

    trust = Trust.load(policy) if policy else Trust()
    if key:
        trust = replace(trust, signatures="require", keys=tuple(key))
    return Access(trust=trust, **more)


def spec_of(
    file: Path,
    base_model: str | None,
    data: list[str] | None,
    instance: str | None,
    output: str | None,
    allow_hosts: tuple[str, ...] = (),
) -> Spec:
    """The spec in `file`, with what the command line says instead."""
    from tuning import spec as specs

    overrides = specs.Overrides(
        base_model=base_model,
        data=tuple(data or ()),
        instance=instance,
        output=output,
        allow_hosts=allow_hosts,
    )
    return specs.load(file, overrides=overrides)


def hosts_of(allowed: list[str] | None, policy: Path | None) -> tuple[str, ...]:
    """The private hosts that data may come from, by --allow-host and the policy file."""
    from tuning.network.policy import Policy

    return (*(allowed or ()), *(Policy.load(policy).allow_hosts if policy else ()))
