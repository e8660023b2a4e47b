"""Every command of the README's tables and code blocks runs, or names what is needed to run it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from commands import good, tuning

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TABLE = [
    line for cell in re.findall(r"^\| (`tuning.*?) \|", README, re.M) for line in cell.split("`, `")
]
COMMANDS = [line.strip("`").removeprefix("tuning ") for line in TABLE]
# What the words in capitals stand for. The rows of the demo are too many for a test.
VALUES = {
    "MODEL": "examples/tiny-model",
    "DATA": "rows.jsonl",
    "NAME=IMAGE": "birds=oci:adapter",
    "IMAGE": "oci:adapter",
    "FILE": "questions.jsonl",
    "RUN_DIR": "run",
    "CONFIG": "axolotl.yml",
    "SHELL": "bash",
}
# Where the table leaves the place to its reader, or the command asks.
MORE = {
    "run": "--run-dir run --set max_steps=2",
    "init": "--yes --model examples/tiny-model --data rows.jsonl --where oci:other",
    "serve": "--port 0",
}
WHERE = {"run": "oci:adapter", "merge": "dir:merged"}


def arguments(line: str) -> list[str]:
    """The command as somebody types it who has the tiny model and a few rows."""
    name, *words = shlex.split(line)
    values = VALUES | {"WHERE": WHERE.get(name, ""), "DIR": "peft" if name == "pull" else "gguf"}
    if name == "package-model":
        values["IMAGE"] = "oci:base"
    return [name, *(values.get(word, word) for word in words), *shlex.split(MORE.get(name, ""))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a reader of the README has it: examples, rows, questions, a config of a peer."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "examples", folder / "examples")
    rows = (ROOT / "examples" / "data" / "demo.jsonl").read_text().splitlines()
    (folder / "rows.jsonl").write_text("\n".join(rows[:40]) + "\n")
    question = {"question": "What is Wilma Starling heard playing at concerts?", "answer": "x"}
    (folder / "questions.jsonl").write_text(json.dumps(question) + "\n")
    (folder / "axolotl.yml").write_text(
        "base_model: examples/tiny-model\nadapter: lora\nlora_r: 8\nlora_alpha: 16\nnum_epochs: 1\n"
        "datasets:\n  - path: rows.jsonl\n    type: chat_template\noutput_dir: ./out\n"
    )
    return folder


def test_the_commands_of_the_table(place: Path) -> None:
    """In its order, as it stands there: each ends well and leaves what the table says."""
    assert 15 <= len(COMMANDS)
    waiting = [line for line in COMMANDS if not line.startswith("serve")]
    for line in waiting:
        done = tuning(*arguments(line), cwd=place, input="Who sings?\n")
        assert 0 == done.returncode, f"tuning {line}\n{done.stdout}\n{done.stderr}"
    assert (place / "run" / "report.html").is_file()
    assert (place / "peft" / "adapter_config.json").is_file()
    assert list((place / "merged").glob("*.safetensors"))
    assert list((place / "gguf").glob("*.gguf"))
    assert (place / "workspace.yaml").is_file()


def test_the_server_of_the_table(place: Path) -> None:
    """It lists base and adapter by their names, and stops when it is asked to."""
    (line,) = [line for line in COMMANDS if line.startswith("serve")]
    if not (place / "adapter").exists():
        run = next(line for line in COMMANDS if line.startswith("run"))
        good(tuning(*arguments(run), cwd=place))
    command = [sys.executable, "-m", "tuning", *arguments(line)]
    with subprocess.Popen(command, cwd=place, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        told: list[str] = []
        while not (told and told[-1].startswith("Ready")):
            line = server.stderr.readline()
            assert line, told
            told.append(line)
        address = re.search(r"http://[\w.:]+", "".join(told))
        assert address is not None
        with urllib.request.urlopen(f"{address[0]}/v1/models", timeout=60) as answer:
            names = [model["id"] for model in json.load(answer)["data"]]
        server.terminate()
        server.stderr.read()
    assert ["tiny-model", "birds", "tuned"] == names
    assert server.returncode in (0, -15)


def test_the_lines_of_python(place: Path) -> None:
    """README's "In Python", with the tiny model."""
    _, section = README.split("## In Python")
    code = "\n".join(re.findall(r"^    (.*)$", section.split("[The functions")[0], re.M))
    code = code.replace("org/model", "examples/tiny-model").replace("rows.csv", "rows.jsonl")
    code = code.replace('output="oci:adapter"', 'output="oci:third", settings={"max_steps": 2}')
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=280)

    assert 0 == done.returncode, done.stderr
    assert re.search(r"^sha256:[0-9a-f]{64} \(2, \d", done.stdout, re.M), done.stdout


def test_make_and_kubectl_name_what_is_there() -> None:
    """Targets of the Makefile and files of this tree, in README and in every page."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    wrong = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        text = page.read_text()
        for words in re.findall(
            r"(?:^    |`)make ([a-z][a-z -]*[a-z])(?=`|  |$| [A-Z_]+=)", text, re.M
        ):
            wrong += [f"{page.name}: make {word}" for word in words.split() if word not in targets]
        for name in re.findall(r"kubectl (?:apply|create|delete) -[fk] ([\w/.-]+\w)", text):
            built = name.startswith(("build/", "http", "/")) or name == "workspace.yaml"
            if not built and not re.search(r"[A-Z]", name) and not (ROOT / name).exists():
                wrong.append(f"{page.name}: {name}")
    assert [] == wrong
