"""Tables and summaries for people: the plan, the presets, the end of a run."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import rich.box
import rich.table

from tuning.console import duration, size

if TYPE_CHECKING:
    from tuning.pipeline import Summary
    from tuning.plan import Plan


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> rich.table.Table:
    """A plain table whose text is never taken for markup."""
    drawn = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        drawn.add_column(heading, overflow="fold")
    for row in rows:
        drawn.add_row(*(rich.text.Text(cell) for cell in row))
    return drawn


def plan_table(plan: Plan) -> rich.table.Table:
    """Each decided value with its reason."""
    recipe, placement = plan.recipe, plan.placement
    values = {
        "method": recipe.method,
        "precision": recipe.precision,
        "quant_type": (recipe.quantisation or {}).get("type"),
        "double_quant": (recipe.quantisation or {}).get("double"),
        "targets": ", ".join(recipe.targets) if recipe.targets else "all projections",
        "rank": recipe.rank,
        "alpha": f"{recipe.alpha:g}",
        "dropout": f"{recipe.dropout:g}",
        "learning_rate": f"{recipe.learning_rate:g}",
        "schedule": recipe.schedule,
        "warmup_steps": recipe.warmup_steps if plan.rows is not None else None,
        "optimizer": recipe.optimizer,
        "weight_decay": f"{recipe.weight_decay:g}",
        "max_grad_norm": f"{recipe.max_grad_norm:g}",
        "max_length": recipe.max_length,
        "packing": "yes" if recipe.packing else "no",
        "train_on": recipe.train_on,
        "global_batch": recipe.global_batch,
        "epochs": f"{recipe.epochs:g}",
        "steps": recipe.steps if plan.rows is not None else "known once the data is read",
        "micro_batch": placement.micro_batch,
        "checkpointing": "on" if placement.checkpointing else "off",
        "attention": placement.attention,
    }
    return table(
        ("what", "value", "why"),
        [
            (name.replace("_", " "), str(value), plan.reasons.get(name, ""))
            for name, value in values.items()
            if value is not None
        ],
    )


def summary_lines(summary: Summary) -> list[str]:
    """The eight closing lines of a run."""
    t = summary.training
    share = 100 * t["trainable"] / t["total"]
    answers = t.get("answers") or []
    folder = str(summary.adapter)
    talk = ["python", "-m", "tuning", "chat", "--base", summary.base, "--adapter", folder]
    lines = [
        ("loss", f"{t['loss_first']:.3f} -> {t['loss_last']:.3f} in {t['steps']:,} steps"),
        ("speed", f"{t['tokens_per_second']:,.0f} tokens/s, {duration(t['seconds'])} of training"),
        ("trained", f"{share:.2f} % of the weights ({t['trainable']:,} parameters)"),
        ("adapter", f"{size(summary.adapter_bytes)} in {folder}"),
        ("image", f"{summary.references[0]}@{summary.digest}"),
    ]
    if answers:
        first = answers[0]
        lines.append(("before", f"{first['question']} {one_line(first['base'])}"))
        lines.append(("after", f"{first['question']} {one_line(first['tuned'])}"))
    lines.append(("talk to it", shlex.join([*talk, "--compare"])))
    return [f"{name:<11} {text}" for name, text in lines]


def one_line(text: str, limit: int = 160) -> str:
    """`text` on one line, cut where it is long."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"
