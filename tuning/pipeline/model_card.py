"""Run directory -> `tuning.json` and the model card `README.md` beside the adapter.

Both are functions of the recipe and of what training measured that depends on the recipe alone: no
clock, host, path, speed or placement, because the image's digest covers them.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuning import files

NAMES = ("tuning.json", "README.md")  # of what `write` adds to an adapter folder
BLOCKS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 60
LOAD = """\
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), "FOLDER")
"""


@dataclass(frozen=True)
class Facts:
    """What the card holds beside the recipe."""

    preset: str
    licence: str | None  # of the base model
    weights: str | None  # its identity: Base.weights
    rows: int
    trained_tokens: int
    trainable: int  # parameters
    total: int  # parameters of base and adapter
    loss_by_step: Sequence[tuple[int, float]]
    loss_before: float | None = None  # on the held-out rows, base alone
    loss_after: float | None = None
    rewards: dict[str, Any] = field(default_factory=dict)  # accuracy and margin, where compared
    best_step: int | None = None  # step of the weights, if not the last
    stopped: dict[str, int] | None = None  # by early stopping: "at", "no_better_since"
    ends: Sequence[str] = ()  # tokens that end an answer, if others than the tokenizer's one
    datasets: Sequence[dict[str, Any]] = ()  # of the hub: Pinned.origin


def write(
    adapter: Path,
    *,
    recipe: dict[str, Any],
    run_id: str,
    facts: Facts,
    lost: Callable[[str], object] | None = None,
) -> None:
    """Put `tuning.json` and `README.md` into the adapter folder.

    `lost` is told why there is no card, if it cannot be written: the adapter does not need one.
    """
    files.write_json(adapter / "tuning.json", provenance(recipe, run_id=run_id, facts=facts))
    try:
        text = card(recipe, run_id=run_id, facts=facts)
    except Exception as error:
        if lost is None:
            raise
        lost(f"no model card was written ({type(error).__name__}: {str(error)[:200]})")
    else:
        files.write(adapter / "README.md", text)


def provenance(recipe: dict[str, Any], *, run_id: str, facts: Facts) -> dict[str, Any]:
    """The content of `tuning.json`."""
    return {
        "schema": "tuning.kaito.sh/v1",
        "run_id": run_id,
        "recipe": recipe,
        "preset": facts.preset,
        "base_licence": facts.licence,
        "base_weights": facts.weights,
        "rows": facts.rows,
        "trained_tokens": facts.trained_tokens,
        "trainable_parameters": facts.trainable,
        "total_parameters": facts.total,
        "loss_by_step": [[step, loss] for step, loss in facts.loss_by_step],
        "evaluation": {
            "loss_before": facts.loss_before,
            "loss_after": facts.loss_after,
            "best_step": facts.best_step,
            "perplexity_before": None if facts.rewards else perplexity(facts.loss_before),
            "perplexity_after": None if facts.rewards else perplexity(facts.loss_after),
            **facts.rewards,
            **({"stopped": facts.stopped} if facts.stopped else {}),
        },
        **({"ends": list(facts.ends)} if facts.ends else {}),
        **({"datasets": list(facts.datasets)} if facts.datasets else {}),
    }


def training(record: dict[str, Any]) -> dict[str, Any]:
    """The training child's result for a run done elsewhere, from its `tuning.json`."""
    losses = [loss for _, loss in record["loss_by_step"]]
    return {
        "steps": record["recipe"]["steps"],
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "loss_by_step": losses,
        "eval_loss_before": record["evaluation"]["loss_before"],
        "eval_loss_after": record["evaluation"]["loss_after"],
        "best_step": record["evaluation"]["best_step"],
        **rewards(record["evaluation"]),
        "stopped": record["evaluation"].get("stopped"),
        "tokens": 0,
        "tokens_per_second": 0.0,
        "seconds": 0.0,
        "trainable": record["trainable_parameters"],
        "total": record["total_parameters"],
        "peak_memory_bytes": None,
        "answers": [],
        "ends": record.get("ends", []),
        "resumed_from": None,
    }


def card(recipe: dict[str, Any], *, run_id: str, facts: Facts) -> str:
    """The model card as Markdown with the metadata block that model hubs read."""
    base = recipe["base_model"]
    losses = [loss for _, loss in facts.loss_by_step]
    share = 100 * facts.trainable / facts.total
    rows = [
        ("base model", f"`{base}` at `{recipe['base_revision']}`"),
        ("method", f"{recipe['method']}, rank {recipe['rank']}, alpha {recipe['alpha']:g}"),
        ("trained", f"{facts.trainable:,} parameters, {share:.2f} % of the model"),
        ("data", f"{facts.rows:,} rows, {facts.trained_tokens:,} trained tokens an epoch"),
        ("steps", f"{recipe['steps']:,} of {recipe['global_batch']} x {recipe['max_length']}"),
        ("learning rate", f"{recipe['learning_rate']:g}, {recipe['schedule']}"),
        ("precision", recipe["precision"]),
        ("run", f"`{run_id}`"),
    ]
    if objective := recipe.get("objective"):
        rows[1] = ("method", f"{rows[1][1]}; {objective}, beta {recipe['beta']:g}")
    if losses:
        rows.insert(5, ("loss", f"{losses[0]:.4g} -> {losses[-1]:.4g}"))
    if facts.loss_before is not None and facts.loss_after is not None:
        held_out = f"{facts.loss_before:.4g} -> {facts.loss_after:.4g}"
        rows.insert(6, ("loss on held-out rows", held_out))
        if facts.rewards:
            rows.insert(7, ("on held-out rows", rewards_text(facts.rewards)))
        else:
            before, after = perplexity(facts.loss_before), perplexity(facts.loss_after)
            rows.insert(7, ("perplexity on held-out rows", f"{before:.4g} -> {after:.4g}"))
    if facts.stopped:
        rows.append(("stopped early", stopped_text(facts.stopped, recipe["steps"])))
    if facts.best_step is not None:
        rows.append(("weights", f"of step {facts.best_step:,}, the best on the held-out rows"))
    if tokens := recipe.get("new_tokens"):
        rows.append(("new tokens", ", ".join(f"`{token}`" for token in tokens)))
    if going_on := recipe.get("start_adapter"):
        rows.append(("goes on from the adapter", f"`sha256:{going_on}`"))
    if facts.ends:
        rows.append(("an answer ends in", ", ".join(f"`{word}`" for word in facts.ends)))
    origins = [
        f"- `{each['name']}` at `{each['revision']}`, config `{each['config']}`, "
        f"split `{'+'.join(each['splits'])}`"
        for each in facts.datasets
    ]
    parts = recipe.get("sources") or [{"data": recipe["data"]}]
    data = "\n".join([*origins, *itertools.chain.from_iterable(map(_part, parts))])
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    versions = ", ".join(f"{name} {number}" for name, number in sorted(recipe["versions"].items()))
    return f"""---
{_metadata(recipe, facts)}---

# Adapter for {base}

| | |
|---|---|
{table}

Loss by step: `{curve(losses)}`

## Use

{_use(recipe)}
{_servers(recipe)}
`tuning.json` holds the whole recipe.

## Data

{data}

## Made with

{versions}
"""


def stopped_text(stopped: dict[str, int], steps: int) -> str:
    """Where early stopping ended the training, and why."""
    since = stopped["no_better_since"]
    return f"at step {stopped['at']:,} of {steps:,}, no better since step {since:,}"


def _part(part: dict[str, Any]) -> list[str]:
    """The files of a part of a mixture, or of all data."""
    amount = "".join(f", {name} {part[name]:g}" for name in ("weight", "rows") if name in part)
    return [f"- `sha256:{digest}`{amount}" for digest in part["data"]]


def _metadata(recipe: dict[str, Any], facts: Facts) -> str:
    """The metadata of the card, as model hubs validate it; the values are JSON, which YAML reads.

    A hub refuses a base model whose name cannot be a repository's.
    """
    from huggingface_hub.utils import validate_repo_id  # takes a moment to import

    base: str | None = recipe["base_model"]
    try:
        validate_repo_id(base)
    except ValueError:
        base = None
    tags = ["lora", recipe["method"], "transformers"]
    metadata = {
        "base_model": base,
        "datasets": list(dict.fromkeys(each["name"] for each in facts.datasets)),
        "library_name": "peft",
        "license": facts.licence,
        "pipeline_tag": "text-generation",
        "tags": [*dict.fromkeys(tags), *([f"base_model:adapter:{base}"] if base else [])],
    }
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in metadata.items() if value)


def _use(recipe: dict[str, Any]) -> str:
    """How to load the adapter with PEFT."""
    if ":" in recipe["base_revision"]:
        return f"The base was a local folder, so name it:\n\n{LOAD}"
    return """\
    from peft import AutoPeftModelForCausalLM
    model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")
"""


def _servers(recipe: dict[str, Any]) -> str:
    """Which servers load the adapter."""
    if recipe.get("new_tokens"):
        return (
            "It has rows for new tokens, which this project's `serve` and PEFT (once the base has "
            "as many rows:\n`model.resize_token_embeddings(N)`, where `tokenizer.json` has N "
            "tokens) load, and vLLM does not. For\nother servers make one model of base and "
            "adapter: `python -m tuning merge`."
        )
    return "Or mount this image's `/data` folder and name it to a server that loads LoRA adapters."


def rewards(training: dict[str, Any]) -> dict[str, Any]:
    """What `training` measured of how well good answers are told from bad ones; nothing of sft."""
    return {k: v for k, v in training.items() if k.startswith("eval_reward")}


def rewards_text(rewards: dict[str, Any]) -> str:
    """Accuracy before and after, and the margin after."""
    shares = [rewards.get(f"eval_reward_accuracy_{when}") for when in ("before", "after")]
    text = "accuracy " + " -> ".join("?" if each is None else f"{each:.1%}" for each in shares)
    margin = rewards.get("eval_reward_margin_after")
    return text if margin is None else f"{text}, margin {margin:.3g}"


def perplexity(loss: float | None) -> float | None:
    """exp of the mean loss of a token; None for None."""
    return None if loss is None else math.exp(min(loss, 700.0))


def curve(values: Sequence[float]) -> str:
    """`values` as one line of block characters, averaged down to at most 60."""
    if not values:
        return ""
    width = min(CURVE_WIDTH, len(values))
    edges = [round(i * len(values) / width) for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def labels(recipe: dict[str, Any], *, facts: Facts) -> dict[str, str]:
    """The annotations and labels of the image that depend on the recipe."""
    base = recipe["base_model"]
    result = {
        "org.opencontainers.image.title": f"LoRA adapter for {base}",
        "org.opencontainers.image.description": f"{recipe['method']} adapter for {base}",
        "tuning.kaito.sh/base-model": base,
        "tuning.kaito.sh/base-revision": recipe["base_revision"],
        "tuning.kaito.sh/method": recipe["method"],
        "tuning.kaito.sh/data": ",".join(f"sha256:{digest}" for digest in recipe["data"]),
    }
    if facts.licence:
        result["org.opencontainers.image.licenses"] = facts.licence
    if facts.loss_by_step:
        result["tuning.kaito.sh/final-loss"] = f"{facts.loss_by_step[-1][1]:.6g}"
    return result
