"""The command that answers over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tuning.cli import options as option
from tuning.cli.app import app
from tuning.errors import UsageError

if TYPE_CHECKING:
    from tuning.console import Console
    from tuning.serve.options import Options


@app.command()
def serve(
    base: option.Base,
    adapter: option.ServedAdapter = None,
    name: option.CombinedName = "tuned",
    base_name: option.BaseName = None,
    base_revision: option.BaseRevision = None,
    host: option.Host = "127.0.0.1",
    any_host: option.AnyHost = False,
    port: option.Port = 8000,
    api_key_file: option.ApiKeyFile = None,
    precision: option.Precision = "auto",
    context: option.Context = None,
    max_tokens: option.LongestAnswer = 4096,
    concurrent: option.Concurrent = 32,
    queue: option.Queue = 128,
    time_limit: option.TimeLimit = 600,
    linger: option.Linger = 5,
    grace: option.DrainSeconds = 60,
    pull_secret: option.PullSecret = None,
    policy: option.PolicyFile = None,
    hub_token_file: option.HubToken = None,
    ca: option.CaFile = None,
    insecure: option.Insecure = False,
) -> None:
    """Answer over HTTP: a base model and adapters, each by its name; OpenAI's API and a page."""
    from tuning import pipeline
    from tuning.console import Console
    from tuning.network.retry import Patience
    from tuning.serve import options as serving

    _check_revision(base, base_revision)
    console = Console()
    more = {"pull_secret": pull_secret, "patience": Patience()}  # what is given up stays unserved
    access = option.access_of(None, policy, **more, ca=ca, insecure=insecure)
    options = serving.options(
        base,
        adapters=adapter or (),
        weights=lambda: pipeline.base_folder(
            base, revision=base_revision, token_file=hub_token_file, console=console, access=access
        ),
        combined=name,
        base_name=base_name,
        host=host,
        any_host=any_host,
        port=port,
        key_file=api_key_file,
        precision=precision,
        context=context,
        requests=concurrent,
        limits=serving.Limits(tokens=max_tokens, seconds=time_limit, waiting=queue),
        linger=linger,
        grace=grace,
        access=access,
    )
    _listen(options, console)


def _check_revision(base: str, revision: str | None) -> None:
    from tuning.oci import model_image

    if revision and (Path(base).is_dir() or model_image.is_image(base)):
        what = f"{base} is not on the hub, so it has no revisions"
        raise UsageError.at("SERVE-105", "--base-revision", what, "remove it")


def _listen(options: Options, console: Console) -> None:
    from tuning.serve import listening

    with listening.socket_for(options) as listener:
        address = f"http://{options.host}:{listener.getsockname()[1]}"
        console.say(f"Listening on {address}" + ("" if options.keys else ", without a key"))
        from tuning.serve import server  # torch, once the options are known to be right

        option.silence_libraries()
        server.run(options, listener, console)
