"""The commands that take adapters and models: pull, inspect, chat, merge, package-model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tuning.cli.app import app
from tuning.cli.options import (
    AnyBase,
    CaFile,
    HubToken,
    Insecure,
    Json,
    KeyFile,
    PolicyFile,
    PullSecret,
    PushSecret,
    access_of,
)


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
    from tuning.console import Console
    from tuning.oci import delivery

    access = access_of(key, policy, pull_secret=pull_secret, ca=ca, insecure=insecure)
    digest = delivery.pull(image, folder, access=access, console=Console(), base=base)
    print(f"{digest} {folder}")


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
    from tuning.cli import tables
    from tuning.oci import inspection

    access = access_of(key, policy, pull_secret=pull_secret, ca=ca, insecure=insecure)
    found = inspection.inspect(image, access=access).to_json()
    if as_json:
        print(json.dumps(found, indent=2, sort_keys=True))
    else:
        tables.display(tables.inspection_table(found))


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

    from tuning import pipeline
    from tuning.cli import tables
    from tuning.console import Console
    from tuning.oci import delivery

    warnings.simplefilter("ignore")  # what libraries tell each other is no news to who chats
    console = Console()
    access = access_of(key, policy, pull_secret=pull_secret, ca=ca, insecure=insecure)
    wanted = None if any_base else base
    with delivery.at_hand(adapter, access=access, console=console, base=wanted) as folder:
        weights = pipeline.base_folder(
            base, token_file=hub_token_file, console=console, access=access
        )
        from tuning.models.generate import Session  # seconds: torch

        session = Session(weights, folder, max_new_tokens=max_tokens)
    history: list[dict[str, str]] = []
    for asked in question or tables.questions():
        answer, plain = session.ask(asked, history=history, compare=compare)
        print(tables.answers(asked, answer, plain))
        if not question:
            history += [{"role": "user", "content": asked}]
            history += [{"role": "assistant", "content": answer}]


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

    from tuning.console import Console
    from tuning.pipeline import whole_models

    warnings.simplefilter("ignore")  # what libraries tell each other is no news to who merges
    access = access_of(
        key, policy, push_secret=push_secret, pull_secret=pull_secret, ca=ca, insecure=insecure
    )
    done = whole_models.merged(
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
    from tuning.console import Console
    from tuning.pipeline import whole_models

    access = access_of(None, policy, push_secret=push_secret, ca=ca, insecure=insecure)
    done = whole_models.packaged(
        model,
        output,
        revision=revision,
        overwrite=overwrite,
        token_file=hub_token_file,
        access=access,
        console=Console(),
    )
    print(done)
