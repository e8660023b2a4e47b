"""The wheel alone, with the dependencies of the base install, far from the checkout: each command
works, or says which extra it needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from tuning.cli.app import app

ROOT = Path(__file__).parents[1]
MODEL, DATA = "tiny-model", "data/demo.jsonl"
HERE = [MODEL, DATA, "--output", "oci:image", "--run-dir", "run"]
# Arguments, exit code, and what is in the output: of every command at least one.
CASES: list[tuple[list[str], int, str]] = [
    (["--version"], 0, "0."),
    (["version", "--verbose"], 0, "torch is not installed"),
    (["presets"], 0, "phi-4"),
    (["presets", "--instances"], 0, "H100-SXM5"),
    (["schema"], 0, '"$defs"'),
    (["schema", "plan"], 0, '"$defs"'),
    (["plan", "phi-4", DATA, "--instance", "Standard_NC24ads_A100_v4"], 0, "phi-4"),
    (["plan", "phi-4", DATA], 11, "PLAN-102"),
    (["init", "--yes", "--model", "phi-4", "--data", DATA, "-o", "w.yaml"], 0, "w.yaml"),
    (["plan", "-f", "w.yaml", "--instance", "Standard_NC24ads_A100_v4"], 0, "phi-4"),
    (["import", "axolotl.yaml"], 0, "Workspace"),
    (["completion", "bash"], 0, "_tuning_completion"),
    (["report", "nowhere"], 11, "nowhere"),
    (["pull", "oci:nowhere", "out"], 12, "IMAGE-110"),
    (["inspect", "oci:nowhere"], 12, "IMAGE-110"),
    (["package-model", MODEL, "oci:model"], 0, "oci:model"),
    (["run", *HERE], 2, "needs torch"),
    (["preview", MODEL, DATA], 2, "needs transformers"),
    (["check", MODEL, DATA, "--output", "oci:image"], 2, "needs pyarrow"),
    (["chat", "--base", MODEL], 2, "needs torch"),
    (["serve", "--base", MODEL], 2, "needs torch"),
    (["merge", "--base", MODEL, "--adapter", MODEL, "--output", "oci:out"], 2, "REG-104"),
    (["eval", "--base", MODEL, "--adapter", "a=x", "--tasks", "q.jsonl"], 2, "REG-107"),
    (["export", "gguf", "--base", MODEL, "--adapter", MODEL, "--output", "x"], 2, "needs gguf"),
]
JOBS: list[tuple[list[str], int, str]] = [
    (["crd"], 0, "CustomResourceDefinition"),
    (["render", "-f", "cluster.yaml"], 0, "kind: Job"),
    (["run"], 2, "pip install 'tuning-jobs[cluster]'"),
]


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and beside it some of the examples."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    python = [str(folder / "env/bin/python")]
    subprocess.run([*python, ROOT / "tools/install_locked.py"], check=True)
    (wheel,) = folder.glob("tuning_jobs-*.whl")
    pip = [*python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(pip, check=True)
    shutil.copytree(ROOT / "examples/tiny-model", folder / MODEL)
    shutil.copytree(ROOT / "examples/data", folder / "data")
    text = (ROOT / "examples/workspace-tuning-phi-3.yaml").read_text()
    for name in ("ACR_REPO_HERE", "IMAGE_NAME_HERE", "ACR_REGISTRY_SECRET_HERE"):
        text = text.replace(name, name.lower().replace("_", "-"))
    (folder / "cluster.yaml").write_text(text)
    (folder / "q.jsonl").write_text('{"question": "Who?", "answer": "Wilma"}\n')
    (folder / "axolotl.yaml").write_text(
        "base_model: microsoft/phi-4\nadapter: lora\ndatasets:\n- path: data/demo.jsonl\n"
        "  type: chat_template\n"
    )
    return folder


def said(env: Path, *command: str) -> tuple[int, str]:
    """The exit code, and what is printed on both streams."""
    left_out = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    settings = {key: value for key, value in os.environ.items() if key not in left_out}
    done = subprocess.run(
        [str(env / "env/bin/python"), "-m", *command],
        cwd=env,
        env=settings | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_environment_is_complete_and_has_no_more_than_the_base_install(env: Path) -> None:
    """No torch, no test tools; what is imported is the wheel."""
    assert (0, "No broken requirements found.\n") == said(env, "pip", "check")
    code, listed = said(env, "pip", "list", "--format=freeze")
    names = {line.partition("==")[0].lower() for line in listed.splitlines() if "==" in line}
    assert code == 0 and {"tuning-jobs", "pydantic"} <= names
    assert not {"torch", "transformers", "pytest", "hatchling", "kubernetes"} & names


def test_each_command_works_or_names_the_extra_that_it_needs(env: Path) -> None:
    """In order, for some write what others read. No traceback, and no exit code of a bug."""
    wrong = []
    for package, cases in (("tuning", CASES), ("jobs", JOBS)):
        for arguments, code, word in cases:
            got, text = said(env, package, *arguments)
            missing = "needs" not in word or "pip install 'tuning-jobs[" in text
            if (got, True, True, False) != (code, word in text, missing, "Traceback" in text):
                wrong.append(f"{package} {' '.join(arguments)}: {got} instead of {code}\n{text}")
    assert not wrong, "\n".join(wrong)


def test_no_command_is_left_out() -> None:
    """A new one needs a case here."""
    known = get_command(app).commands  # type: ignore[attr-defined]
    assert set(known) == {words[0] for words, _, _ in CASES if not words[0].startswith("-")}
