"""Parts of the report that anybody may see: status, subject, planned and measured values."""

from __future__ import annotations

from collections.abc import Iterator

from tuning.adapter import WEIGHTS
from tuning.console import duration, size
from tuning.errors import REASONS, Stopped
from tuning.pipeline.report.markup import note, section, table, text
from tuning.pipeline.report.record import Record, Value


def heading(record: Record, *, live: bool) -> str:
    """How the run stands: state, steps, times, and why it ended."""
    state = "Running" if live else record.state
    step, times = _progress(record, live=live), record.times(until_now=live)
    lines = [f'<p class="state {state.split()[0].lower()}"><b>{state}</b> {text(step)}</p>\n']
    if times:
        spent = f"{duration(times.elapsed)} in all"
        if times.trained:
            spent += f", {duration(times.trained)} of it training"
        if times.paused >= 1:
            spent += f", {duration(times.paused)} paused ({times.starts} starts)"
        until = "" if live or times.began == times.ended else f" to {times.ended}"
        lines.append(note(f"{times.began}{until}: {spent}"))
    if (failure := record.failure) and not live:
        lines.append(_failure(failure))
    elif state == "Not finished":
        what = f"in the phase {record.journal[-1]['phase']}" if record.journal else "at its start"
        lines.append(note(f"The process ended {what} and could not say why."))
    return "".join(lines)


def _progress(record: Record, *, live: bool) -> str:
    last = record.last
    if not last:
        return "not training yet" if live else "no step done"
    words = f"step {last['step']:,} of {last.get('steps', 0):,}"
    if isinstance(last.get("no_better_since"), int):
        words += f": stopped, no better on held-out rows since step {last['no_better_since']:,}"
    if live and last.get("eta_seconds"):
        words += f", {duration(last['eta_seconds'])} to go"
    return words


def _failure(failure: Value) -> str:
    """Each problem with what to change."""
    code = failure.get("code", 0)
    reason = REASONS.get(code, "Killed")
    words = f"Ended in the phase {failure['phase']} with exit code {code} ({reason})"
    problems = []
    for line in str(failure.get("message", "")).splitlines():
        fact, _, change = line.partition(" Change: ")
        hint = f"<br><b>What to do:</b> {text(change)}" if change else ""
        problems.append(f"<li>{text(fact)}{hint}</li>")
    kind = "failure interrupted" if code == Stopped.exit_code else "failure"
    return f'<div class="{kind}"><p>{text(words)}</p><ul>{"".join(problems)}</ul></div>\n'


def tiles(record: Record) -> str:
    """The few numbers that a reader looks for first."""
    trained, last = record.value("train"), record.last
    losses = [r["loss"] for r in record.metrics if "loss" in r]
    found = {
        "loss": f"{losses[0]:.3g} → {losses[-1]:.3g}" if len(losses) > 1 else None,
        "held-out loss": _change(trained, "eval_loss", ".3g"),
        "held-out accuracy": _change(trained, "eval_reward_accuracy", ".0%"),
        "tokens trained": f"{last['tokens']:,}" if last.get("tokens") else None,
        "tokens/s": f"{last['tokens_per_second']:,.0f}" if last.get("tokens_per_second") else None,
        "learning rate": f"{last['lr']:.3g}" if last.get("lr") and not trained else None,
        "adapter": _bytes(_adapter_bytes(record)) if trained else None,
    }
    boxes = "".join(
        f"<div><span>{text(name)}</span><b>{text(value)}</b></div>"
        for name, value in found.items()
        if value
    )
    return f'<div class="tiles">{boxes}</div>\n' if boxes else ""


def _change(trained: Value, name: str, form: str) -> str | None:
    before, after = trained.get(f"{name}_before"), trained.get(f"{name}_after")
    if before is None or after is None:
        return None
    return f"{before:{form}} → {after:{form}}"


def subject(record: Record) -> str:
    """What was trained, on what, and how."""
    recipe, rows, packed = record.recipe, record.value("tokenise"), record.value("pack")
    trained = record.value("train")
    facts: dict[str, str | None] = {}
    if recipe:
        method = {"lora": "LoRA", "qlora": "QLoRA"}[recipe["method"]]
        objective = (recipe["objective"] or "sft").upper()
        beta = f" (beta {recipe['beta']:g})" if recipe["beta"] else ""
        targets = ", ".join(recipe["targets"] or ["all projections of attention and MLP"])
        facts |= {
            "base model": f"{recipe['base_model']} at {recipe['base_revision']}",
            "objective": f"{objective}{beta}",
            "method": f"{method}, rank {recipe['rank']}, alpha {recipe['alpha']:g}, on {targets}",
            "trained": f"{trained['trainable']:,} of {trained['total']:,} parameters "
            f"({trained['trainable'] / trained['total']:.2%})"
            if trained
            else None,
            "weights": trained.get("best_step")
            and f"of step {trained['best_step']:,}, the best on the held-out rows",
            "on": f"{record.plan['device']['name']}",
        }
    if rows:
        share = f" ({rows['trained_tokens'] / rows['tokens']:.0%})" if rows["tokens"] else ""
        facts["data"] = (
            f"{rows['rows']:,} rows, {rows['tokens']:,} tokens, "
            f"{rows['trained_tokens']:,}{share} of them trained"
        )
    if packed:
        held = f"{packed['eval']['documents']:,} held out" if packed["eval"] else "none held out"
        facts["split"] = f"{packed['train']['documents']:,} rows to train, {held}"
    shown = table(("", ""), ((k, v) for k, v in facts.items() if v), kind="facts")
    return section("What was trained", shown, _sources(rows, recipe))


def _sources(rows: Value, recipe: Value) -> str:
    """The files of the data; of a mixture with each part's share."""
    parts = recipe.get("sources") or []

    def share(number: int) -> str | None:
        names = [n for n in ("weight", "rows") if number < len(parts) and n in parts[number]]
        return ", ".join(f"{name} {parts[number][name]:g}" for name in names) or None

    heads = ("file", "rows", "format", *(("share",) if parts else ()))
    return table(
        heads,
        (
            (f["shown"], f"{f['rows']:,}", f["shape"], *((share(f["part"]),) if parts else ()))
            for f in rows.get("files", ())
        ),
        kind="numbers",
    )


def comparison(record: Record) -> str:
    """Planned beside measured values, with words for what is unknown."""
    if not record.plan:
        return ""
    rows = table(("", "planned", "measured", "difference"), _compared(record), kind="numbers")
    padding = "The planned speed counts padding, the measured one only the tokens of rows."
    is_planned = (record.plan.get("speed") or {}).get("tokens_per_second")
    return section("Planned and measured", rows, note(padding) if is_planned else "")


def _compared(record: Record) -> Iterator[tuple[str, ...]]:
    plan, last, trained = record.plan, record.last, record.value("train")
    memory, speed = plan.get("memory") or {}, plan.get("speed") or {}
    on_cpu = (plan.get("device") or {}).get("kind") == "cpu"
    unplanned = "not predicted on this CPU" if on_cpu else "not predicted for this model"
    unmeasured = "not measured" if trained else "not finished" if last else "not trained"
    peak = trained.get("peak_memory_bytes") or last.get("memory_bytes")
    rate = trained.get("tokens_per_second") or last.get("tokens_per_second")
    # the speed that rates give which were measured on the card before the first step
    calibrated = (trained.get("calibrated") or {}).get("tokens_per_second")
    values = (
        ("peak memory", memory.get("allocated"), peak, size, unplanned),
        ("tokens/s", speed.get("tokens_per_second"), rate, "{:,.0f}".format, unplanned),
        ("tokens/s, calibrated", calibrated, rate, "{:,.0f}".format, ""),
        ("training time", speed.get("seconds"), trained.get("seconds"), duration, unplanned),
        ("adapter", None, _adapter_bytes(record) if trained else None, size, "not predicted"),
    )
    for name, planned, measured, form, why in values:
        if not (planned or why):
            continue
        off = f"{100 * (measured - planned) / planned:+.1f} %" if planned and measured else ""
        yield (
            name,
            form(planned) if planned else why,
            form(measured) if measured else unmeasured,
            off,
        )


def _adapter_bytes(record: Record) -> int | None:
    path = record.folder / "adapter" / WEIGHTS
    return path.stat().st_size if path.is_file() else None


def _bytes(count: int | None) -> str | None:
    return None if count is None else size(count)
