"""What is known of every preset before it is trained, as files.

    python -m tuning.training.simulate --write [preset ...]   make configs/memory/, or files of it
    python -m tuning.training.simulate --check [preset ...]   files that differ from what it makes
    python -m tuning.training.simulate --write --missing      add the coefficients that files lack
    python -m tuning.training.simulate FOLDER                 print that of a model's config.json

How it is adapted (`verdict`), its `facts` where there is no closed form of them
(`configs/architectures.yaml`), and the coefficients of its memory. With `--quick` the coefficients
stay as they are, or absent: the rest takes a second for each preset, they take a minute or more of
one core. Presets of the same shape are run once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from tuning import files
from tuning.plan import verdict
from tuning.plan.coefficients import Coefficients, Variant, from_json, to_json
from tuning.presets import CONFIGS
from tuning.presets.config import facts, families
from tuning.presets.load import entries
from tuning.training.simulate.child import judge, simulate
from tuning.training.simulate.count import count

FOLDER = CONFIGS / "memory"
logger = logging.getLogger(__name__)


def configs() -> dict[str, dict[str, Any]]:
    """The config of each preset, by name."""
    return {entry["name"]: entry["config"] for entry in entries()}


def _counted(config: dict[str, Any]) -> bool:
    """Whether no closed form has the facts of `config`."""
    text = config.get("text_config") or config
    return text["model_type"] not in families()


def variants(config: dict[str, Any]) -> tuple[Variant, ...]:
    """The ways to train that are simulated ahead: all that a plan for a GPU may choose.

    Cards without bfloat16 are older than the flash kernel, and have torch's own attention.
    """
    shape = count(config) if _counted(config) else facts(config)
    ways = [("lora", "bfloat16", "sdpa"), ("qlora", "bfloat16", "sdpa")]
    if shape is not None and shape.packing_safe:
        ways += [(method, precision, "varlen") for method, precision, _ in ways]
    found = [
        Variant(*way, checkpointing, dropout, fused=fused)  # type: ignore[arg-type]
        for way, checkpointing, dropout, fused in itertools.product(
            ways, (True, False), (False, True), (False, True)
        )
    ]
    if shape is not None and not shape.experts:  # the longest rows, on cards of today
        tiled = [way for way in ways if way[2] == "varlen"]
        found += [Variant(*way, fused=True, tiled=True) for way in tiled]  # type: ignore[arg-type]
    return tuple(found)


def text(
    config: dict[str, Any], kept: dict[str, Any] | None = None, *, missing: bool = False
) -> str:
    """What is found out about `config`, as the file holds it: an entry of its parts a line.

    `kept`: a file's record, whose coefficients are taken instead of simulated again; those that are
    `missing` there are simulated.
    """
    judged = judge(config)[0]
    if kept is None:
        found = to_json(simulate(config, variants(config), judged))
    else:
        found = {k.name: kept[k.name] for k in fields(Coefficients) if k.name in kept}
    if missing and "moments" in found:
        sized = from_json(found)
        lacking = [v for v in variants(config) if v.stored not in sized.moments]
        added = simulate(config, lacking, judged).moments if lacking else {}
        found = to_json(replace(sized, moments=sized.moments | added))
    found["verdict"] = verdict.to_json(judged)
    if _counted(config):
        facts_ = count(config).to_json()  # whether it packs is known of its class
        found["facts"] = {k: v for k, v in facts_.items() if not k.startswith(("packing", "tied"))}
    keys = sorted(found, key=lambda key: (key == "moments", key))
    return "{\n" + ",\n".join(f" {json.dumps(key)}: {_lines(found[key])}" for key in keys) + "\n}\n"


def _lines(value: Any) -> str:
    if isinstance(value, dict):
        inside = (f"{json.dumps(key)}: {json.dumps(value[key])}" for key in sorted(value))
        return "{\n  " + ",\n  ".join(inside) + "\n }"
    if isinstance(value, list):
        return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
    return json.dumps(value)


def make(
    names: Iterable[str], *, quick: bool = False, missing: bool = False
) -> Iterator[tuple[str, str]]:
    """Name and file of each preset in `names`, one by one."""
    known = configs()
    made: dict[bytes, str] = {}
    for name in names:
        key = files.canonical(_shape(known[name]))
        if quick or missing:
            path = FOLDER / f"{name}.json"
            kept = files.read_json(path) if path.is_file() else {}
            yield name, text(known[name], kept, missing=missing)
        elif key not in made:
            logger.info("simulating %s", name)
            made[key] = text(known[name])
        if not (quick or missing):
            yield name, made[key]


def _shape(config: dict[str, Any]) -> dict[str, Any]:
    """`config` without what changes no tensor of a step."""
    return {
        key: _shape(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in ("max_position_embeddings", "sliding_window", "quantization_config")
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 when --check finds a difference."""
    parser = argparse.ArgumentParser(prog="python -m tuning.training.simulate", description=__doc__)
    parser.add_argument("names", nargs="*", help="presets, or one folder with a config.json")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--missing", action="store_true")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if not options.write and not options.check:
        for folder in options.names:
            sys.stdout.write(text(files.read_json(Path(folder) / "config.json")))
        return 0
    changed = []
    every = make(options.names or configs(), quick=options.quick, missing=options.missing)
    for name, made in every:
        path = FOLDER / f"{name}.json"
        if not path.is_file() or path.read_text(encoding="utf-8") != made:
            changed.append(name)
            if options.write:
                FOLDER.mkdir(exist_ok=True)
                files.write(path, made)
    logger.info("%s: %s", "written" if options.write else "differ", ", ".join(changed) or "none")
    return 1 if changed and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
