"""The command that answers over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuning.cli.app import app
from tuning.cli.options import (
    CaFile,
    HubToken,
    Insecure,
    PolicyFile,
    PullSecret,
    access_of,
)


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
    base_revision: Annotated[
        str | None,
        typer.Option(metavar="COMMIT", help="The base's revision on the hub [default: pinned]."),
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
    policy: PolicyFile = None,
    hub_token_file: HubToken = None,
    ca: CaFile = None,
    insecure: Insecure = False,
) -> None:
    """Answer over HTTP: a base model and adapters, each by its name; OpenAI's API and a page."""
    import warnings

    from tuning import pipeline
    from tuning.console import Console
    from tuning.errors import UsageError
    from tuning.oci import model_image
    from tuning.serve import listening
    from tuning.serve import options as wanted

    if base_revision and (Path(base).is_dir() or model_image.is_image(base)):
        what = f"{base} is not on the hub, so that it has no revisions"
        raise UsageError.at("SERVE-105", "--base-revision", what, "remove it")
    console = Console()
    access = access_of(None, policy, pull_secret=pull_secret, ca=ca, insecure=insecure)
    options = wanted.options(
        base,
        adapters=adapter or (),
        weights=lambda: pipeline.base_folder(
            base,
            revision=base_revision,
            token_file=hub_token_file,
            console=console,
            access=access,
        ),
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
        access=access,
    )
    with listening.socket_for(options) as listener:
        shown = f"http://{host}:{listener.getsockname()[1]}"
        console.say(f"Listening on {shown}" + ("" if options.keys else ", without a key"))
        from tuning.serve import server  # torch, now that nothing simple is wrong

        warnings.simplefilter("ignore")  # what libraries tell each other is no news
        server.run(options, listener, console)
