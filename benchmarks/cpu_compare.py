"""A whole fine-tuning job on a CPU: ours beside the script of trl's documentation.

    python -m benchmarks.cpu_compare [--model tiny|small] [--pairs 5] [--write]
    python -m benchmarks.cpu_compare --equal [--write]     the first losses, unpacked, in float32

`docs/speed.md` is made from the results by `make docs`.

The same random Llama, the same 2,000 chat rows, about the same tokens an optimizer step: `trl` is
`plain_trl.py` with its defaults, `trl packed` the same with packing, `ours` is `python -m tuning
run` to the finished image. trl's default is bfloat16, also on a processor without instructions for
it, where that is slow: there its contenders compute in float32. CPU-seconds are those of the whole
process tree, imports and all; a real token is one that is no padding. Contenders take turns,
forwards and backwards, and a ratio is between neighbours. Of memory that processes share each has
its part, so that others with the same libraries in memory make all contenders look smaller: leave
none running.
Every run appends to `results/cpu_compare.jsonl`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

import tiny_models  # noqa: E402  # it is no package

from tuning.plan import device  # noqa: E402

RESULTS = HERE / "results" / "cpu_compare.jsonl"
ROWS, LENGTH, STEPS = 2000, 1024, 30
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "intermediate_size": 688,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
    },
    "small": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "intermediate_size": 1376,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 8192,
    },
}
BF16 = device.cpu().bf16  # whether this processor has instructions for bfloat16
TRL = ("trl", "trl packed") if BF16 else ("trl float32", "trl packed float32")
CONTENDERS = (*TRL, "ours")
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets")
WORKSPACE = """apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: bench}
resource: {labelSelector: {matchLabels: {apps: bench}}}
tuning:
  preset: {name: tuning/bench}
  method: lora
  config: bench
  input: {urls: ["https://example.com/rows.jsonl"]}
  output: {image: "registry.example.com/bench:1", imagePushSecret: push}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: bench}
data:
  training_config.yaml: |
    training_config:
      ModelConfig: {torch_dtype: DTYPE}
      LoraConfig: {r: 16, lora_alpha: 32}
      TrainingArguments: {learning_rate: 2.0e-4, max_steps: STEPS, OTHERS}
      DatasetConfig: {train_on: all}
"""
PACKED = (
    f"packing: true, max_length: {LENGTH}, per_device_train_batch_size: 1, "
    "gradient_accumulation_steps: 1"
)
# what trl does unasked, said to us: linear schedule, no warm-up, eight rows
UNPACKED = (
    "packing: false, per_device_train_batch_size: 8, gradient_accumulation_steps: 1, "
    "lr_scheduler_type: linear, warmup_steps: 0"
)


def make(folder: Path, name: str) -> tuple[Path, Path]:
    """A folder with the random model, tokenizer and template, and the file of rows."""
    shape, model = SHAPES[name], folder / name
    tokenizer = tiny_models.build_tokenizer("chatml", shape["vocab_size"])
    config = transformers.LlamaConfig(
        **shape, max_position_embeddings=4096, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in chats()))
    return model, rows


def chats() -> Iterator[dict[str, Any]]:
    """Questions and answers with the lengths of real ones: lognormal, 8 to 512 words together."""
    draw = random.Random(0)
    for _ in range(ROWS):
        words = min(512, max(8, round(draw.lognormvariate(4.5, 0.8))))
        asked = max(2, round(words * draw.uniform(0.2, 0.6)))
        turns = {"user": asked, "assistant": max(2, words - asked)}
        yield {
            "messages": [
                {"role": role, "content": " ".join(draw.choices(tiny_models.WORDS, k=count))}
                for role, count in turns.items()
            ]
        }


def command(contender: str, model: Path, rows: Path, out: Path, *, equal: bool) -> list[str]:
    """The command line of one run."""
    if contender != "ours":
        options = ["--packing", str(LENGTH)] if "packed" in contender else []
        options += ["--float32"] if equal or "float32" in contender else []
        script = str(HERE / "plain_trl.py")
        return [sys.executable, script, str(model), str(rows), str(out), str(STEPS), *options]
    text = WORKSPACE.replace("STEPS", str(STEPS)).replace("DTYPE", "float32" if equal else "")
    text = text.replace("{torch_dtype: }", "{}")
    workspace = out.with_suffix(".yaml")
    workspace.write_text(text.replace("OTHERS", UNPACKED if equal else PACKED))
    return [
        *(sys.executable, "-m", "tuning", "run", "-f", str(workspace)),
        *("--base-model", str(model), "--data", str(rows), "--run-dir", str(out)),
        *("--output", f"oci:{out}-image"),
    ]


def run(
    contender: str, model: Path, rows: Path, out: Path, *, equal: bool = False
) -> dict[str, Any]:
    """One run from the outside: CPU-seconds, wall and peak memory of its tree; and its own word."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(out) + "-cache",  # each starts from nothing
        "XDG_CACHE_HOME": str(out) + "-cache",
        "PYTHONPATH": str(HERE.parent),
    }
    arguments = command(contender, model, rows, out, equal=equal)
    with out.with_suffix(".log").open("wb") as log:
        start = time.monotonic()
        child = subprocess.Popen(arguments, stdout=log, stderr=log, env=environment)
        watch = Watch(child.pid, out / "metrics.jsonl", start)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        wall = time.monotonic() - start
        watch.stop()
    if child.returncode:
        raise SystemExit(f"{contender} failed:\n{out.with_suffix('.log').read_text()[-3000:]}")
    said = told(contender, out, watch)
    return {
        "cpu": used.ru_utime + used.ru_stime,
        "wall": wall,
        "peak": watch.peak,
        "load": os.getloadavg()[0],
        **said,
    }


class Watch(threading.Thread):
    """Looks at a process tree now and then: its memory, and when the first step was reported."""

    def __init__(self, pid: int, metrics: Path, start: float) -> None:
        super().__init__(daemon=True)
        self.pid, self.metrics, self.began = pid, metrics, start
        self.peak, self.first_step = 0, 0.0
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        """Ten times a second; less than a hundredth of a core."""
        while not self._over.wait(0.1):
            self.peak = max(self.peak, sum(map(resident, tree(self.pid))))
            if not self.first_step and self.metrics.exists() and self.metrics.stat().st_size:
                self.first_step = time.monotonic() - self.began

    def stop(self) -> None:
        """End, and wait for that."""
        self._over.set()
        self.join()


def tree(pid: int) -> list[int]:
    """`pid` and all below it."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [pid, *(each for child in text.split() for each in tree(int(child)))]


def resident(pid: int) -> int:
    """Bytes of memory, shared pages divided among those who share them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def told(contender: str, out: Path, watch: Watch) -> dict[str, Any]:
    """Tokens, losses and the way to the first step, as the run itself has it."""
    if contender != "ours":
        record: dict[str, Any] = json.loads((out / "laps.json").read_text())
        first = record["laps"].pop("first step")
        return {"first_step": first, "laps": record["laps"]} | {
            name: record[name] for name in ("tokens", "losses")
        }
    journal = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    at = {(entry["phase"], entry["event"]): moment(entry["at"]) for entry in journal}
    training = next(e["value"] for e in journal if (e["phase"], e["event"]) == ("train", "end"))
    tokenised = at["tokenise", "end"] - at["tokenise", "start"]
    packed = at["train", "start"] - at["tokenise", "end"]
    load = training["load_seconds"]
    step = training["first_step_seconds"] - load
    laps = {"tokenise": tokenised, "pack and plan": packed, "load": load, "step": step}
    laps["start and import"] = watch.first_step - sum(laps.values())
    return {
        "first_step": watch.first_step,
        "laps": laps,
        "tokens": training["tokens"],
        "losses": training["loss_by_step"],
    }


def moment(text: str) -> float:
    """Seconds since the epoch."""
    return datetime.datetime.fromisoformat(text).timestamp()


def compare(name: str, pairs: int) -> dict[str, Any]:
    """`pairs` rounds of all contenders; medians, and ratios of ours to each within a round."""
    with tempfile.TemporaryDirectory() as scratch:
        model, rows = make(Path(scratch), name)
        found: dict[str, list[dict[str, Any]]] = {contender: [] for contender in CONTENDERS}
        for number in range(pairs):
            for contender in CONTENDERS if number % 2 == 0 else CONTENDERS[::-1]:
                out = Path(scratch) / f"{contender.replace(' ', '-')}-{number}"
                made = run(contender, model, rows, out)
                found[contender].append(made)
                print(f"{contender:12s} {line(made)}", flush=True)
    return {
        "kind": "compare",
        "model": name,
        "medians": {contender: medians(runs) for contender, runs in found.items()},
        "ratios": {
            other: ratios(found["ours"], found[other]) for other in CONTENDERS if other != "ours"
        },
        "loads": [round(made["load"], 1) for runs in found.values() for made in runs],
    }


def line(made: dict[str, Any]) -> str:
    """One run for people."""
    laps = ", ".join(f"{name} {seconds:.1f}" for name, seconds in made["laps"].items())
    return (
        f"{1e3 * made['cpu'] / made['tokens']:.2f} CPU-ms a token, {made['cpu']:.1f} CPU-s, "
        f"{made['wall']:.1f} s, first step at {made['first_step']:.1f} s ({laps}), "
        f"{made['peak'] / 2**20:.0f} MiB, load {made['load']:.1f}"
    )


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each number."""
    middle = {
        name: statistics.median(made[name] for made in runs)
        for name in ("cpu", "wall", "first_step", "peak", "tokens")
    }
    middle["cpu_per_token"] = statistics.median(made["cpu"] / made["tokens"] for made in runs)
    laps = {lap: statistics.median(m["laps"][lap] for m in runs) for lap in runs[0]["laps"]}
    return middle | {"laps": laps}


def ratios(ours: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Ours to the other's, round by round: median, lowest, highest."""

    def spread(value: Any) -> list[float]:
        found = [value(a) / value(b) for a, b in zip(ours, others, strict=True)]
        return [statistics.median(found), min(found), max(found)]

    return {
        "cpu_per_token": spread(lambda made: made["cpu"] / made["tokens"]),
        "first_step": spread(lambda made: made["first_step"]),
        "peak": spread(lambda made: made["peak"]),
    }


def equal() -> dict[str, Any]:
    """Losses of the first steps, unpacked, in float32, of ours and of trl's script."""
    with tempfile.TemporaryDirectory() as scratch:
        model, rows = make(Path(scratch), "tiny")
        ours = run("ours", model, rows, Path(scratch) / "ours", equal=True)["losses"]
        rows = (
            Path(scratch) / "ours" / "data" / "packed" / "train.arrow"
        )  # not packed, but shuffled
        other = run("trl", model, rows, Path(scratch) / "trl", equal=True)["losses"]
    differences = [abs(a - b) for a, b in zip(ours, other, strict=True)]
    print("largest difference of the first five losses", max(differences[:5]))
    print("largest of all", max(differences))
    return {"kind": "equal", "first_five": max(differences[:5]), "all": max(differences)}


def about() -> dict[str, Any]:
    """The machine, the libraries and the day."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} x {model}, Python {platform.python_version()}",
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "steps": STEPS,
        "bf16": BF16,
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--equal", action="store_true")
    parser.add_argument("--write", action="store_true", help=f"append to {RESULTS.name}")
    given = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    result = (equal() if given.equal else compare(given.model, given.pairs)) | about()
    if given.write:
        with RESULTS.open("a") as file:
            file.write(json.dumps(result) + "\n")
    print(json.dumps({key: result[key] for key in ("ratios", "medians") if key in result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
