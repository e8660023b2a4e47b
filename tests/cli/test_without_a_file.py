"""The command line without a YAML, and the commands that write one."""

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from commands import good, tuning

from tuning import spec
from tuning.spec import keys

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny-model"
IMPORTS = sorted((ROOT / "tests" / "fixtures" / "imports").glob("*.y*ml"))
SHORT = ("--set", "max_steps=2", "--set", "learning_rate=1e-3")
COMMANDS = ("run", "plan", "check", "preview")


@pytest.fixture
def rows(tmp_path):
    """A file of short conversations."""
    turns = [
        {
            "messages": [
                {"role": "user", "content": f"{n}?"},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for n in range(8)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in turns))
    return path


def test_one_line_ends_in_an_image_that_a_second_delivers(rows, tmp_path):
    """No YAML, no output: the image is in the run directory; then -o sends it elsewhere."""
    command = ("run", TINY, "rows.jsonl", *SHORT)
    first = good(tuning(*command, cwd=tmp_path))
    (run,) = (tmp_path / "runs").iterdir()
    second = good(tuning(*command, "-o", "oci:out", "--json", cwd=tmp_path))

    assert run.name.startswith("tiny-model-rows-")
    assert f"oci:runs/{run.name}/image@sha256:" in first
    assert "the same command with -o" in first
    held = json.loads((tmp_path / "out" / "index.json").read_bytes())
    assert held == json.loads((run / "image" / "index.json").read_bytes())
    assert ["oci:out"] == json.loads(second)["references"]
    trained = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    assert 1 == sum(("train", "end") == (each["phase"], each["event"]) for each in trained)


def test_the_run_directory_shows_the_workspace_that_was_meant(rows, tmp_path):
    """Its spec.yaml is accepted by -f, which says of it what the one line says."""
    good(tuning("run", TINY, rows, *SHORT, cwd=tmp_path))
    (written,) = (tmp_path / "runs").glob("*/spec.yaml")

    plans = [
        json.loads(good(tuning("plan", *words, "--json", cwd=tmp_path)))
        for words in ((TINY, rows, *SHORT), ("-f", written))
    ]
    assert plans[0]["recipe"] == plans[1]["recipe"]
    assert 2 == plans[0]["recipe"]["steps"]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_wants_a_model_or_a_file(command, tmp_path):
    """The remedy names both."""
    done = tuning(command, cwd=tmp_path)

    assert (2, "") == (done.returncode, done.stdout)
    assert "USE-105: there is neither MODEL and DATA nor -f FILE" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], "USE-105", "neither MODEL and DATA nor -f FILE"),
        (["org/model", "-f", "w.yaml"], "USE-105", "leave out -f, or give --base-model"),
        (["org/model", "rows.jsonl", "--data", "x"], "USE-105", "in place of MODEL or DATA"),
        (["./gone", "rows.jsonl"], "SPEC-124", "is no folder here"),
        (["org/model", "gone.jsonl"], "SPEC-124", "neither a file or folder here"),
        (["org/model", "rows.jsonl", "--set", "lr=1"], "SPEC-111", "use --set learning_rate=VALUE"),
        (["org/model", "rows.jsonl", "--method", "dora"], "SPEC-104", 'use "lora" or "qlora"'),
        (["org/model", "rows.jsonl", "-o", "sftp:out"], "SPEC-109", "is no kind of place"),
        (["org/model", "rows.jsonl", "-o", "./out"], "SPEC-109", "write dir:./out"),
    ],
)
def test_a_mistake_is_one_line_and_one_object(words, code, said, rows, tmp_path):
    """On stderr for people; with --json on stdout for programs, with the exit code."""
    done = tuning("plan", *words, "--json", cwd=tmp_path)
    error = json.loads(done.stdout)["error"]
    (problem,) = error["problems"]

    assert (done.returncode, code) == (error["exit_code"], problem["code"])
    assert (2 if code.startswith("USE") else 11) == done.returncode
    assert said in f"{problem['message']} {problem['hint']}"
    assert said in done.stderr


@pytest.mark.parametrize("command", ["run", "check", "preview"])
def test_data_is_wanted_where_it_is_read(command, tmp_path):
    """`plan` alone does without."""
    done = tuning(command, TINY, cwd=tmp_path)

    assert (2, "") == (done.returncode, done.stdout)
    assert "there is a MODEL, but no DATA" in done.stderr
    assert "tiny-model" in good(tuning("plan", TINY, cwd=tmp_path))


def test_a_setting_that_is_ignored_is_said_in_the_table(tmp_path):
    """Offloading is for GPUs: on a CPU its row says so."""
    asked = ("--set", "activation_offloading=true")
    said = good(tuning("plan", TINY, *asked, cwd=tmp_path, env=os.environ | {"COLUMNS": "160"}))
    assert re.search(r"activation offloading +off +ignored: it is for GPUs", said)


def test_no_command_is_a_question_not_a_mistake():
    """Help on stdout; the version by the option that everybody tries."""
    assert good(tuning()) == good(tuning("--help"))
    assert good(tuning("--version")) == good(tuning("version"))
    assert (
        good(tuning("--version")).strip()
        == json.loads(good(tuning("version", "--json")))["version"]
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_printed_and_answered(shell):
    """The script names the variable on which the command line answers it."""
    script = good(tuning("completion", shell))
    assert "_TUNING_COMPLETE" in script
    asked = {"_TUNING_COMPLETE": f"complete_{shell}", "COMP_WORDS": "tuning pre", "COMP_CWORD": "1"}
    asked |= {"_TYPER_COMPLETE_ARGS": "tuning pre", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    answer = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.argv[0] = 'tuning'; from tuning.cli import main; sys.exit(main())",
        ],
        capture_output=True,
        text=True,
        env=os.environ | asked,
    ).stdout
    assert "presets" in answer
    assert "merge" not in answer


def test_logins_come_from_the_environment_as_paths(rows, tmp_path):
    """As if the option had been given; an option wins; an empty variable is none."""
    absent = os.environ | {"TUNING_PUSH_SECRET": str(tmp_path / "absent"), "TUNING_CA": ""}
    words = ("check", TINY, rows, "-o", "registry.example.com/a:1", "--json")
    done = tuning(*words, cwd=tmp_path, env=absent)
    by_option = tuning(*words, "--push-secret", rows, cwd=tmp_path, env=absent)

    assert str(tmp_path / "absent") in done.stderr
    assert str(tmp_path / "absent") not in by_option.stderr
    assert str(rows) in by_option.stderr


def test_init_asks_again_after_an_answer_that_no_document_can_have(rows, tmp_path):
    """On a terminal; the error names the option, and what has been answered stays."""
    master, terminal = pty.openpty()
    command = [sys.executable, "-m", "tuning", "init"]
    asked = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, cwd=tmp_path
    )
    os.close(terminal)
    answers = ["qwen3-9b", "qwen3-8b", "absent.jsonl", "rows.jsonl", "Nowhere:x", "oci:here"]
    said = ""
    for answer in answers:
        while not said.endswith(": "):
            said += os.read(master, 4096).decode()
        os.write(master, f"{answer}\n".encode())
        said = said[:-1]
    with contextlib.suppress(OSError):  # the other end of a terminal is gone
        while more := os.read(master, 4096).decode():
            said += more
    os.close(master)

    assert 0 == asked.wait(), said
    for problem in ("SPEC-302 --model: ", "SPEC-124 --data: ", "SPEC-109 --where: "):
        assert 1 == said.count(problem)
    text = (tmp_path / "workspace.yaml").read_text()
    assert "name: qwen3-8b" in text and "rows.jsonl" in text and "oci:here" in text


def test_init_writes_what_plan_accepts_and_overwrites_nothing(rows, tmp_path):
    """Without a terminal each question is an option; paths are seen from the file."""
    (tmp_path / "sub").mkdir()
    words = ("init", "-o", "sub/w.yaml", "--model", TINY, "--data", "rows.jsonl")
    assert "sub/w.yaml\n" == good(tuning(*words, cwd=tmp_path, stdin=subprocess.DEVNULL))
    text = (tmp_path / "sub" / "w.yaml").read_text()

    assert "# This machine: " in text
    good(tuning("check", "-f", "sub/w.yaml", cwd=tmp_path))
    again = tuning(*words, cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert (2, text) == (again.returncode, (tmp_path / "sub" / "w.yaml").read_text())
    assert "USE-107" in again.stderr
    unasked = tuning("init", "--model", TINY, cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert (2, True) == (unasked.returncode, "USE-106 --data" in unasked.stderr)
    assert not (tmp_path / "workspace.yaml").exists()


@pytest.mark.parametrize("path", IMPORTS, ids=lambda path: path.stem)
def test_a_peers_config_becomes_a_workspace(path, tmp_path):
    """Each key that is set is written or noted; the result is a spec, and what it says is kept."""
    done = tuning("import", path, "-o", "w.yaml", cwd=tmp_path)
    good(done)
    actual = spec.load(tmp_path / "w.yaml")
    given = {k: v for k, v in yaml.safe_load(path.read_text()).items() if v not in (None, "")}
    table = keys.data(f"imports/{path.stem.partition('-')[0]}.yaml")["keys"]
    notes = "".join(line for line in done.stderr.splitlines(keepends=True) if "note: " in line)

    for name in given.keys() - {"datasets", "dataset"}:
        row = table.get(name, {})
        written = "to" in row or None in row.get("values", {}).values()
        assert written or f"note: {name}: " in notes, name
    head = (tmp_path / "w.yaml").read_text()
    assert all(f"# {line.removeprefix('note: ')}" in head for line in notes.splitlines())
    assert given["learning_rate"] == actual.settings.learning_rate
    assert ("qlora" if "qlora" in path.stem else "lora") == actual.method
    assert given.get("sequence_len", given.get("cutoff_len")) == actual.settings.max_length


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("a: 1", "is no config of axolotl"),
        ("[]", "is no config of axolotl"),
        ("", "is no config of axolotl"),
        ("{base_model: a/b, datasets: [{path: a/b}], adapter: ia3}", "use lora, qlora"),
        ("{base_model: a/b, datasets: [{type: alpaca}]}", "datasets[0]: has no path"),
        ("{model_name_or_path: a/b, stage: ppo, dataset: x}", "stage: is"),
        ("{model_name_or_path: a/b, dataset: x}", "dataset_info.json"),
        ("{model_name_or_path: a/b}", "names no data"),
    ],
)
def test_what_cannot_be_meant_here_stops_the_translation(config, said, tmp_path):
    """With the key's own name and a remedy; nothing is written."""
    (tmp_path / "c.yml").write_text(config)
    done = tuning("import", "c.yml", "-o", "w.yaml", cwd=tmp_path)

    assert (11, False) == (done.returncode, (tmp_path / "w.yaml").exists())
    assert "SPEC-125" in done.stderr
    assert said in done.stderr


def test_every_target_of_the_tables_is_a_key():
    """A row writes a model, a method, or a key that has an effect."""
    known = {
        f"{key.section}.{key.name}"
        for rows in keys.sections().values()
        for key in rows.values()
        if key.setting
    }
    for peer in ("axolotl", "llamafactory"):
        table = keys.data(f"imports/{peer}.yaml")
        rows = table["keys"] | table.get("datasets", {}).get("keys", {})
        for name, row in rows.items():
            targets = {*filter(None, [row.get("to")]), *row.get("also", {})}
            assert targets <= known | {"model", "method"}, name
            assert targets or "drop" in row or "values" in row, name


def test_schemas_describe_what_the_commands_read_and_write(tmp_path):
    """A Workspace, its settings, a plan."""
    named = {
        each: json.loads(good(tuning("schema", each))) for each in ("workspace", "config", "plan")
    }
    documents = list(yaml.safe_load_all((ROOT / "examples" / "workspace-demo.yaml").read_text()))
    for document in documents:
        jsonschema.validate(document, named["workspace"])
    settings = {"LoraConfig": {"r": 8}, "TrainingArguments": {"max_steps": -1, "packing": True}}
    jsonschema.validate({"training_config": settings}, named["config"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"training_config": {"LoraConfig": {"rank": 8}}}, named["config"])
    jsonschema.validate(json.loads(good(tuning("plan", TINY, "--json"))), named["plan"])
