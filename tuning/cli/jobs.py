"""The commands that take a Workspace: run, plan, check, preview."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tuning.cli.app import app
from tuning.cli.options import (
    AllowHost,
    BaseModel,
    CaFile,
    Data,
    File,
    HubToken,
    Insecure,
    Instance,
    Json,
    Output,
    PolicyFile,
    PullSecret,
    PushSecret,
    RunDir,
    Secrets,
    hosts_of,
    spec_of,
)


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
    from tuning import pipeline
    from tuning.cli import tables
    from tuning.console import Console

    spec = spec_of(file, base_model, data, instance, output, hosts_of(allow_host, policy))
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
        print("\n".join(tables.summary_lines(summary)))


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
    from tuning import plan as plans
    from tuning.cli import tables
    from tuning.plan import device

    spec = spec_of(file, base_model, data, instance, output)
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
    print(tables.plan_heading(spec, decided))
    tables.display(tables.plan_table(decided))
    if (memory := tables.memory_table(decided)) is not None:
        tables.display(memory)
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

    spec = spec_of(file, base_model, data, instance, output, hosts_of(allow_host, policy))
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
    from tuning.cli import preview as previews
    from tuning.console import Console

    spec = spec_of(file, base_model, data, instance, output, hosts_of(allow_host, policy))
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
