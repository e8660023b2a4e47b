"""`docs/cli.md`: every command and option, written from the commands' own help."""

from __future__ import annotations

import typer

from tuning.cli import app

HEAD = """\
# Command line

<!-- Written by `make docs` from the commands' own help; a test compares. -->

`tuning COMMAND`, or `python -m tuning COMMAND` from a checkout. Data goes to stdout, messages to
stderr; [exit codes](errors.md) are stable. With `--json` an error is an object on stdout as well:
`exit_code`, `reason` and `problems`, each with `code`, `where`, `message` and `hint`.

`run`, `plan`, `check` and `preview` take a model and data, or `-f FILE`, a Workspace YAML
(`tuning init` writes one, `tuning import` translates one). Both are the same to them: `spec.yaml`
of the run directory shows the Workspace. In a YAML that runs on this machine,
`tuning.preset.name` may be a folder, `tuning.input.urls` may hold files, a folder and `ORG/NAME`,
and `tuning.output.image` may be `oci:DIR`, `dir:DIR` or `hf://ORG/NAME`; paths are seen from the
YAML's folder. A cluster refuses them: its Jobs do not see your machine.

`--set KEY=VALUE` sets any key of [the ConfigMap](config-keys.md), by its name or as
`SECTION.NAME`, in place of what the file says.

Logins are files, and environment variables name them where the options are missing:

| variable | option | what the file is |
|---|---|---|
"""


def markdown() -> str:
    """The text of docs/cli.md."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    logins = {
        str(each.envvar): (each.opts[0], each.help)
        for command in commands.values()
        for each in command.params
        if str(getattr(each, "envvar", None) or "").startswith("TUNING_")
    }
    rows = [f"| `{name}` | `{flag}` | {text} |\n" for name, (flag, text) in sorted(logins.items())]
    return HEAD + "".join(rows) + "".join(_section(name, each) for name, each in commands.items())


def _section(name: str, command: object) -> str:
    context = typer.Context(command, info_name=f"tuning {name}", terminal_width=100)  # type: ignore[arg-type]
    lines = [line.rstrip() for line in context.get_help().splitlines()]
    return f"\n## tuning {name}\n\n```text\n" + "\n".join(lines) + "\n```\n"
