"""Requests for tiny training runs: a tiny base, its rows, a recipe and a placement."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow
import tiny_models
import transformers

from tuning.plan import Placement, Recipe

NF4 = {"type": "nf4", "double": True, "compute": "bfloat16"}


def recipe(**changes: Any) -> Recipe:
    """Eight steps of four rows with dropout, unless `changes` say otherwise."""
    values: dict[str, Any] = {
        "base_model": "local",
        "base_revision": "sha256:0",
        "data": (),
        "method": "lora",
        "precision": "bfloat16",
        "quantisation": None,
        "rank": 8,
        "alpha": 16.0,
        "dropout": 0.1,
        "targets": None,
        "exclude": (),
        "layers": None,
        "rslora": False,
        "dora": False,
        "optimizer": "adamw_torch_fused",
        "learning_rate": 5e-3,
        "schedule": "cosine",
        "warmup_steps": 1,
        "weight_decay": 0.0,
        "betas": (0.9, 0.999),
        "epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "neftune_alpha": None,
        "max_length": 256,
        "packing": False,
        "train_on": "assistant",
        "chat_template": None,
        "columns": {},
        "shuffle": True,
        "train_share": 1.0,
        "global_batch": 4,
        "epochs": 2.0,
        "steps": 8,
        "seed": 7,
        "eval_steps": None,
    }
    if changes.get("method") == "qlora":
        values["quantisation"] = NF4
    return Recipe(**values | changes)


def placement(**changes: Any) -> Placement:
    """Two rows at once, twice, on a CPU."""
    values: dict[str, Any] = {
        "device": "cpu",
        "ranks": 1,
        "micro_batch": 2,
        "accumulation": 2,
        "checkpointing": False,
        "attention": "sdpa",
        "threads": 1,
    }
    return Placement(**values | changes)


def rows(base: Path, count: int, *, packing: bool = False, seed: int = 1) -> list[dict[str, Any]]:
    """Tokenised rows for the model in `base`, three to a row when packed."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)

    def tokens(turns: list[dict[str, str]], **options: Any) -> list[int]:
        text = tokenizer.apply_chat_template(turns, tokenize=False, **options)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    found = []
    for row in tiny_models.message_rows(count, seed):
        ids = tokens(row["messages"])
        prompt = len(tokens(row["messages"][:-1], add_generation_prompt=True))
        found.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    if not packing:
        return found
    return [
        {
            "input_ids": [i for row in group for i in row["input_ids"]],
            "labels": [i for row in group for i in row["labels"]],
            "seq_lengths": [len(row["input_ids"]) for row in group],
        }
        for group in (found[i : i + 3] for i in range(0, count, 3))
    ]


def write_rows(path: Path, made: list[dict[str, Any]]) -> None:
    """`made` as an Arrow stream of int32 lists, as the data room writes it."""
    schema = pyarrow.schema([(name, pyarrow.list_(pyarrow.int32())) for name in made[0]])
    table = pyarrow.Table.from_pylist(made, schema=schema)
    with pyarrow.ipc.new_stream(path, schema) as stream:
        stream.write_table(table, max_chunksize=7)


def request(
    run: Path,
    base: Path,
    recipe: Recipe,
    placement: Placement,
    *,
    count: int = 18,
    held_out: int = 0,
    **more: Any,
) -> dict[str, Any]:
    """A request for tuning.training.train, with its dataset written under `run`."""
    if not (run / "data").exists():
        (run / "data").mkdir(parents=True)
        for name, number, seed in (("train", count, 1), ("eval", held_out, 2)):
            if number:
                made = rows(base, number, packing=recipe.packing, seed=seed)
                write_rows(run / "data" / f"{name}.arrow", made)
    return {
        "run": str(run),
        "base": str(base),
        "recipe": asdict(recipe),
        "placement": asdict(placement),
        "train": str(run / "data" / "train.arrow"),
        "eval": str(run / "data" / "eval.arrow") if held_out else None,
        "adapter": str(run / "adapter"),
        "questions": [],
        "base_name": "org/base",
        "base_revision": "0123abc",
    } | more
