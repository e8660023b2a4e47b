"""The command line as its users meet it: exit codes, one clear line, nothing heavy at start."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from commands import tuning

WORKSPACE = """\
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: cli}
resource:
  instanceType: Standard_NC24ads_A100_v4
  labelSelector: {matchLabels: {apps: cli}}
tuning:
  preset: {name: phi-3-mini-128k-instruct}
  method: qlora
  input: {urls: ["https://data.example.com/rows.jsonl"]}
  output: {image: "registry.example.com/cli:1", imagePushSecret: push}
"""
HEAVY = ("torch", "transformers", "trl", "peft", "datasets")


@pytest.fixture
def workspace(tmp_path):
    path = tmp_path / "workspace.yaml"
    path.write_text(WORKSPACE)
    return path


@pytest.mark.parametrize(
    "arguments", [["--help"], ["presets"], ["plan", "-f", "FILE"], ["presets", "--instances"]]
)
def test_what_needs_no_model_loads_no_torch(arguments, workspace):
    """Help, presets and plan leave torch and its company unloaded, in a fresh interpreter."""
    words = [str(workspace) if word == "FILE" else word for word in arguments]
    code = (
        "import sys\n"
        f"sys.argv = ['tuning', *{words!r}]\n"
        "from tuning.cli import main\n"
        "status = main()\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "print(loaded, status, file=sys.stderr)\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert "[] 0" == done.stderr.strip().splitlines()[-1]


def test_an_argument_that_is_not_utf_8_is_a_question_of_the_command_line():
    """Whichever it is: it would fail later, in a file that has to be UTF-8."""
    done = tuning("run", "examples/tiny-model", "x.csv", "-o", "oci:x", "--ask", "a\udcff")

    assert 2 == done.returncode
    assert "USE-111 a\\udcff: is not UTF-8" in done.stderr


def test_the_plan_names_each_number_and_its_reason(workspace):
    """The table says what and why, for the machine that the file names."""
    done = tuning("plan", "-f", workspace)

    assert 0 == done.returncode
    assert "Phi-3-mini-128k-instruct on A100" in done.stdout
    assert "twice the rank" in done.stdout


def test_the_plan_as_json_is_a_whole_recipe(workspace):
    """A program gets the same recipe, and null for what only the data can tell."""
    record = json.loads(tuning("plan", "-f", workspace, "--json").stdout)

    assert ("bfloat16", 16, None) == (
        record["recipe"]["precision"],
        record["recipe"]["rank"],
        record["run_id"],
    )
    assert "Standard_NC24ads_A100_v4" == record["device"]["origin"]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["plan", "-f", "absent.yaml"], 11, "absent.yaml"),
        (["plan"], 2, "-f FILE"),
        (["plan", "-f", "FILE", "--sideways"], 2, "No such option: --sideways"),
        (["dance"], 2, "No such command 'dance'"),
        (["plan", "-f", "FILE", "--instance", "Standard_NC6s_v33"], 11, "Standard_NC6s_v3"),
        (["presets", "phi-33"], 11, "phi-3"),
    ],
)
def test_a_wrong_command_line_gets_one_clear_line(arguments, code, text, workspace):
    """Exit code of the table, what is wrong and a remedy, no traceback, nothing on stdout."""
    words = [workspace if word == "FILE" else word for word in arguments]

    done = tuning(*words, cwd=workspace.parent)

    assert (code, "") == (done.returncode, done.stdout)
    assert text in done.stderr
    assert "Change: " in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_is_no_success(tmp_path):
    """Whoever types `pull ... && deploy` and thinks better of it does not deploy."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        asked = [sys.executable, "-m", "tuning", "pull", f"127.0.0.1:{silent.getsockname()[1]}/a:1"]
        process = subprocess.Popen(
            [*asked, str(tmp_path / "x")],
            stderr=subprocess.DEVNULL,
            # a shell starts jobs in the background with SIGINT ignored, and children inherit that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        with silent.accept()[0]:
            process.send_signal(signal.SIGINT)

            assert 75 == process.wait(30)


def test_presets_are_listed_for_programs():
    """--json holds names, hub ids and what is supported."""
    records = {r["name"]: r for r in json.loads(tuning("presets", "--json").stdout)}

    assert "microsoft/phi-4" == records["phi-4"]["hub"]
    assert ["lora", "qlora"] == records["phi-4"]["methods"]
    assert ["lora", "qlora"] == records["gpt-oss-20b"]["methods"]


def test_the_built_wheel_works_outside_the_checkout(tmp_path, workspace):
    """configs/ travels in the wheel: presets and plan work where there is no checkout."""
    root = Path(__file__).parents[2]
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, root]
    subprocess.run(build, check=True, capture_output=True, timeout=240)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run([sys.executable, *install], check=True, timeout=240)
    code = (
        "import sys; import tuning; from tuning.cli import main\n"
        f"assert tuning.__file__.startswith({str(site)!r}), tuning.__file__\n"
        f"sys.argv = ['tuning', 'plan', '-f', {str(workspace)!r}]; sys.exit(main())"
    )

    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r})\n{code}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )

    assert (0, "") == (done.returncode, done.stderr)
    assert "Phi-3-mini-128k-instruct" in done.stdout
