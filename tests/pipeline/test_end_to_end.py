"""The main job as its users run it: the command line in processes of its own, real parts only."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers
from commands import dockerconfig, good, tuning, workspace
from faults.web import Origin
from peft import AutoPeftModelForCausalLM
from registries import Registry, tool

from tuning import files

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
TINY = EXAMPLES / "tiny-model"


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """A registry that wants a login, and the Secret with the login."""
    folder = tmp_path_factory.mktemp("registry")
    with Registry(folder, users={"me": "s3cret:word"}) as running:
        secret = folder / "dockerconfig.json"
        secret.write_text(json.dumps(dockerconfig(running.host, "me", "s3cret:word")))
        yield running, secret


def snapshot(folder):
    """Names, sizes and times of all files: what a command that does nothing leaves alone."""
    return {
        str(p): (p.stat().st_size, p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file() and p.name != ".lock"
    }


class TestTheDemo:
    """`make demo`: the bundled model learns the bundled rows."""

    @pytest.fixture(scope="class")
    def demo(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("demo")
        command = [
            "run",
            *("-f", EXAMPLES / "workspace-demo.yaml"),
            *("--base-model", TINY),
            *("--data", EXAMPLES / "data" / "demo.jsonl"),
            *("--output", f"oci:{folder / 'image'}"),
            *("--run-dir", folder / "run"),
            *("--ask", "What occupation does Tamsin Vale have?"),
        ]
        return folder, command, good(tuning(*command))

    def test_it_ends_with_eight_lines(self, demo):
        """Loss, speed, share, size, digest, before, after, and how to talk to it."""
        folder, _, said = demo
        lines = said.splitlines()

        names = ["loss", "speed", "trained", "adapter", "image", "before", "after", "talk to it"]
        assert names == [line[:11].strip() for line in lines]
        assert "gardener" in lines[6]
        assert "gardener" not in lines[5]
        assert f"oci:{folder / 'image'}@sha256:" in lines[4]

    def test_the_pulled_adapter_knows_what_was_taught(self, demo, tmp_path):
        """Of 20 questions in other words the base answers at most 2, the tuned one at least 15."""
        folder, _, _ = demo
        good(tuning("pull", f"oci:{folder / 'image'}", tmp_path / "adapter"))

        questions = EXAMPLES / "data" / "demo-questions.jsonl"
        command = ("eval", "--base", TINY, "--adapter", tmp_path / "adapter")
        record = json.loads(good(tuning(*command, "--tasks", questions, "--json")))

        (task,) = record["tasks"]
        models = task["models"]
        assert 20 == task["samples"]
        assert models["base"]["value"] <= 2 / 20
        assert models["tuned"]["value"] >= 15 / 20
        assert models["base"]["high"] < models["tuned"]["low"]  # beyond chance

    def test_peft_and_transformers_load_the_adapter_folder(self, demo):
        """AutoPeftModelForCausalLM and pipeline find the local base; no path is in the image."""
        folder, _, _ = demo
        adapter = str(folder / "run" / "adapter")
        question = [{"role": "user", "content": "What occupation does Tamsin Vale have?"}]

        tuned = AutoPeftModelForCausalLM.from_pretrained(adapter)
        answer = transformers.pipeline("text-generation", adapter)(
            question, max_new_tokens=20, do_sample=False
        )

        assert "lora" == tuned.peft_config["default"].peft_type.value.lower()
        assert "gardener" in answer[0]["generated_text"][-1]["content"]
        path = str(TINY.resolve()).encode()
        blobs = [p for p in (folder / "image").rglob("*") if p.is_file()]
        assert not [blob for blob in blobs if path in blob.read_bytes()]

    def test_the_same_command_again_does_nothing(self, demo):
        """The same digest, no file touched but the journal's lock."""
        folder, command, said = demo
        before = snapshot(folder)

        again = tuning(*command)

        assert said == good(again)
        assert before == snapshot(folder)
        assert "Already finished" in again.stderr

    def test_chat_shows_base_and_tuned_side_by_side(self, demo):
        """The command that the summary prints works as printed."""
        _, _, said = demo
        words = said.splitlines()[-1].removeprefix("talk to it").split()

        done = tuning(*words[3:], "--question", "What occupation does Tamsin Vale have?")

        base, tuned = good(done).splitlines()[1:]
        assert base.startswith("  base: ")
        assert "gardener" in tuned
        assert "gardener" not in base


class TestRealInput:
    """Rows of docstrings by HTTP, a registry with a login, skopeo as the reader."""

    def test_from_a_download_link_to_a_pulled_adapter(self, tmp_path, registry):
        """Parquet behind `?download=true` -> trained -> pushed -> pulled by skopeo -> generates."""
        running, secret = registry
        rows = tmp_path / "docstrings.parquet"
        make = EXAMPLES / "data" / "make_docstrings.py"
        subprocess.run([sys.executable, make, "--out", rows, "--rows", "3000"], check=True)
        image = f"{running.host}/team/docstrings:v1"
        with Origin() as web:
            link = web.serve("/docstrings.parquet", rows.read_bytes()) + "?download=true"
            job = workspace(
                tmp_path / "docstrings.yaml",
                input={"urls": [link]},
                output={"image": image, "imagePushSecret": "push"},
            )
            done = tuning(
                *("run", "-f", job, "--base-model", TINY, "--run-dir", tmp_path / "run"),
                *("--push-secret", secret, "--allow-host", "127.0.0.1", "--json"),
            )
        summary = json.loads(good(done))

        copy = [
            tool("skopeo"),
            "copy",
            "-q",
            "--preserve-digests",
            "--src-tls-verify=false",
            "--src-creds=me:s3cret:word",
        ]
        layout = f"oci:{tmp_path / 'copied'}:v1"
        subprocess.run([*copy, f"docker://{image}", layout], check=True)
        good(tuning("pull", f"oci:{tmp_path / 'copied'}", tmp_path / "adapter"))
        said = tuning(
            *("chat", "--base", TINY, "--adapter", tmp_path / "adapter"),
            *("--question", "What does functools.reduce do?", "--max-tokens", 12),
        )

        assert "3,000 rows" in done.stderr
        assert "s3cret" not in done.stdout + done.stderr
        index = files.read_json(tmp_path / "copied" / "index.json")
        assert summary["digest"] == index["manifests"][0]["digest"]
        assert 4 == summary["training"]["steps"]
        assert good(said).strip()

    def test_a_tag_is_welcome_if_it_holds_this_run_and_else_refused_before_training(
        self, tmp_path, registry
    ):
        """Of the same recipe nothing is trained again; of another exit 12, with what is there."""
        running, secret = registry
        image = f"{running.host}/team/same:v1"
        here = json.loads(good(push_tiny(tmp_path / "here", image, secret, seed=3)))

        second = push_tiny(tmp_path / "there", image, secret, seed=3)

        there = json.loads(good(second))
        assert "Nothing is trained" in second.stderr
        assert (here["digest"], here["run_id"]) == (there["digest"], there["run_id"])
        assert not (tmp_path / "there" / "run" / "checkpoints").exists()
        files_of = [
            {p.name: p.read_bytes() for p in (tmp_path / name / "run" / "adapter").iterdir()}
            for name in ("here", "there")
        ]
        assert files_of[0] == files_of[1]

        other = push_tiny(tmp_path / "other", image, secret, seed=2)

        assert 12 == other.returncode
        assert here["digest"] in other.stderr
        assert "on-tag-exists: overwrite" in other.stderr
        assert not (tmp_path / "other" / "run" / "adapter").exists()


def push_tiny(folder, image, secret, *, seed):
    """A run of four steps on the bundled rows, pushed to `image`."""
    folder.mkdir()
    job = workspace(
        folder / "job.yaml",
        settings={"seed": seed},
        output={"image": image, "imagePushSecret": "push"},
    )
    return tuning(
        *("run", "-f", job, "--base-model", TINY, "--data", EXAMPLES / "data" / "demo.jsonl"),
        *("--run-dir", folder / "run", "--push-secret", secret, "--json"),
    )


class TestTheQuickStart:
    """KAITO's published Workspace, as it is printed in its documentation."""

    YAML = EXAMPLES / "workspace-tuning-phi-3.yaml"

    def test_as_published_it_says_what_to_fill_in(self, tmp_path):
        """Each placeholder is named; nothing is made."""
        done = tuning("run", "-f", self.YAML, cwd=tmp_path)

        assert 11 == done.returncode
        for placeholder in ("ACR_REPO_HERE", "IMAGE_NAME_HERE", "ACR_REGISTRY_SECRET_HERE"):
            assert placeholder in done.stderr
        assert [] == list(tmp_path.iterdir())

    def test_filled_in_it_runs_with_a_small_base(self, tmp_path, registry, tiny_base):
        """Only a tiny Phi-3 base and the data are given on the command line."""
        running, secret = registry
        filled = (
            self.YAML.read_text()
            .replace("ACR_REPO_HERE.azurecr.io", running.host)
            .replace("IMAGE_NAME_HERE", "phi-3-adapter")
            .replace("ACR_REGISTRY_SECRET_HERE", "push")
        )
        (tmp_path / "filled.yaml").write_text(filled)
        rows = tmp_path / "rows.jsonl"
        with (EXAMPLES / "data" / "demo.jsonl").open() as all_rows:
            rows.write_text("".join(line for line, _ in zip(all_rows, range(64), strict=False)))

        base = tiny_base("phi3")
        done = tuning(
            *("run", "-f", tmp_path / "filled.yaml", "--base-model", base),
            *("--data", rows, "--run-dir", tmp_path / "run", "--push-secret", secret, "--json"),
        )

        summary = json.loads(good(done))
        assert [f"{running.host}/phi-3-adapter:0.0.1"] == summary["references"]
        recipe = files.read_json(tmp_path / "run" / "plan.json")["recipe"]
        assert ("qlora", "nf4") == (recipe["method"], recipe["quantisation"]["type"])
        names = summary["training"]["covered"]["names"]
        assert ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"] == names
        config = files.read_json(tmp_path / "run" / "adapter" / "adapter_config.json")
        assert str(base) == config["base_model_name_or_path"]  # which PEFT can load


class TestStopping:
    """A run that is told to stop, and told to go on."""

    def test_sigterm_saves_and_the_same_command_ends_in_the_same_adapter(self, tmp_path):
        """Exit 75 in mid-training; the resumed run gives the digest of an undisturbed one."""
        arguments = ["--base-model", TINY, "--data", EXAMPLES / "data" / "demo.jsonl", "--json"]
        settings = {"max_steps": 60}
        job = workspace(tmp_path / "job.yaml", settings=settings)
        whole = tuning(
            *("run", "-f", job, *arguments, "--run-dir", tmp_path / "whole"),
            *("--output", f"oci:{tmp_path / 'image-a'}"),
        )
        command = [sys.executable, "-m", "tuning", "run", "-f", job, *arguments]
        command += ["--run-dir", tmp_path / "run", "--output", f"oci:{tmp_path / 'image-b'}"]
        process = subprocess.Popen(
            list(map(str, command)), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 200
        while not (metrics.exists() and metrics.read_text().count("\n") >= 5):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)

        resumed = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=280
        )

        assert 75 == process.returncode, said
        assert "run the same command again" in said
        first, second = json.loads(good(whole)), json.loads(good(resumed))
        assert second["training"]["resumed_from"] >= 5
        assert first["digest"] == second["digest"]


WRONG = {
    "a missing file": (["run", "-f", "absent.yaml"], 11, "absent.yaml"),
    "bad YAML": (["run", "-f", "broken.yaml"], 11, "broken.yaml"),
    "an unknown preset": (["run", "-f", "preset.yaml"], 11, "phi-3-mini"),
    "a wrong method": (["run", "-f", "method.yaml"], 11, "lora"),
    "no GPU for a model that needs one": (["run", "-f", "large.yaml"], 11, "needs a GPU"),
    "missing data": (["run", "-f", "job.yaml", "--data", "absent.jsonl"], 10, "absent.jsonl"),
    "a base without safetensors": (
        ["run", "-f", "job.yaml", "--base-model", "hollow"],
        11,
        "safetensors",
    ),
    "a registry that is down": (
        ["run", "-f", "job.yaml", "--output", "127.0.0.1:9/a:1"],
        20,
        "Connection refused",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_clear_line(case, tmp_path):
    """What is wrong and what to change, the right exit code, no traceback, nothing half-written."""
    arguments, code, text = WRONG[case]
    workspace(tmp_path / "job.yaml")
    workspace(tmp_path / "preset.yaml", preset={"name": "phi-3-mini-instructt"})
    workspace(tmp_path / "method.yaml", method="lorra")
    workspace(tmp_path / "large.yaml", preset={"name": "phi-3-mini-4k-instruct"})
    (tmp_path / "broken.yaml").write_text("kind: [Workspace\n")
    hollow = tmp_path / "hollow"
    shutil.copytree(TINY, hollow, ignore=shutil.ignore_patterns("*.safetensors", "*.py", "*.md"))
    defaults = {"--base-model": TINY, "--data": EXAMPLES / "data" / "demo.jsonl"}
    if "large.yaml" in arguments:
        defaults.pop("--base-model")
    for flag, value in defaults.items():
        if flag not in arguments:
            arguments = [*arguments, flag, value]
    if "--output" not in arguments:
        arguments = [*arguments, "--output", f"oci:{tmp_path / 'image'}"]

    done = tuning(*arguments, "--run-dir", tmp_path / "run", cwd=tmp_path, env=no_gpu())

    assert (code, "") == (done.returncode, done.stdout), done.stderr
    assert text in done.stderr
    assert "Change: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "image").exists()


def no_gpu():
    """The environment of a machine without a GPU."""
    return os.environ | {"CUDA_VISIBLE_DEVICES": ""}


def test_check_tells_what_is_good_and_what_is_not(tmp_path, registry):
    """Model, data and push rights in seconds; a wrong login names the file, not the value."""
    running, secret = registry
    job = workspace(
        tmp_path / "job.yaml",
        output={"image": f"{running.host}/team/checked:1", "imagePushSecret": "push"},
    )
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps(dockerconfig(running.host, "me", "canary-7")))
    arguments = ["-f", job, "--base-model", TINY, "--data", EXAMPLES / "data" / "demo.jsonl"]

    said = good(tuning("check", *arguments, "--push-secret", secret))
    refused = tuning("check", *arguments, "--push-secret", wrong)

    assert ["model", "weights", "plan", "data", "destination"] == [
        line.partition(":")[0] for line in said.splitlines()
    ]
    assert 12 == refused.returncode
    assert "wrong.json" in refused.stderr
    assert "canary" not in refused.stderr
