"""The command `eval`: a base model beside its adapter on questions or lm-eval's tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuning.cli import options as option
from tuning.cli.app import app

if TYPE_CHECKING:
    import rich.table

SHOWN = 20  # questions in the table


@app.command("eval")
def evaluate(
    base: option.Base,
    tasks: Annotated[
        list[str],
        typer.Option(
            metavar="FILE|NAMES",
            help="JSONL of questions and answers, a task's YAML, or names of lm-eval; repeatable.",
        ),
    ],
    adapter: option.OptionalAdapter = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Questions of each task at most.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option("--num-fewshot", min=0, metavar="N", help="As lm-eval takes it.")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="As lm-eval takes it.")
    ] = False,
    lm_eval: Annotated[
        Path | None, typer.Option(metavar="PYTHON", help="The Python that has lm-eval.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, max=4096, help="Longest answer to a question of a file.")
    ] = 64,  # serve.evaluation.TOKENS
    precision: option.Precision = "auto",
    run_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write evaluation.json there.")
    ] = None,
    as_json: option.Json = False,
    key: option.KeyFile = None,
    pull_secret: option.PullSecret = None,
    hub_token_file: option.HubToken = None,
    policy: option.PolicyFile = None,
    ca: option.CaFile = None,
    insecure: option.Insecure = False,
) -> None:
    """Measure a base model beside its adapter, behind a server of its own."""
    from tuning import files, pipeline
    from tuning.cli import tables
    from tuning.console import Console
    from tuning.data import eval_tasks
    from tuning.errors import printable
    from tuning.oci import delivery
    from tuning.serve import evaluation

    console = Console()
    options = {"--limit": limit, "--num_fewshot": shots}
    more = [f"{name}={value}" for name, value in options.items() if value is not None]
    more += ["--apply_chat_template"] if chat_template else []
    what = eval_tasks.read(tasks, where="--tasks", limit=limit, lm_eval=lm_eval, more=more)
    access = option.access_of(key, policy, pull_secret=pull_secret, ca=ca, insecure=insecure)
    with delivery.at_hand(adapter, access=access, console=console, base=base) as folder:
        weights = pipeline.base_folder(
            base, token_file=hub_token_file, console=console, access=access
        )
        try:
            scores, asked = evaluation.measure(
                weights, folder, what, precision=precision, tokens=max_tokens, console=console
            )
        except evaluation.ServerEnded as ended:
            console.say(ended.said)
            raise typer.Exit(ended.code) from None
        record = evaluation.record(base, adapter, folder, scores, asked)
    if run_dir is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        files.write_json(run_dir / "evaluation.json", record)
    if as_json:
        tables.print_json(record)
        return
    tables.display(_table(record))
    for each in record["differences"]:
        print(printable(difference(each)))
    if asked:
        tables.display(_answers(record["asked"]))


def difference(of: dict[str, Any]) -> str:
    """Whether what one task says of base and adapter is more than chance, at 5 %."""
    larger = "is larger" if of["p"] < 0.05 else "is not larger"
    counts = f"the adapter alone is right on {of['only_tuned']:,}, the base on {of['only_base']:,}"
    return (
        f"{of['task']}: the difference {larger} than chance ({counts}; McNemar p = {of['p']:.2g})"
    )


def _table(record: dict[str, Any]) -> rich.table.Table:
    """A line a task and metric; each model's value with its 95 % confidence interval."""
    import rich.table

    from tuning.cli import tables

    table = rich.table.Table(title="in brackets: 95 % confidence interval", title_justify="left")
    for column in ("task", "metric", "samples"):
        table.add_column(column)
    models = list(dict.fromkeys(name for task in record["tasks"] for name in task["models"]))
    for model in models:
        table.add_column(model)
    for task in record["tasks"]:
        cells = [tables.measured(task["models"].get(model)) for model in models]
        table.add_row(task["task"], task["metric"], str(task["samples"] or ""), *cells)
    return table


def _answers(asked: list[dict[str, Any]]) -> rich.table.Table:
    """The first questions with the models' replies, right ones in green."""
    import rich.table
    from rich.text import Text

    from tuning.errors import printable
    from tuning.serve.evaluation import Question

    table = rich.table.Table(title=f"the first {min(SHOWN, len(asked))} of {len(asked)} questions")
    table.add_column("question")
    for model in asked[0]["replies"]:
        table.add_column(model)
    for each in (Question(**one) for one in asked[:SHOWN]):
        cells = [
            Text(printable(reply), style="green" if each.right(model) else "red")
            for model, reply in each.replies.items()
        ]
        table.add_row(Text(printable(each.question)), *cells)
    return table
