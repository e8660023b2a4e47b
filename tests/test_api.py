"""The Python API does what the commands do, and its names are a promise."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from commands import good, workspace
from commands import tuning as command

import tuning
from tuning import pipeline
from tuning.cli import tables
from tuning.console import Console

NAMES = ["LiveChart", "Logins", "Result", "Spec", "TuningError"]
NAMES += ["check", "load", "plan", "preview", "pull", "run"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model."""
    return tiny_models.build("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture
def job(tmp_path: Path, base: Path) -> tuning.Spec:
    """Four steps on twelve rows, into a folder."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in tiny_models.message_rows(12)))
    file = workspace(tmp_path / "job.yaml", settings={"logging_steps": 1})
    output = f"oci:{tmp_path / 'image'}"
    return tuning.load(file, model=str(base), data=str(rows), output=output)


def test_the_names_are_a_promise() -> None:
    """Removing or renaming one breaks notebooks; each is typed and says what it does and raises."""
    assert NAMES == tuning.__all__
    for name in NAMES:
        each = getattr(tuning, name)
        if name != "plan":
            assert each.__doc__
        if inspect.isfunction(each):
            given = inspect.get_annotations(each)

            assert {*inspect.signature(each).parameters, "return"} == set(given)


def test_import_is_light() -> None:
    """`import tuning` and the names of it load no torch."""
    code = (
        "import sys, tuning; from tuning import Spec, plan, preview, run, pull; "
        "plan(tuning.load('examples/workspace-tuning-phi-3.yaml', output='oci:x')); "
        "print([m for m in ('torch', 'trl', 'kubernetes') if m in sys.modules])"
    )
    root = Path(tuning.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )

    assert (0, "[]\n") == (done.returncode, done.stdout), done.stderr


def steady(line: str) -> str:
    """A line without the memory that is free at the moment."""
    return re.sub(r"[\d.]+ GiB free", "", line)


def test_plan_check_and_preview_say_what_the_commands_say(
    job: tuning.Spec, tmp_path: Path, base: Path
) -> None:
    """The same plan, the same lines, the same preview as JSON."""
    arguments = ("-f", tmp_path / "job.yaml", "--base-model", base)
    arguments += ("--data", tmp_path / "rows.jsonl", "--output", f"oci:{tmp_path / 'image'}")
    preview = tuning.preview(job, rows=1, run_dir=tmp_path / "here", quiet=True)
    there = ("--run-dir", tmp_path / "there", "--rows", "1", "--json")

    planned = json.loads(good(command("plan", *arguments, "--json")))
    assert (
        planned["recipe"]
        == json.loads(json.dumps(tuning.plan(job, quiet=True).to_json()))["recipe"]
    )
    lines = good(command("check", *arguments)).splitlines()
    assert list(map(steady, lines)) == list(map(steady, tuning.check(job)))
    assert json.loads(good(command("preview", *arguments, *there))) == json.loads(
        json.dumps(preview)
    )


def test_a_run_that_the_callback_stops_goes_on(job: tuning.Spec, tmp_path: Path) -> None:
    """Its exception arrives, the state is saved; the same call finishes and pulls as one image."""

    class Enough(Exception):
        pass

    steps: list[Any] = []

    def stop(record: dict[str, Any]) -> None:
        steps.append(record["step"])
        raise Enough

    with pytest.raises(Enough):
        tuning.run(job, run_dir=tmp_path / "run", on_step=stop, quiet=True)
    assert 1 == steps.pop()

    def keep(record: dict[str, Any]) -> None:
        steps.append((record["step"], record["loss"]))

    result = tuning.run(job, run_dir=tmp_path / "run", on_step=keep, quiet=True)
    folder = tuning.pull(result.references[0], tmp_path / "pulled", quiet=True)

    assert [1, 2, 3, 4] == [step for step, _ in steps]
    steps.clear()
    again = tuning.run(job, run_dir=tmp_path / "run", on_step=keep, quiet=True)
    assert result == again and 4 == len(steps)  # nothing is trained, all is told
    assert tuple(steps) == result.losses
    assert result.digest.startswith("sha256:") and result.report.is_file()
    weights = "adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (result.adapter / weights).read_bytes()


def test_a_run_in_a_thread(job: tuning.Spec, tmp_path: Path) -> None:
    """A notebook or server may run it beside its own work; only signals need the main thread."""
    results: list[tuning.Result] = []

    def work() -> None:
        results.append(tuning.run(job, run_dir=tmp_path / "run", quiet=True))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert 4 == results[0].losses[-1][0]


def test_without_a_file(job: tuning.Spec, tmp_path: Path, base: Path) -> None:
    """Model, data and settings as keywords are the command line without a YAML."""
    rows, output = str(tmp_path / "rows.jsonl"), f"oci:{tmp_path / 'image'}"
    settings = {"max_steps": 4, "learning_rate": 0.001, "target_modules": ["q_proj"]}
    spec = tuning.load(model=str(base), data=rows, output=output, settings=settings)
    arguments = ("--set", "max_steps=4", "--set", "learning_rate=1e-3")
    planned = command(
        *("plan", base, rows, "-o", output, *arguments, "--set", "target_modules=q_proj"),
        "--json",
    )

    recipe = json.loads(json.dumps(tuning.plan(spec, quiet=True).to_json()))["recipe"]
    assert json.loads(good(planned))["recipe"] == recipe
    assert (4, ["q_proj"]) == (recipe["steps"] or spec.settings.max_steps, recipe["targets"])
    with pytest.raises(tuning.TuningError, match="USE-109"):
        tuning.load(model=str(base))


def test_without_an_output_the_image_stays_in_the_run_directory(
    tmp_path: Path, base: Path, job: tuning.Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in one that is named. The report of the same run without its question says that it is
    finished; with a folder as output, the summary names that folder."""
    monkeypatch.chdir(tmp_path)
    run, rows = Path("mine"), str(job.source.files[0])
    settings = {"max_steps": 2, "learning_rate": 0.001}
    spec = tuning.load(model=str(base), data=rows, settings=settings)
    first = tuning.run(spec, run_dir=run, ask=["cat?"], quiet=True)
    again = tuning.run(spec, run_dir=run, quiet=True)
    report, written = again.report.read_text(), (run / "spec.yaml").read_text()
    copied = tuning.load(model=str(base), data=rows, settings=settings, output="dir:copied")
    summary = pipeline.execute(copied, pipeline.gather(copied, run_dir=run), Console(quiet=True))

    assert (("oci:mine/image",), first.digest) == (first.references, again.digest)
    assert not Path("runs").exists()
    assert f"oci:{tmp_path / 'mine' / 'image'}" in written
    assert "could not say why" not in report
    said = "\n".join(tables.summary_lines(summary))
    assert " in copied\n" in said
    assert "--adapter copied" in said
    assert "to push it" not in said


def test_errors_are_those_of_the_command(tmp_path: Path) -> None:
    """One exception with code, place and remedy of every problem."""
    file = workspace(tmp_path / "job.yaml", settings={"learning_rat": 1})

    with pytest.raises(tuning.TuningError) as caught:
        tuning.plan(file)

    assert 11 == caught.value.exit_code
    assert "learning_rate" in str(caught.value)
    assert str(caught.value).strip() == command("plan", "-f", file).stderr.strip()
