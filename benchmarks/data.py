"""Preparing chat rows: rows per CPU-second beside trl, packing efficiency, peak memory.

    python benchmarks/data.py [ROWS]          beside trl, a minute or two
    python benchmarks/data.py --memory [GB]   ours alone on a file of GB and one of a quarter of it

Both prepare the same JSONL file for the same tokenizer, with loss on the answers and packing, each
in a process of its own; CPU-seconds count every thread, from the file to the packed dataset,
without imports. Peak memory is the sum over all processes of the two steps as a run starts them,
looked at ten times a second. Results go to benchmarks/results/data.jsonl.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
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
    request["processes"] = 1
    tokenise.run(request)
    packing = {
        "tokenised": str(folder / "rows"),
        "out": str(folder / "packed"),
        "max_length": MAX_LENGTH,
        "packing": True,
        "seed": 0,
    }
    made = pack.run(packing)["train"]
    seconds = time.process_time() - begin
    return {
        "seconds": seconds,
        "rows": made["rows"],
        "efficiency": made["efficiency"],
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


def peak(request: dict[str, object], path: Path) -> tuple[float, float]:
    """Peak MiB over all processes, and seconds, of one step carried out as a run does it."""
    import psutil

    path.write_text(json.dumps(request))
    begin, most = time.monotonic(), 0
    child = subprocess.Popen([sys.executable, "-m", "tuning.process", "data", str(path)])
    tree = psutil.Process(child.pid)
    while child.poll() is None:
        held = 0
        for process in [tree, *tree.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                memory = process.memory_info()
                held += memory.rss - memory.shared  # files mapped into memory are not held
        most = max(most, held)
        time.sleep(0.1)
    if child.returncode:
        raise SystemExit(f"the step failed; see {path}")
    return most / 2**20, time.monotonic() - begin


def memory(folder: Path, rows: Path) -> dict[str, float]:
    """Peak MiB and seconds of both steps on `rows`."""
    tokenise: dict[str, object] = {
        "step": "tokenise",
        "files": [{"path": str(rows), "shown": rows.name}],
        "base": str(folder / "model"),
        "out": str(folder / "rows"),
        "settings": {},
    }
    pack: dict[str, object] = {
        "step": "pack",
        "tokenised": str(folder / "rows"),
        "out": str(folder / "packed"),
        "max_length": MAX_LENGTH,
        "packing": True,
        "seed": 0,
    }
    first, first_seconds = peak(tokenise, folder / "tokenise.json")
    second, second_seconds = peak(pack, folder / "pack.json")
    return {
        "bytes": rows.stat().st_size,
        "tokenise_mib": round(first),
        "tokenise_seconds": round(first_seconds),
        "pack_mib": round(second),
        "pack_seconds": round(second_seconds),
    }


def of_size(path: Path, size: int) -> Path:
    """A file of about `size` bytes: the same million rows again and again."""
    write_rows(path, 200_000)
    block = path.read_bytes()
    with path.open("ab") as file:
        for _ in range(size // len(block) - 1):
            file.write(block)
    return path


def measure_memory(gigabytes: float) -> None:
    """Measure a file, and one of a quarter of its size."""
    import tiny_models

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny_models.build("phi3", folder / "model")
        sizes = [int(gigabytes * 1e9 / 4), int(gigabytes * 1e9)]
        found = [memory(folder, of_size(folder / "rows.jsonl", size)) for size in sizes]
    for each in found:
        print(
            f"{each['bytes'] / 1e9:.2f} GB: tokenise {each['tokenise_mib']} MiB in "
            f"{each['tokenise_seconds']} s, pack {each['pack_mib']} MiB in {each['pack_seconds']} s"
        )
    keep({"what": "memory", "files": found})


def keep(result: dict[str, object]) -> None:
    """Append a result with its date, machine and versions."""
    import importlib.metadata

    names = ("trl", "transformers", "datasets", "tokenizers", "pyarrow")
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "versions": {name: importlib.metadata.version(name) for name in names},
    }
    with (HERE / "results" / "data.jsonl").open("a") as file:
        file.write(json.dumps(about | result, sort_keys=True) + "\n")


def compare(count: int) -> None:
    """Measure both on `count` rows."""
    import tiny_models

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny_models.build("phi3", folder / "model")
        rows = folder / "rows.jsonl"
        write_rows(rows, count)
        us, them = measure("ours", folder, rows), measure("theirs", folder, rows)
    speed, other = count / us["seconds"], count / them["seconds"]
    print(f"rows per CPU-second      {speed:8,.0f}   trl {other:8,.0f}   {speed / other:.2f} times")
    print(f"packing efficiency       {us['efficiency']:8.4f}   trl {them['efficiency']:8.4f}")
    print(f"packed rows              {us['rows']:8,}   trl {them['rows']:8,}")
    rates = {"ours": round(speed), "trl": round(other), "ratio": round(speed / other, 2)}
    packing = {"ours": us["efficiency"], "trl": round(them["efficiency"], 4)}
    keep({"what": "speed", "rows": count, "rows_per_cpu_second": rates, "efficiency": packing})


def main() -> None:
    """Measure and print."""
    given = sys.argv[1:]
    if given[:1] == ["--memory"]:
        measure_memory(float(given[1]) if len(given) > 1 else 2.0)
    elif len(given) == 3:
        which = {"ours": ours, "theirs": theirs}[given[0]]
        print(json.dumps(which(Path(given[1]), Path(given[2]))))
    else:
        compare(int(given[0]) if given else 50_000)


if __name__ == "__main__":
    main()
