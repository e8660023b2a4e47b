"""A byte that flips, a tail that is lost: the same command again ends in the same bytes.

The disk keeps the file's time and says nothing. Each case puts a run directory back to where a kill
at a boundary of two phases leaves it, damages files, and runs the same command.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import pytest
from commands import tuning, workspace

from tuning import files
from tuning.oci import provenance

EXAMPLES = Path(__file__).parents[2] / "examples"
# What a run directory does not hold yet when the journal ends with this phase.
LATER = {
    "tokenise": ("data/packed", "plan.json", "metrics.jsonl", "checkpoints", "samples.jsonl"),
    "pack": ("plan.json", "metrics.jsonl", "checkpoints", "samples.jsonl"),
    "plan": ("metrics.jsonl", "checkpoints", "samples.jsonl"),
    "checkpoint": (),
    "train": (),
    "package": (),
    "push": (),
    "finish": (),
}
UNTRAINED = ("tokenise", "pack", "plan", "checkpoint")


@dataclass
class Job:
    """A finished run, its output, and the command that made it."""

    folder: Path
    snapshot: Path
    digest: str = ""

    def command(self) -> subprocess.CompletedProcess[str]:
        """The same command each time."""
        return tuning(*self.arguments())

    def arguments(self) -> list[str]:
        """The words of that command."""
        words = [
            *("run", "-f", self.folder / "rot.yaml", "--base-model", EXAMPLES / "tiny-model"),
            *("--data", self.folder / "rows.jsonl", "--run-dir", self.folder / "run"),
            *("--json", "--output", f"oci:{self.folder / 'image'}"),
        ]
        return [str(word) for word in words]

    def restore(self, boundary: str) -> list[Path]:
        """Put everything to where a kill after `boundary` leaves it; returns its files."""
        for name in ("run", "image"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            shutil.copytree(self.snapshot / name, self.folder / name)
        run, gone = self.folder / "run", list(LATER[boundary])
        if boundary in (*UNTRAINED, "train"):
            gone += ["image"]
        if boundary in UNTRAINED:
            gone += ["adapter"]
        elif boundary == "train":
            gone += ["adapter/tuning.json", "adapter/README.md"]
        if boundary != "finish":
            gone += ["report.html"]
        for path in (run / name for name in gone):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if boundary not in ("push", "finish"):
            shutil.rmtree(self.folder / "image")
        lines = (run / "journal.jsonl").read_bytes().splitlines(keepends=True)
        records = [json.loads(line) for line in lines]
        phase, event = (boundary, "end") if boundary != "checkpoint" else ("train", "start")
        (last,) = (
            n for n, r in enumerate(records, 1) if (r["phase"], r["event"]) == (phase, event)
        )
        (run / "journal.jsonl").write_bytes(b"".join(lines[:last]))
        there = [*run.rglob("*"), *(self.folder / "image").rglob("*")]
        return sorted(path for path in there if path.is_file() and path.stat().st_size)

    def outcome(self) -> str:
        """Run the command: "same" for the same bytes, or the code of a typed error."""
        ended = self.command()
        if ended.returncode:
            assert ended.returncode in (10, 11, 12, 20, 137), ended.stderr
            (code, *_) = re.findall(r"[A-Z]+-\d{3}", ended.stderr)
            return str(code)
        assert self.digest == json.loads(ended.stdout)["digest"], ended.stderr
        for name in ("image", "run/image", "run/adapter"):
            assert tree(self.snapshot / name) == tree(self.folder / name), (name, ended.stderr)
        return "same"


def tree(folder: Path) -> dict[str, str]:
    """The sha256 of each file."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): files.digest_file(path) for path in paths}


def spoil(path: Path, how: str, chance: random.Random) -> None:
    """Flip a byte of a file, or cut it; its time stays."""
    stat, data = path.stat(), bytearray(path.read_bytes())
    place = chance.randrange(len(data))
    if how == "flip":
        data[place] ^= chance.randrange(1, 256)
    elif how == "cut":
        del data[place:]
    else:  # blocks that were never written
        data[place:] = bytes(len(data) - place)
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """A short run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("rot")
    made = Job(folder, folder / "snapshot")
    workspace(folder / "rot.yaml", settings={"max_steps": 2, "packing": False, "save_steps": 1})
    rows = (EXAMPLES / "data" / "demo.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(rows[:20]))
    ended = made.command()
    assert 0 == ended.returncode, ended.stderr
    made.digest = json.loads(ended.stdout)["digest"]
    for name in ("run", "image"):
        shutil.copytree(folder / name, made.snapshot / name)
    yield made


# Several files at once, so that a few runs damage many: (boundary, files and how).
SHORT = {
    "the data before training": (
        "plan",
        {
            "data/tokenised/rows.arrow": "flip",
            "data/packed/train.arrow": "flip",
            "data/packed/packed.json": "cut",
            "plan.json": "cut",
            "spec.yaml": "flip",
        },
    ),
    "the adapter after training": (
        "train",
        {
            "adapter/adapter_model.safetensors": "flip",
            "adapter/tokenizer.json": "zero",
            "metrics.jsonl": "flip",
            "data/packed/train.arrow": "cut",
        },
    ),
    "the image before the push": (
        "package",
        {
            "image/index.json": "flip",
            "image/oci-layout": "cut",
            "image/blobs/sha256/*": "flip",
            "adapter/README.md": "flip",
        },
    ),
    "a finished run": (
        "finish",
        {
            "adapter/adapter_config.json": "flip",
            "image/blobs/sha256/*": "cut",
            "../image/index.json": "flip",
            "../image/blobs/sha256/*": "flip",
            "report.html": "flip",
            "plan.json": "zero",
            "journal.jsonl": "cut",
        },
    ),
    "the adapter of a finished run": ("finish", {"adapter/tokenizer.json": "flip"}),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SHORT)
def test_damaged_files_are_made_again(name: str, job: Job) -> None:
    """Whatever rots at a boundary, the run ends in the bytes of one that nothing disturbed."""
    boundary, damages = SHORT[name]
    job.restore(boundary)
    chance = random.Random(name)
    for pattern, how in damages.items():
        for path in sorted((job.folder / "run" / Path(pattern).parent).glob(Path(pattern).name)):
            spoil(path, how, chance)

    assert "same" == job.outcome()


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_any_damage_at_any_boundary_is_made_again_or_named(job: Job) -> None:
    """Random files, places and kinds of damage: the same bytes or a typed error, never silence."""
    chance = random.Random(os.environ.get("SOAK_SEED", "0"))
    for number, boundary in zip(range(int(os.environ.get("SOAK_ROT", "300"))), cycle(LATER)):
        path = chance.choice(job.restore(boundary))
        how = chance.choice(("flip", "flip", "cut", "zero"))
        spoil(path, how, chance)
        case = f"{number} {boundary}: {how} {path.relative_to(job.folder)}"
        print(f"{case}: {job.outcome()}", flush=True)


def test_a_run_of_an_older_version_goes_on(job: Job) -> None:
    """Its journal has neither checks nor digests: what is there is accepted as it is."""
    job.restore("package")
    path = job.folder / "run" / "journal.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        del record["check"]
        record.pop("outputs", None)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))

    assert "same" == job.outcome()
    ends = [json.loads(line) for line in path.read_text().splitlines()][len(records) :]
    assert ["push", "finish"] == [record["phase"] for record in ends if record["event"] == "end"]


def test_the_provenance_of_a_real_run_has_what_was_planned(job: Job) -> None:
    """Memory and speed by the names of plan.json: nothing planned is null for want of a name."""
    job.restore("package")
    run = job.folder / "run"
    planned = files.read_json(run / "plan.json")
    planned["speed"] = dict.fromkeys(planned["speed"], 7.0)
    files.write_json(run / "plan.json", planned)

    told = provenance.statement(run, [])["predicate"]["runDetails"]["tuning_planned"]
    assert {"seconds": 7.0, "tokens_per_second": 7.0, "memory": planned["memory"]} == told


def test_what_changed_is_named_before_the_adapter_is_replaced(job: Job) -> None:
    """Another learning rate and other rows in the same run directory."""
    job.restore("finish")
    text = (job.folder / "rot.yaml").read_text()
    rows = (job.folder / "rows.jsonl").read_text()
    try:
        (job.folder / "rot.yaml").write_text(text.replace("0.001", "0.003"))
        (job.folder / "rows.jsonl").write_text(rows + rows)
        ended = job.command()
    finally:
        (job.folder / "rot.yaml").write_text(text)
        (job.folder / "rows.jsonl").write_text(rows)

    assert 0 == ended.returncode, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if "will be replaced" in line]
    assert "learning_rate 0.001 -> 0.003" in line and "data" in line


def test_an_interrupted_run_has_a_report(job: Job) -> None:
    """It says where it ended and why, beside the loss so far."""
    job.restore("plan")
    arguments = job.arguments()
    with subprocess.Popen(
        [sys.executable, "-m", "tuning", *arguments], stderr=subprocess.DEVNULL
    ) as run:
        while run.poll() is None and not (job.folder / "run" / "metrics.jsonl").exists():
            time.sleep(0.02)
        run.terminate()

    page = (job.folder / "run" / "report.html").read_text()
    assert 75 == run.returncode
    assert "<b>Interrupted</b>" in page and "Ended in the phase train with exit code 75" in page
    assert re.search(r"<li>RUN-1[13]0 .*What to do:", page), page.partition("<h1>")[2]


def test_a_reader_that_closes_early_is_no_error(job: Job) -> None:
    """`preview | head -1`, on the page and as JSON: exit 0, nothing on stderr but what it says."""
    job.restore("pack")
    for more in ([], ["--json"]):
        words = [arg for arg in job.arguments() if arg != "--json"][1:-2]
        command = [sys.executable, "-m", "tuning", "preview", *words, *more]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as preview:
            assert preview.stdout is not None and preview.stderr is not None
            preview.stdout.close()
            said = preview.stderr.read().decode()
        assert 0 == preview.returncode, said
        assert "Traceback" not in said and "Exception ignored" not in said
