"""The commands that take adapters and models: pull, inspect, chat, merge, export, package-model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuning.cli import options as option
from tuning.cli.app import app
from tuning.errors import UsageError


@app.command()
def pull(
    image: Annotated[str, typer.Argument(help="Image by tag or digest, or oci:DIR.")],
    folder: Annotated[Path, typer.Argument(help="New folder for the adapter.")],
    base: option.BaseOfAdapter = None,
    key: option.KeyFile = None,
    pull_secret: option.PullSecret = None,
    policy: option.PolicyFile = None,
    ca: option.CaFile = None,
    insecure: option.Insecure = False,
    as_json: option.Json = False,
) -> None:
    """Fetch an adapter image, verify it, and write its PEFT folder."""
    from tuning import adapter
    from tuning.cli import tables
    from tuning.console import Console
    from tuning.oci import delivery

    access = option.access_of(key, policy, pull_secret=pull_secret, ca=ca, insecure=insecure)
    console = Console()
    digest = delivery.pull(image, folder, access=access, console=console, base=base)
    if adapter.has_local_base(folder):
        base_model = 'AutoModelForCausalLM.from_pretrained("BASE_FOLDER")'
        console.say("Its base was a local folder, which the image does not name. To load it:")
        console.say(f'  PeftModel.from_pretrained({base_model}, "{folder}")')
    if as_json:
        tables.print_json({"digest": digest, "folder": str(folder)})
    else:
        print(f"{digest} {folder}")


@app.command()
def inspect(
    image: Annotated[str, typer.Argument(help="Image by tag or digest, oci:DIR, or a folder.")],
    key: option.KeyFile = None,
    pull_secret: option.PullSecret = None,
    policy: option.PolicyFile = None,
    ca: option.CaFile = None,
    insecure: option.Insecure = False,
    as_json: option.Json = False,
) -> None:
    """Show what an adapter is: base, rank, run, size, signatures. Fetches no weights."""
    from tuning.cli import tables
    from tuning.oci import inspection

    access = option.access_of(key, policy, pull_secret=pull_secret, ca=ca, insecure=insecure)
    facts = inspection.inspect(image, access=access).to_json()
    if as_json:
        tables.print_json(facts)
    else:
        tables.display(tables.inspection_table(facts))


@app.command()
def chat(
    base: option.Base,
    adapter: option.OptionalAdapter = None,
    compare: Annotated[bool, typer.Option(help="Show the base model's answer, too.")] = False,
    question: option.Question = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=4096)] = 256,
    any_base: option.AnyBase = False,
    key: option.KeyFile = None,
    pull_secret: option.PullSecret = None,
    hub_token_file: option.HubToken = None,
    policy: option.PolicyFile = None,
    ca: option.CaFile = None,
    insecure: option.Insecure = False,
) -> None:
    """Talk to a base model, with an adapter or with both side by side."""
    from tuning import pipeline
    from tuning.cli import tables
    from tuning.console import Console
    from tuning.oci import delivery

    option.silence_libraries()
    console = Console()
    access = option.access_of(key, policy, pull_secret=pull_secret, ca=ca, insecure=insecure)
    expected = None if any_base else base
    with delivery.at_hand(adapter, access=access, console=console, base=expected) as folder:
        weights = pipeline.base_folder(
            base, token_file=hub_token_file, console=console, access=access
        )
        from tuning.models.generate import Session  # seconds: torch

        session = Session(weights, folder, max_new_tokens=max_tokens, any_base=any_base)
    history: list[dict[str, str]] = []
    for prompt in question or tables.questions():
        answer, base_answer = session.ask(prompt, history=history, compare=compare)
        print(tables.answers(prompt, answer, base_answer))
        if not question:
            history += [{"role": "user", "content": prompt}]
            history += [{"role": "assistant", "content": answer}]


@app.command()
def merge(
    base: option.Base,
    adapter: option.Adapter,
    output: Annotated[str, typer.Option(metavar="WHERE", help="dir:DIR, oci:DIR or an image.")],
    method: option.Method = None,
    any_base: option.AnyBase = False,
    key: option.KeyFile = None,
    push_secret: option.PushSecret = None,
    pull_secret: option.PullSecret = None,
    hub_token_file: option.HubToken = None,
    policy: option.PolicyFile = None,
    ca: option.CaFile = None,
    insecure: option.Insecure = False,
    as_json: option.Json = False,
) -> None:
    """Put base and adapter together into one full model: a folder, or a model image."""
    from tuning.console import Console
    from tuning.network.retry import Patience
    from tuning.pipeline import whole_models

    option.silence_libraries()
    more = {"push_secret": push_secret, "pull_secret": pull_secret, "patience": Patience()}
    access = option.access_of(key, policy, **more, ca=ca, insecure=insecure, replace="")
    reference = whole_models.merged(
        base,
        adapter,
        output,
        method=method,
        any_base=any_base,
        token_file=hub_token_file,
        access=access,
        console=Console(),
    )
    _print_reference(reference, as_json=as_json)


export = typer.Typer(help="Write an adapter for other programs.", no_args_is_help=True)
app.add_typer(export, name="export")


@export.callback()
def _several() -> None:
    """Keep the format a word of its own, though it is the only one."""


@export.command("gguf")
def export_gguf(
    base: option.Base,
    adapter: option.Adapter,
    output: Annotated[Path, typer.Option(metavar="DIR", help="New folder for the files.")],
    merged: Annotated[bool, typer.Option("--merged", help="One model instead of an adapter.")] = (
        False
    ),
    with_base: Annotated[
        bool, typer.Option("--with-base", help="Write the base beside the adapter, too.")
    ] = False,
    method: option.Method = None,
    any_base: option.AnyBase = False,
    key: option.KeyFile = None,
    pull_secret: option.PullSecret = None,
    hub_token_file: option.HubToken = None,
    policy: option.PolicyFile = None,
    ca: option.CaFile = None,
    insecure: option.Insecure = False,
) -> None:
    """Write an adapter or merged model as GGUF."""
    from tuning.console import Console
    from tuning.pipeline import whole_models

    if merged and with_base:
        what, change = "does not go with --merged, which holds the base", "leave one of both out"
        raise UsageError.at("USE-110", "--with-base", what, change)
    option.silence_libraries()
    access = option.access_of(key, policy, pull_secret=pull_secret, ca=ca, insecure=insecure)
    for path in whole_models.exported(
        base,
        adapter,
        output,
        merged=merged,
        with_base=with_base,
        method=method,
        any_base=any_base,
        token_file=hub_token_file,
        access=access,
        console=Console(),
    ):
        print(path)


@app.command()
def package_model(
    model: Annotated[str, typer.Argument(help="Preset, org/model or folder.")],
    output: Annotated[str, typer.Argument(metavar="WHERE", help="oci:DIR or an image.")],
    revision: option.Revision = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what the tag holds.")] = False,
    push_secret: option.PushSecret = None,
    hub_token_file: option.HubToken = None,
    policy: option.PolicyFile = None,
    ca: option.CaFile = None,
    insecure: option.Insecure = False,
    as_json: option.Json = False,
) -> None:
    """Store a base model as an OCI image, for `--base-model oci://IMAGE` and image volumes."""
    from tuning.console import Console
    from tuning.network.retry import Patience
    from tuning.pipeline import whole_models

    more = {"push_secret": push_secret, "replace": "add --overwrite", "patience": Patience()}
    access = option.access_of(None, policy, **more, ca=ca, insecure=insecure)
    reference = whole_models.packaged(
        model,
        output,
        revision=revision,
        overwrite=overwrite,
        token_file=hub_token_file,
        access=access,
        console=Console(),
    )
    _print_reference(reference, as_json=as_json)


def _print_reference(reference: str, *, as_json: bool) -> None:
    from tuning.cli import tables

    if as_json:
        tables.print_json({"reference": reference})
    else:
        print(reference)
