"""A run that evaluates: base beside adapter after the push, and no failure of it costs the adapter.

Real parts: a registry, the training and the evaluation's own server.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import good, tuning, workspace
from faults import jobs
from faults.jobs import World
from faults.kills import Aim
from registries import Registry

from tuning import files
from tuning.errors import SpecError, UsageError
from tuning.oci import provenance, registry
from tuning.oci.registry import Remote
from tuning.pipeline import evaluating
from tuning.spec import parse, reference

pytestmark = pytest.mark.timeout(600)
EXAMPLES = Path(__file__).parents[2] / "examples"
TINY, QUESTIONS = EXAMPLES / "tiny-model", EXAMPLES / "data" / "demo-questions.jsonl"
CHILD = "tuning.serve.evaluation"
RESULT = r"evaluate\.result\.json"


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Callable[..., Path]
) -> Iterator[World]:
    with jobs.world(tmp_path_factory.mktemp("evaluating"), tiny_base("llama")) as made:
        yield made


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three questions."""
    path = tmp_path_factory.mktemp("few") / "few.jsonl"
    path.write_text("".join(QUESTIONS.read_text().splitlines(keepends=True)[:3]))
    return path


def annotate(job: Path, value: str) -> Path:
    """The Workspace in `job` with the annotation `evaluate`."""
    document, config = yaml.safe_load_all(job.read_text())
    document["metadata"]["annotations"] = {"tuning.kaito.sh/evaluate": value}
    job.write_text(yaml.safe_dump_all([document, config]))
    return job


def test_results_are_everywhere_but_in_the_image(few: Path, tmp_path: Path) -> None:
    """In the run directory, the summary, a statement that `inspect` reads; the image is that of a
    run that was not asked, and the file of questions, in the data folder, is not trained on."""
    data = tmp_path / "data"
    (data / "asked").mkdir(parents=True)
    shutil.copy(EXAMPLES / "data" / "demo.jsonl", data)
    shutil.copy(few, data / "asked")
    job, run = workspace(tmp_path / "job.yaml"), tmp_path / "run"
    command = ("run", "-f", job, "--base-model", TINY, "--insecure", "--json", "--data")
    alone = (*command, data / "demo.jsonl", "--run-dir", tmp_path / "alone")
    without = json.loads(good(tuning(*alone, "--output", f"oci:{tmp_path}/image")))
    annotate(job, "asked/few.jsonl")
    with Registry(tmp_path) as running:
        image = f"{running.host}/team/a:1"
        summary = json.loads(good(tuning(*command, data, "--run-dir", run, "--output", image)))
        inspected = json.loads(good(tuning("inspect", image, "--insecure", "--json")))
        page = good(tuning("inspect", image, "--insecure"))
        statement = _statement(image, inspected)
    record = files.read_json(run / "evaluation.json")

    assert (without["digest"], None) == (summary["digest"], without["evaluation"])
    (task,) = record["tasks"]
    assert ("asked/few.jsonl", "right", 3) == (task["task"], task["metric"], task["samples"])
    assert {"base", "tuned"} == set(task["models"])
    assert [task] == summary["evaluation"]["tasks"] == inspected["evaluation"]
    assert "asked/few.jsonl, right: base " in " ".join(page.split())
    assert not any(one["question"] in statement for one in record["asked"])


def _statement(image: str, inspected: dict[str, Any]) -> str:
    """The attached evaluation."""
    remote = Remote(reference.parse(image), insecure=True)
    kind = provenance.PREDICATE_KEY, provenance.EVALUATION
    (digest,) = (e["digest"] for e in inspected["attached"] if kind in e["annotations"].items())
    (part,) = registry.parts(remote, digest, provenance.MEDIA_TYPE)
    return part.content.decode()


ENDINGS = {
    "killed": (Aim("os.rename", RESULT, CHILD, act="SIGKILL"), "RUN-111"),
    "stopped": (Aim("subprocess.Popen", "--linger", CHILD, act="term"), "RUN-110"),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_an_evaluation_that_is_ended_costs_a_warning(name: str, world: World, few: Path) -> None:
    """Its child is killed, or the run is asked to stop: the run ends with 0, and says how to
    measure by hand."""
    aim, code = ENDINGS[name]

    ended = world.run(name, aim=aim, how={"more": ("--evaluate", str(few))})

    jobs.result(ended)
    assert json.loads(ended.out)["evaluation"]["problem"].startswith(f"{code} evaluate: ")
    (line,) = (line for line in ended.err.splitlines() if "By hand: " in line)
    by_hand = line.partition("By hand: python -m tuning ")[2].split()
    assert not (world.folder / name / "evaluation.json").exists()
    assert ("eval", str(world.folder / name)) == (by_hand[0], by_hand[-1])
    good(tuning(*by_hand))
    record = files.read_json(world.folder / name / "evaluation.json")
    assert 3 == record["tasks"][0]["samples"]


def test_a_run_that_dies_in_its_evaluation_tries_it_once_more(world: World, few: Path) -> None:
    """The second start measures; of a run that dies each time the third ends without.

    Trained anew with other settings and not asked, the run directory has no results.
    """
    more = {"more": ("--evaluate", str(few))}
    aim = Aim("os.rename", RESULT, CHILD, act="kill")

    assert 0 != world.run("once", aim=aim, how=more).status
    again = world.run("once", how=more)
    for _ in range(2):
        assert 0 != world.run("each", aim=aim, how=more).status
    given_up = world.run("each", how=more)

    jobs.result(again)
    assert "tasks" in json.loads(again.out)["evaluation"]
    jobs.result(given_up)
    assert "SERVE-137" in json.loads(given_up.out)["evaluation"]["problem"]
    path = world.folder / "once" / "evaluation.json"
    assert path.exists()
    jobs.result(world.run("once", max_steps=5))
    assert not path.exists()


def test_what_cannot_be_measured_is_refused_before_the_training(tmp_path: Path) -> None:
    """Names without lm-eval, a file where there is no folder, a file that is not there, a path
    that leads out of the data."""
    job = workspace(tmp_path / "job.yaml")

    def asked(value: str) -> Any:
        return parse(annotate(job, value).read_text(), origin="job.yaml")

    with pytest.raises(UsageError, match=r"SERVE-132 metadata.annotations.tuning.kaito.sh/evaluat"):
        evaluating.tasks(asked("hellaswag"))
    with pytest.raises(SpecError, match=r"SERVE-136 .* q.jsonl, and the data is in no folder"):
        evaluating.tasks(asked("q.jsonl"))
    for value in ("../q.jsonl", "/q.jsonl", "task.yaml", "a b", "", "q.jsonl,"):
        with pytest.raises(SpecError, match=r"use paths of .jsonl files"):
            asked(value)
    annotate(job, "none.jsonl")
    done = tuning("run", "-f", job, "--base-model", TINY, "--data", EXAMPLES / "data")
    assert 10 == done.returncode
    assert "SERVE-131" in done.stderr
    annotate(job, "hellaswag")
    for command in ("plan", "check"):
        refused = tuning(command, "-f", job, "--base-model", TINY)
        assert "SERVE-132" in refused.stderr, command
        assert 0 != refused.returncode


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[1]",
        b'{"predicate": {"tasks": [{"task": 1}]}}',
        b'{"predicate": {"tasks": [{"task": "a", "metric": "b", "samples": "x", "models": {}}]}}',
        b'{"predicate": {"tasks": [{"task": "a", "metric": "b", "samples": 1,'
        b' "models": {"base": {"value": null, "low": 0, "high": 1}}}]}}',
    ],
)
def test_an_attached_statement_is_not_believed_in_its_form(content: bytes) -> None:
    """Anyone with push access may attach anything: what is no result is left out."""
    assert [] == provenance.measured(content)
