"""Tables and summaries: the plan, the presets, the end of a run, an adapter."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich.box
import rich.console
import rich.table
import rich.text

from tuning import presets
from tuning.console import duration, size
from tuning.errors import SpecError, printable
from tuning.plan import device

if TYPE_CHECKING:
    from tuning.pipeline import Summary
    from tuning.plan import Plan
    from tuning.spec import Spec


def plan_heading(spec: Spec, plan: Plan) -> str:
    """The title of a plan: Workspace, base model, device, run id."""
    state = "draft, before the data is read" if plan.rows is None else plan.recipe.run_id[:12]
    return f"{spec.name}: {plan.recipe.base_model} on {plan.device} ({state})"


def catalogue(name: str | None, *, instances: bool) -> list[dict[str, Any]]:
    """Presets (or instance types) as records; of one name, if given.

    Raises SpecError for a name that is neither.
    """
    if name is not None:
        if instances or name.lower() in {m.name.lower() for m in presets.instances()}:
            return [_instance(presets.instance(name))]
        preset = presets.find(name)
        if preset is None:
            raise SpecError.at(
                "SPEC-302",
                "",
                f'"{name}" is not among the presets',
                "see `python -m tuning presets`",
            )
        return [_preset(preset)]
    if instances:
        return [_instance(machine) for machine in presets.instances()]
    return [_preset(preset) for preset in presets.all()]


def _preset(preset: presets.Preset) -> dict[str, Any]:
    methods = [m for m in ("lora", "qlora") if presets.support(preset, m).supported]
    return {
        "name": preset.name,
        "family": preset.family,
        "hub": preset.hub_id,
        "billion": round(preset.facts.parameters / 1e9, 2),
        "active_billion": round(preset.facts.active / 1e9, 2),
        "weights_gib": round(preset.facts.weight_bytes / 2**30, 2),
        "context": preset.facts.context,
        "licence": preset.licence,
        "gated": preset.gated,
        "methods": methods,
        "note": "" if methods else presets.support(preset, "lora").reason,
    }


def _instance(machine: presets.Instance) -> dict[str, Any]:
    support = presets.gpu_support(machine.gpu, "qlora")
    return {
        "name": machine.name,
        "cloud": machine.cloud,
        "gpu": machine.gpu.name,
        "gpus": machine.gpus,
        "gib_each": round(machine.memory_bytes / 2**30, 1),
        "retired": machine.retired,
        "note": support.reason,
    }


def catalogue_table(records: Sequence[dict[str, Any]]) -> rich.table.Table:
    """The records of `catalogue`, one a row; of several presets without their notes, by family."""
    families = [record.get("family") for record in records]
    listed = len(records) > 1 and families[0] is not None
    hidden = {"hub", "family", *(("note",) if listed else ())}

    def cell(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else ""
        if isinstance(value, list):
            return ", ".join(value) or "none"
        return f"{value:,}" if isinstance(value, int) else str(value)

    shown = [{k: v for k, v in record.items() if k not in hidden} for record in records]
    for record in shown:
        if record.get("active_billion") == record.get("billion", ...):
            record["active_billion"] = ""  # a dense model
    headings = [name.replace("_", " ") for name in shown[0]]
    result = table(headings, ([cell(value) for value in record.values()] for record in shown))
    for row, family, following in zip(result.rows, families, families[1:], strict=False):
        row.end_section = family != following
    if listed:
        result.caption = "`python -m tuning presets NAME` says why none of the methods trains it"
        result.caption_justify = "left"
    return result


def print_json(value: Any) -> None:
    """Print `value` on stdout as JSON for scripts."""
    print(json.dumps(value, indent=2, sort_keys=True))


def display(shown: rich.table.Table) -> None:
    """Print a table on stdout: as wide as the terminal, 160 columns in a pipe."""
    width = None if sys.stdout.isatty() else 160
    rich.console.Console(width=width, highlight=False).print(shown)


def questions() -> Iterator[str]:
    """Lines that a person types (or pipes in), until the end of input."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line:
            yield line


def answers(question: str, tuned: str, base: str | None) -> str:
    """The answers to `question`; the base model's first, if there is one."""
    if base is None:
        return printable(tuned)
    return f"{question}\n  base:  {one_line(base)}\n  tuned: {one_line(tuned)}"


def environment() -> list[str]:
    """Versions and device, one a line, for a bug report."""
    lines = [f"python {platform.python_version()} on {platform.platform()}"]
    for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets"):
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} is not installed")
    return [*lines, f"device: {device.detect()}"]


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> rich.table.Table:
    """A plain table whose cells are never read as markup."""
    result = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(headings):
        result.add_column(heading, overflow="fold", no_wrap=index == 0)
    for row in rows:
        result.add_row(*(rich.text.Text(printable(cell)) for cell in row))
    return result


def plan_table(plan: Plan) -> rich.table.Table:
    """Each decided value with its reason."""
    recipe, placement = plan.recipe, plan.placement
    offloading = "on" if placement.activation_offloading else "off"
    values = {
        "method": recipe.method,
        "objective": recipe.objective or "sft",
        "beta": recipe.beta and f"{recipe.beta:g}",
        "precision": recipe.precision,
        "engine": plan.device.engine,
        "quant_type": (recipe.quantisation or {}).get("type"),
        "double_quant": (recipe.quantisation or {}).get("double"),
        "targets": ", ".join(recipe.targets) if recipe.targets else "all projections",
        "adaptable": plan.reasons.get("adapts"),
        "start_adapter": "set" if "start_adapter" in plan.reasons else None,
        "new_tokens": ", ".join(recipe.new_tokens) or None,
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
        "steps": recipe.steps or "known once the data is read",
        "patience": recipe.patience,
        "ranks": placement.ranks if placement.ranks > 1 else None,
        "shards": placement.text if placement.ranks > 1 else None,
        "micro_batch": placement.micro_batch,
        "checkpointing": placement.activations.text,
        "activation_offloading": offloading if "activation_offloading" in plan.reasons else None,
        "attention": placement.attention,
        "kernels": ", ".join(placement.kernels) or None,
        "unpacked_layer": "kept until its backward" if placement.unpacked_layer else None,
        "constants": "unpacked to float32" if placement.float_constants else None,
        "threads": placement.threads,
        "speed": plan.tokens_per_second and f"{plan.tokens_per_second:,.0f} tokens/s",
        "time": _time(plan),
        "cost": plan.cost,
    }
    return table(
        ("what", "value", "why"),
        [
            (name.replace("_", " "), str(value), plan.reasons.get(name, ""))
            for name, value in values.items()
            if value is not None
        ],
    )


def _time(plan: Plan) -> str | None:
    """The predicted time; for a draft, that of a million tokens."""
    gpus = plan.placement.ranks
    if plan.seconds is not None:
        hours = plan.seconds * gpus / 3600
        return f"{duration(plan.seconds)}, {hours:,.2f} GPU-hours"
    if plan.tokens_per_second is None:
        return None
    return f"{duration(1e6 / plan.tokens_per_second)} for each million tokens"


def memory_table(plan: Plan) -> rich.table.Table | None:
    """The memory estimate, largest term first; None where the plan has none."""
    if plan.fit is None:
        return None
    terms = sorted(plan.fit.memory.terms.items(), key=lambda term: -term[1])
    rows = [(name, f"{count / 2**30:.2f}") for name, count in terms if count]
    rows.append(("total", f"{plan.fit.memory.total / 2**30:.2f}"))
    rows.append(("free on the GPU", f"{plan.device.rank_bytes / 2**30:.2f}"))
    if plan.fit.host_bytes:
        rows.append(("in a machine's host memory", f"{plan.fit.host_bytes / 2**30:.2f}"))
    return table(("memory at the peak", "GiB"), rows)


def summary_lines(summary: Summary) -> list[str]:
    """The closing lines of a run."""
    t = summary.training
    share = 100 * t["trainable"] / t["total"]
    answers = t.get("answers") or []
    folder, where = summary.folder or summary.adapter, summary.references[0]
    speed = f"{t['tokens_per_second']:,.0f} tokens/s, {duration(t['seconds'])} of training"
    if predicted := summary.planned["tokens_per_second"]:
        speed += f"; planned {predicted:,.0f}"
    if calibrated := t.get("calibrated"):
        speed += f"; {calibrated['tokens_per_second']:,.0f} by the rates measured at the start"
    chat = [python(), "-m", "tuning", "chat", "--base", summary.base, "--adapter", folder]
    lines = [
        (
            "loss",
            f"{t['loss_first']:.3f} -> {t['loss_last']:.3f} in {_steps(t)}{_held_out(t)}",
        ),
        (
            "speed",
            speed if t["seconds"] else "nothing was trained: the registry had the adapter",
        ),
        *memory_line(summary),
        ("trained", f"{share:.2f} % of the weights ({t['trainable']:,} parameters)"),
        ("adapter", f"{size(summary.adapter_bytes)} in {folder}"),
        ("model", where) if where.startswith("hf://") else ("image", f"{where}@{summary.digest}"),
    ]
    if not summary.folder and where == f"oci:{Path(folder).parent / 'image'}":
        lines.append(("to push it", "the same command with -o REGISTRY/NAME:TAG"))
    if answers:
        first = answers[0]
        lines.append(("before", f"{first['question']} {one_line(first['base'])}"))
        lines.append(("after", f"{first['question']} {one_line(first['tuned'])}"))
    evaluation = summary.evaluation or {}
    lines += [("evaluated", text) for text in evaluation_lines(evaluation.get("tasks", ()))]
    if problem := evaluation.get("problem"):
        lines.append(("evaluated", f"no: {one_line(problem)}"))
    lines.append(("talk to it", shlex.join([*chat, "--compare"])))
    return [f"{name:<11} {text}" for name, text in lines]


def measured(value: dict[str, float | None] | None) -> str:
    """A value with its 95 % confidence interval, where it has one."""
    if value is None:
        return ""
    if value["low"] is None:
        return f"{value['value']:.4g}"
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def evaluation_lines(tasks: Sequence[dict[str, Any]]) -> list[str]:
    """What base and adapter reached on each task, with 95 % confidence intervals."""
    return [
        f"{task['task']}, {task['metric']}: "
        + ", ".join(f"{model} {measured(value)}" for model, value in task["models"].items())
        + (f" of {task['samples']:,}" if task["samples"] else "")
        for task in tasks
    ]


def memory_line(summary: Summary) -> list[tuple[str, str]]:
    """Measured and planned peak memory, where both are known."""
    measured, planned = summary.training["peak_memory_bytes"], summary.planned["peak_bytes"]
    if not measured or not planned:
        return []
    off = 100 * (measured - planned) / planned
    return [("memory", f"{size(measured)} at the peak; planned {size(planned)} ({off:+.1f} %)")]


def _steps(training: dict[str, Any]) -> str:
    """How many steps were trained, and why not all."""
    if not (stopped := training.get("stopped")):
        return f"{training['steps']:,} steps"
    since = f"no better since step {stopped['no_better_since']:,}"
    return f"{stopped['at']:,} of {training['steps']:,} steps ({since})"


def _held_out(training: dict[str, Any]) -> str:
    """Loss and perplexity, or accuracy, of base and adapter on the evaluation split."""
    from tuning.pipeline import model_card

    before, after = training.get("eval_loss_before"), training.get("eval_loss_after")
    if before is None or after is None:
        return ""
    kept = f", weights of step {best:,}" if (best := training.get("best_step")) else ""
    rows = f"on held-out rows {before:.3f} -> {after:.3f}"
    if rewards := model_card.rewards(training):
        return f"; {rows}, {model_card.rewards_text(rewards)}{kept}"
    perplexity = [training[f"eval_perplexity_{when}"] for when in ("before", "after")]
    return f"; {rows}, perplexity {perplexity[0]:,.2f} -> {perplexity[1]:,.2f}{kept}"


def python() -> str:
    """The path of this interpreter, as typed from the current folder."""
    here = Path(sys.executable)
    with contextlib.suppress(ValueError):
        return str(here.relative_to(Path.cwd()))
    return str(here)


def one_line(text: str, limit: int = 160) -> str:
    """`text` on one line, without control characters, cut to `limit` characters."""
    flat = printable(" ".join(text.split()))
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def inspection_table(facts: dict[str, Any]) -> rich.table.Table:
    """The facts of `inspection.Inspection.to_json`, one a line."""
    table = rich.table.Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    rows = {
        "digest": facts["digest"],
        "for": ", ".join(facts["platforms"]),
        "size": _sizes(facts),
        "base model": facts["base_model"],
        "revision": facts["base_revision"],
        "preset": facts["preset"],
        "method": facts["method"],
        "rank, alpha": f"{facts['rank']}, {facts['alpha']}" if facts["rank"] else None,
        "adapts": _listed(facts["targets"]),
        "parameters": _parameters(facts),
        "new tokens": _listed(facts["new_tokens"]),
        "goes on from": facts["start_adapter"] and f"sha256:{facts['start_adapter']}",
        "trained": f"{facts['steps']:,} steps" if facts["steps"] else None,
        "final loss": facts["final_loss"] and f"{facts['final_loss']:.4g}",
        "data": _listed([f"sha256:{digest}" for digest in facts["data"] or ()]),
        "run": facts["run_id"],
        "licence": facts["licence"],
        "attached": _listed([_attached(each) for each in facts["attached"]]),
        "said to reach": "\n".join(evaluation_lines(facts["evaluation"])),  # whoever attached it
        "signatures": _listed(facts["signatures"]),
        "problems": "\n".join(facts["problems"]),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, rich.text.Text(printable(str(value))))  # untrusted text
    return table


def _sizes(facts: dict[str, Any]) -> str:
    layers = f" in {len(facts['layers'])} layers" if facts["layers"] else ""
    return f"{size(facts['size'])}{layers}"


def _parameters(facts: dict[str, Any]) -> str | None:
    if not facts["parameters"]:
        return None
    return f"{facts['parameters']:,} ({', '.join(facts['dtypes'])})"


def _attached(each: dict[str, Any]) -> str:
    kind = each["annotations"].get("in-toto.io/predicate-type") or each["type"] or "something"
    return f"{kind} {each['digest'][:19]}"


def _listed(items: Sequence[str] | str | None) -> str:
    """Items as one line; a pattern as it is."""
    return items if isinstance(items, str) else ", ".join(items or ())
