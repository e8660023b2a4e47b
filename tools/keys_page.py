"""`docs/config-keys.md`: the table of configuration keys, written from `configs/keys.yaml`."""

from __future__ import annotations

from typing import Any

import yaml

from tuning.spec.keys import Key, our_annotations, sections

HEAD = """\
# Configuration keys

<!-- Written by `make docs` from configs/keys.yaml; a test compares. -->

`tuning.config` names a ConfigMap with the key `training_config.yaml`. Nothing in it is needed: what
is not set, the plan derives, and `python -m tuning plan` prints each number with its reason. The
ConfigMap stands in the same file as the Workspace, after a line `---`. The names
`lora-params-template` and `qlora-params-template` mean "all defaults" and need no ConfigMap.

Null is "not set" everywhere. The values of KAITO's templates count as not set, too, so that a
copied template does not switch off sizing, packing or checkpoints. That holds for the pair `r: 8`
and `lora_alpha: 8` as well: for an adapter of rank 8, write `r: 8` with another alpha, such as 16.

| use | meaning |
|---|---|
| honoured | sets what its name says |
| translated | has its effect under another name or in another form; the run prints a note |
| ignored | has no effect; the run prints the reason, unless the value is the usual one |
| refused | stops the run before it starts, because ignoring it would change what you get |

An unknown key or section is an error that names the nearest known one.
"""


def markdown() -> str:
    """The text of docs/config-keys.md."""
    parts = [HEAD]
    for section, rows in sections().items():
        parts.append(f"\n## {section}\n\n| key | use | type | not set, or silent | meaning |")
        parts.append("|---|---|---|---|---|")
        parts += [_row(key) for key in rows.values()]
    parts.append(
        "\n## Annotations\n\n`metadata.annotations` of the Workspace, for what concerns the"
    )
    parts.append("cluster and the push. Every other `tuning.kaito.sh/` annotation is refused.\n")
    parts.append("| annotation | values | default | meaning |\n|---|---|---|---|")
    for a in our_annotations().values():
        values = ", ".join(f"`{value}`" for value in a.values) or f"`{a.pattern}`"
        parts.append(f"| `tuning.kaito.sh/{a.name}` | {values} | `{a.default}` | {a.text} |")
    return "\n".join(parts) + "\n"


def _row(key: Key) -> str:
    silent = ", ".join(f"`{_yaml(value)}`" for value in key.unset if value is not None)
    text = key.text[:1].upper() + key.text[1:]
    if key.change:
        text += f". Change: {key.change}"
    extension = " (ours)" if key.extension else ""
    cells = [f"`{key.name}`{extension}", key.use, _type(key), silent, f"{text.rstrip('.')}."]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type(key: Key) -> str:
    if key.values:
        return ", ".join(f"`{value}`" for value in key.values)
    names = {"count": "whole number", "numbers": "whole numbers", "switch": "true, false"}
    bounds = [
        f"{sign} {bound:g}" if bound < 1e6 else f"{sign} {bound:,.0f}"
        for sign, bound in ((">", key.above), ("≥", key.min), ("<", key.below), ("≤", key.max))
        if bound is not None
    ]
    kind = names.get(key.type, key.type)
    return f"{kind} {', '.join(bounds)}".strip()


def _yaml(value: Any) -> str:
    if value == "no":
        return '"no"'
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n")
    return text.removesuffix("...").strip()
