"""The commands that take a Workspace: run, plan, check, preview; and report, of a run."""

from __future__ import annotations

from dataclasses import replace

from tuning.cli import options as option
from tuning.cli.app import app


@app.command()
def run(
    model: option.Model = None,
    dataset: option.Dataset = None,
    file: option.File = None,
    run_dir: option.RunDir = None,
    base_model: option.BaseModel = None,
    data: option.Data = None,
    instance: option.Instance = None,
    output: option.Output = None,
    method: option.TuningMethod = None,
    assigned: option.Set = None,
    push_secret: option.PushSecret = None,
    pull_secret: option.PullSecret = None,
    hub_token_file: option.HubToken = None,
    secrets: option.Secrets = None,
    allow_host: option.AllowHost = None,
    policy: option.PolicyFile = None,
    ca: option.CaFile = None,
    insecure: option.Insecure = False,
    ask: option.Ask = None,
    evaluate: option.Evaluate = None,
    port: option.ProgressPort = None,
    host: option.Host = "127.0.0.1",
    ranks: option.Ranks = None,
    nodes: option.Nodes = 1,
    node_rank: option.NodeRank = 0,
    meet: option.Meet = None,
    record: option.Record = None,
    grace: option.Grace = 30.0,
    as_json: option.Json = False,
) -> None:
    """Tune MODEL on DATA, or as FILE says: check, fetch, plan, train, package, push.

    The same command again goes on where it stopped.

    \b
    tuning run Qwen/Qwen3-0.6B rows.jsonl -o oci:my-adapter
    tuning run -f workspace.yaml --set learning_rate=1e-4
    """
    from tuning import pipeline
    from tuning.cli import tables
    from tuning.console import Console

    spec = option.spec_of(
        model,
        dataset,
        file,
        base_model,
        data,
        instance,
        output,
        method,
        assigned,
        allow_host=allow_host,
        policy=policy,
    )
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
    options = replace(
        options,
        questions=tuple(ask or ()),
        evaluate=tuple(evaluate or ()),
        port=port,
        host=host,
        ranks=ranks,
        machines=option.machines(nodes, node_rank, meet),
        record=record,
        grace=grace,
    )
    if options.machines.node:
        pipeline.follow(spec, options, Console())
        return
    summary = pipeline.execute(spec, options, Console())
    if as_json:
        tables.print_json(summary.to_json())
    else:
        print("\n".join(tables.summary_lines(summary)))


@app.command()
def plan(
    model: option.Model = None,
    dataset: option.Dataset = None,
    file: option.File = None,
    base_model: option.BaseModel = None,
    data: option.Data = None,
    instance: option.Instance = None,
    output: option.Output = None,
    method: option.TuningMethod = None,
    assigned: option.Set = None,
    pull_secret: option.PullSecret = None,
    hub_token_file: option.HubToken = None,
    policy: option.PolicyFile = None,
    ca: option.CaFile = None,
    insecure: option.Insecure = False,
    as_json: option.Json = False,
) -> None:
    """Show what a run would do, and why, without weights or GPU.

    A model that is not among the presets is looked up at the hub and simulated, which takes a few
    seconds and torch.
    """
    from tuning import api
    from tuning.cli import tables

    spec = option.spec_of(
        model,
        dataset,
        file,
        base_model,
        data,
        instance,
        output,
        method,
        assigned,
        needs_data=False,
    )
    logins = api.Logins(
        pull_secret=pull_secret,
        hub_token_file=hub_token_file,
        policy_file=policy,
        ca=ca,
        insecure=insecure,
    )
    decided = api.plan(spec, logins=logins)
    if as_json:
        tables.print_json(decided.to_json())
        return
    print(tables.plan_heading(spec, decided))
    tables.display(tables.plan_table(decided))
    if (memory := tables.memory_table(decided)) is not None:
        tables.display(memory)
    print("\n".join(f"note: {note}" for note in spec.notes), end="")


@app.command()
def check(
    model: option.Model = None,
    dataset: option.Dataset = None,
    file: option.File = None,
    base_model: option.BaseModel = None,
    data: option.Data = None,
    instance: option.Instance = None,
    output: option.Output = None,
    method: option.TuningMethod = None,
    assigned: option.Set = None,
    push_secret: option.PushSecret = None,
    pull_secret: option.PullSecret = None,
    hub_token_file: option.HubToken = None,
    allow_host: option.AllowHost = None,
    policy: option.PolicyFile = None,
    ca: option.CaFile = None,
    insecure: option.Insecure = False,
    as_json: option.Json = False,
) -> None:
    """Check spec, base access, data and push rights in seconds; nothing is downloaded or left."""
    from tuning import api
    from tuning.cli import tables

    spec = option.spec_of(
        model,
        dataset,
        file,
        base_model,
        data,
        instance,
        output,
        method,
        assigned,
        allow_host=allow_host,
        policy=policy,
    )
    logins = api.Logins(
        push_secret=push_secret,
        pull_secret=pull_secret,
        hub_token_file=hub_token_file,
        allow_hosts=tuple(allow_host or ()),
        policy_file=policy,
        ca=ca,
        insecure=insecure,
    )
    passed = api.check(spec, logins=logins)
    if as_json:
        tables.print_json({"passed": passed})
    else:
        print("\n".join(passed))


@app.command()
def preview(
    model: option.Model = None,
    dataset: option.Dataset = None,
    file: option.File = None,
    run_dir: option.RunDir = None,
    base_model: option.BaseModel = None,
    data: option.Data = None,
    instance: option.Instance = None,
    output: option.Output = None,
    method: option.TuningMethod = None,
    assigned: option.Set = None,
    push_secret: option.PushSecret = None,
    pull_secret: option.PullSecret = None,
    hub_token_file: option.HubToken = None,
    secrets: option.Secrets = None,
    allow_host: option.AllowHost = None,
    policy: option.PolicyFile = None,
    ca: option.CaFile = None,
    insecure: option.Insecure = False,
    rows: option.Rows = 3,
    as_json: option.Json = False,
) -> None:
    """Show what the data becomes: shape, lengths, what is cut, which tokens are trained.

    Fetches the data and the tokenizer, no weights; `run` in the same directory goes on from there.
    """
    from tuning import api
    from tuning.cli import preview as previews
    from tuning.cli import tables

    spec = option.spec_of(
        model,
        dataset,
        file,
        base_model,
        data,
        instance,
        output,
        method,
        assigned,
        allow_host=allow_host,
        policy=policy,
    )
    logins = api.Logins(
        push_secret=push_secret,
        pull_secret=pull_secret,
        hub_token_file=hub_token_file,
        secrets=secrets,
        allow_hosts=tuple(allow_host or ()),
        policy_file=policy,
        ca=ca,
        insecure=insecure,
    )
    content = api.preview(spec, rows=rows, run_dir=run_dir, logins=logins)
    if as_json:
        tables.print_json(content)
    else:
        previews.show(content)


@app.command()
def report(run_dir: option.EndedRun) -> None:
    """Write the report.html of a run that has ended anew, say once its adapter was evaluated."""
    from tuning.pipeline import report as reports

    print(reports.rewrite(run_dir))
