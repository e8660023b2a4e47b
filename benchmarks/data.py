"""Preparing chat rows: rows per CPU-second beside trl, packing efficiency, peak memory.

    python benchmarks/data.py [ROWS]

Both prepare the same JSONL file for the same tokenizer, with loss on the answers and packing, each
in a process of its own; CPU-seconds count every thread, from the file to the packed dataset,
without imports. Peak memory is that of the whole process, on files of two sizes.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
MAX_LENGTH = 2048
WORDS = ["a", "model", "answers", "what", "why", "many", "trains", "data", "loss", "job", "one"]


def write_rows(path: Path, rows: int) -> None:
    """Short chats: a question and an answer, lengths spread as in real ones."""
    draw = random.Random(0)

    def words(middle: float) -> str:
        return " ".join(draw.choices(WORDS, k=max(1, int(draw.lognormvariate(middle, 0.7)))))

    with path.open("w") as file:
        for _ in range(rows):
            turns = [
                {"role": "user", "content": words(2.5)},
                {"role": "assistant", "content": words(3.0)},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")


def ours(folder: Path, rows: Path) -> dict[str, float]:
    """This project's two steps."""
    from transformers import AutoTokenizer

    from tuning.data import pack, tokenise

    AutoTokenizer.from_pretrained(folder / "model")  # imports what loading imports
    begin = time.process_time()
    request = {
        "files": [{"path": str(rows), "shown": rows.name}],
        "base": str(folder / "model"),
        "out": str(folder / "rows"),
        "settings": {},
    }
    tokenise.run(request)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    packing = {
        "tokenised": str(folder / "rows"),
        "out": str(folder / "packed"),
        "max_length": MAX_LENGTH,
        "packing": True,
        "seed": 0,
    }
    made = pack.run(packing)["train"]
    seconds = time.process_time() - begin
    packed = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": seconds,
        "rows": made["rows"],
        "efficiency": made["efficiency"],
        "tokenise_mib": memory / 1024,
        "pack_mib": packed / 1024,
    }


def theirs(folder: Path, rows: Path) -> dict[str, float]:
    """trl's SFTTrainer, as it prepares a dataset when it is made."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        max_length=MAX_LENGTH,
        packing=True,
        assistant_only_loss=True,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    begin = time.process_time()
    loaded = load_dataset("json", data_files=str(rows), split="train")
    trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=loaded, args=config)
    seconds = time.process_time() - begin
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    return {
        "seconds": seconds,
        "rows": len(lengths),
        "efficiency": sum(lengths) / (len(lengths) * MAX_LENGTH),
    }


def measure(who: str, folder: Path, rows: Path) -> dict[str, float]:
    """Run `who` in a fresh process."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, __file__, who, str(folder), str(rows)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measure and print."""
    if len(sys.argv) == 4:
        which = {"ours": ours, "theirs": theirs}[sys.argv[1]]
        print(json.dumps(which(Path(sys.argv[2]), Path(sys.argv[3]))))
        return
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000
    import tiny_models

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny_models.build("phi3", folder / "model")
        rows, four_times = folder / "rows.jsonl", folder / "more.jsonl"
        write_rows(rows, count)
        write_rows(four_times, 4 * count)
        us, them = measure("ours", folder, rows), measure("theirs", folder, rows)
        more = measure("ours", folder, four_times)
    speed, other = count / us["seconds"], count / them["seconds"]
    print(f"rows per CPU-second      {speed:8,.0f}   trl {other:8,.0f}   {speed / other:.2f} times")
    print(f"packing efficiency       {us['efficiency']:8.4f}   trl {them['efficiency']:8.4f}")
    print(f"packed rows              {us['rows']:8,}   trl {them['rows']:8,}")
    for step in ("tokenise", "pack"):
        first, second = us[f"{step}_mib"], more[f"{step}_mib"]
        print(
            f"peak memory, {step:9s}   {first:6.0f} MiB   with four times the rows {second:.0f} MiB"
        )


if __name__ == "__main__":
    main()
