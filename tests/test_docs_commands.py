"""Every command of README and pages runs as it stands there, or is listed with what it needs.

A command is a line of an indented or `sh` block, and code in a sentence that begins with a program.
A new command of ours is run without a change here; any other has to be added to `ELSEWHERE`.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main
from fake_hub import FakeHub
from huggingface_hub import constants
from registries import Registry, Signer

from jobs import __main__ as jobs
from tuning import presets
from tuning.cli import app
from tuning.oci import registry, signature
from tuning.oci.layout.manifest import MANIFEST, Blob, read_layout
from tuning.spec import reference

pytestmark = pytest.mark.registry
ROOT = Path(__file__).parents[1]
TINY = "examples/tiny-model"
TUTORIAL = ROOT / "docs/tutorial.md"
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/README.md")]
PAGES = sorted({*PAGES, ROOT / "configs/README.md"} - {ROOT / "CHANGELOG.md"})
PROGRAM = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:tuning|python|pytest|pip|make|kubectl|helm|docker|podman"
    r"|kind|minikube|curl|lm_eval|llama-\w+|ollama|cosign|oras|skopeo|umoci|install|hf|wandb"
    r"|tensorboard|gcloud|aws|az|vllm|git|torchrun) [^=]"
)

# What needs more than this machine, or is what another test runs; none of it may be left over.
ELSEWHERE = {
    r"make demo": "tests/pipeline/test_end_to_end.py::TestTheDemo",
    r"make images .*": "tests/test_build_images.py"
    "::test_the_first_builder_that_works_builds_pushes_and_signs",
    r"make (fix )?docs": "tests/test_documents.py::test_a_generated_file_is_current",
    r"make [a-z -]+( EXTRAS=\S*)?": "packages, or the tests themselves:"
    " tests/test_workflows.py::test_what_they_run_is_what_a_person_runs",
    r"(python -m )?pytest .*": "these tests",
    r"\. \.venv/bin/activate": "a shell to go on in",
    r"pip install .*": "a package index: test_pages_name_what_is_there",
    r"python -m tuning.training.simulate .*": "minutes:"
    " tests/training/test_simulate.py::test_committed_coefficients_are_what_comes_out",
    r"python -m benchmarks.gpu_ladder .*": "tests/test_benchmarks.py"
    "::test_every_ceiling_has_a_number",
    r"python -m benchmarks.\w+ --write": "minutes: tests/test_benchmarks.py"
    "::test_the_page_is_current",
    r"python tools/write_classes.py .*": "tests/test_sweep.py::test_most_classes_train",
    r"python -m tuning.process .*": "tests/test_process.py::test_the_answer_comes_back",
    r"python examples/data/make_demo.py": "tests/test_tiny_model.py"
    "::test_the_data_set_is_what_its_script_makes",
    r"python examples/tiny-model/train_from_scratch.py .*": "16 minutes: tests/test_tiny_model.py"
    "::test_the_script_makes_the_bundled_tokenizer_and_model_class",
    r"tuning run -f examples/workspace-tuning-phi-3.yaml .*": "tests/pipeline/test_end_to_end.py"
    "::TestTheQuickStart",
    r"tuning run .*--nodes .*": "tests/pipeline/test_several_machines.py"
    "::test_two_machines_train_one_shared_model",
    r"tuning run .*--base-model oci:.*": "tests/oci/test_model_image.py"
    "::test_a_run_starts_from_an_image",
    r"tuning preview .* --data more/": "the mixture above it: tests/cli/test_preview.py"
    "::test_a_mixture_of_a_hub_dataset_and_a_local_file_is_counted_part_by_part",
    r"tuning eval .*,hellaswag": "the hub: tests/serve/test_clients.py"
    "::test_eval_gives_what_lm_evals_own_model_gives",
    r"tuning run -f workspace.yaml --set .*": "tests/cli/test_without_a_file.py"
    "::test_one_line_ends_in_an_image_that_a_second_delivers",
    r"tuning run \.\.\. --ask .*": "test_the_tutorial",
    r"tuning eval .*(FILE|questions.jsonl)": "tests/pipeline/test_end_to_end.py::TestTheDemo",
    r"tuning serve .*--api-key-file .*": "tests/serve/test_process.py"
    "::test_every_route_but_health_wants_the_key",
    r"lm_eval .*": "tests/serve/test_clients.py::test_lm_eval_measures_as_transformers_does",
    r"(export VLLM_|vllm serve |curl http.*/v1/completions ).*": "vLLM:"
    " tests/serve/test_vllm.py::test_an_adapter_is_pulled_by_its_image_name",
    r"llama-cli .*": "llama.cpp: tests/models/test_llama_cpp.py"
    "::test_the_demo_answers_as_peft_does",
    r"cd runs/gguf && ollama .*": "Ollama",
    r"kubectl \w+ -k build/deploy": "tests/test_build_images.py"
    "::test_the_kustomization_names_every_image_by_digest",
    r"kubectl \w+ -k configs/deploy\S*": "tests/cluster/test_deploy.py"
    "::test_the_api_server_takes_every_kustomization",
    r"kubectl apply -f (examples/)?workspace\S*.yaml": "tests/cluster/test_rules.py"
    "::test_every_example_comes_in",
    r"kubectl -n argocd .*": "Argo CD: tests/jobs/test_ready.py::test_argo_cd_says_the_same",
    r"(CLUSTERIP=\$\()?kubectl (get svc|run|wait --for=condition=Inf\w+) .*": "a cluster:"
    " tests/cluster/test_serving.py::test_tune_then_serve_then_serve_alone",
    r"kubectl (get|describe|label|patch|wait) .*": "a cluster",
    r"helm install .*": "Helm, a cluster: tests/jobs/test_deploy_clients.py"
    "::test_the_chart_is_what_kustomize_makes",
    r"docker (build|create) .*": "docker",
    r"(kind load|minikube image load).*": "kind, minikube",
    r"skopeo copy .*": "tests/oci/test_readers.py::test_skopeo_copies_and_kaitos_puller_unpacks",
    r"umoci unpack .*": "tests/oci/test_readers.py::test_umoci_unpacks",
    r"cosign .*": "cosign: tests/oci/test_signature.py::test_a_signed_image_is_pulled",
    r"oras discover .*": "oras: tests/oci/test_provenance.py"
    "::test_it_is_attached_by_referrer_and_by_tag",
    r"hf (auth login|models info .*)": "the hub",
    r"(gcloud|aws|az) .*": "a cloud",
    r"tensorboard .*": "tests/trackers/test_clients.py"
    "::test_local_stores_hold_one_curve_of_a_run_that_was_killed_twice",
    r"wandb (login|sync)": "an account",
    r"tuning COMMAND|python -m (tuning|jobs( render)?)|kubectl apply": "the name of a command",
    r"git describe|docker login|helm upgrade|cosign (verify|attest.*)": "the name of a command",
}

HERE = re.compile(
    r"tuning [a-z].*|python -m jobs render .+|kubectl create secret .*|skopeo inspect oci:.*"
    r"|install -m .*|curl .*/chat .*"
)
# What words in capitals stand for, and models and images that only their owners have.
VALUES = {
    "MODEL": TINY, "org/model": TINY, "Qwen/Qwen3-0.6B": TINY, "Qwen/Qwen2.5-7B-Instruct": TINY,
    "DATA": "penguins.csv", "rows.jsonl": "penguins.csv", "IMAGE": "oci:penguins",
    "runs/demo/adapter": "run/adapter", "RUN_DIR": "run",
    "NAME=IMAGE": "penguins=oci:penguins",
    "newcomers=oci:runs/demo-image": "penguins=oci:penguins",
    "CONFIG": "axolotl.yml", "SHELL": "bash", "oci:DIR:latest": "oci:penguins:latest", "PORT": "0",
}  # fmt: skip
OF_COMMAND = {
    "run": {"WHERE": "oci:out"},
    "merge": {"WHERE": "dir:merged"},
    "plan": {"FILE": "policy.yaml"},
    "python": {"FILE": "examples/workspace-tuning-config.yaml"},
    "report": {"DIR": "run"},
    "package-model": {"IMAGE": "oci:base"},
}
# Where the page leaves it to its reader, or the command asks.
MORE = {
    "init": f"--yes --model {TINY} --data penguins.csv --where oci:other -o new.yaml",
    "serve": "--port 0",
    "preview": "--allow-host 127.0.0.1",
    "kubectl": "--dry-run=client -o yaml",
}
PYTHON, RUNS, CLUSTER = "python", "import tuning\n", "from tuning import cluster\n"
SHELL = ("sh", "bash", "console")
GROUP: Any = typer.main.get_command(app)


@cache
def blocks(page: Path) -> list[tuple[str, str]]:
    """The code of a page by language: `sh` of indented lines, `name` of code in a sentence."""
    text = re.sub(r" *\\\n\s*", " ", page.read_text())
    fence = re.compile(r"^ *```(\w*).*\n((?s:.*?))^ *```$", re.M)
    fenced = fence.findall(text)
    text = fence.sub("", text)
    fenced += [("sh", line) for line in re.findall(r"^ {4,}(\S.*)$", text, re.M)]
    text = re.sub(r"^ {4,}\S.*$", "", text, flags=re.M).replace("``", "")
    paragraphs = [each.replace("\n", " ") for each in re.split(r"\n\s*\n", text)]
    return [
        ("name", code) for each in paragraphs for code in re.findall("`([^`]+)`", each)
    ] + fenced


@cache
def commands(page: Path) -> list[tuple[str, str]]:
    """The commands of a page, each once and in one line, as (`sh` or `name`, line)."""
    found = {}
    for language, code in blocks(page):
        for line in code.splitlines():
            line = re.sub(r"(^|\s+)#\s.*", "", line).strip()
            if language in SHELL or (language in ("name", "text") and PROGRAM.match(line)):
                line = re.sub(r"^(\.venv/bin/)?(python -m (?=tuning |pytest ))?", "", line)
                line = re.sub(r" +", " ", line.removeprefix(".venv/bin/").partition(" > ")[0])
                found.setdefault(line, "sh" if language in SHELL else language) if line else None
    return [(language, line) for line, language in found.items()]


def listed(line: str) -> bool:
    return any(re.fullmatch(pattern, line) for pattern in ELSEWHERE)


def arguments(line: str) -> list[str]:
    """What follows `tuning`, as somebody types it who has the tiny model and a few rows."""
    name, *words = shlex.split(line.removeprefix("tuning "))
    values = VALUES | OF_COMMAND.get(name, {})
    return [name, *(values.get(word, word) for word in words)]


def refusal(line: str) -> str:
    """What the command line says of a command before it does anything; nothing if it exists."""
    name, *words = arguments(line)
    try:
        GROUP.commands[name].make_context(name, words)
    except KeyError:
        return "no such command"
    except typer.Exit:
        pass  # --help
    except typer.TyperException as error:
        return str(error)
    return ""


def part(language: str, line: str) -> bool:
    """Whether a sentence names a command, without what it takes."""
    bare = line.removeprefix("tuning ") in ("run", "plan", "check", "preview")
    return language == "name" and (bare or "Missing parameter" in refusal(line))


def taught() -> list[str]:
    """What the tutorial's run says beside model, data and output."""
    line = next(line for _, line in commands(TUTORIAL) if line.startswith("tuning run "))
    return shlex.split(line)[6:]


def do(*words: str) -> str:
    """A command of ours, in this process: what it prints. It ends well, or raises."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert not app(list(words), standalone_mode=False)
    return output.getvalue()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    """What the pages name of the Hugging Face hub."""
    card = b"---\nconfigs:\n- {config_name: en, data_files: en.jsonl}\n---\n"
    rows = (ROOT / "examples/data/demo.jsonl").read_bytes()
    gated = next(each for each in presets.all() if each.name == "llama-3.1-8b-instruct")
    with FakeHub() as server, pytest.MonkeyPatch.context() as patch:
        server.add("datasets/ORG/NAME", {"README.md": card, "en.jsonl": rows}, branch="v1.0")
        server.add(gated.hub_id, ROOT / TINY, gated=True, branch=gated.revision)
        patch.setenv("HF_ENDPOINT", server.url)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hf")))
        yield server


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder in which somebody has followed the tutorial, and what each command printed.

    Its run is the only training of this file: every other run is the same one, sent elsewhere.
    """
    folder, said = tmp_path_factory.mktemp("tutorial"), {}
    (folder / "examples").symlink_to(ROOT / "examples")
    page = TUTORIAL.read_text()
    for name, content in re.findall(r"^```csv file=(\S+)\n(.*?)^```", page, re.M | re.S):
        (folder / name).write_text(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for language, line in commands(TUTORIAL):
            if language == "sh" and line.startswith("tuning "):
                name, *words = shlex.split(line)[1:]
                said[name] = do(name, *words, *(["--run-dir", "run"] if name == "run" else []))
    return folder, said


@pytest.fixture(scope="module")
def pushed(told: tuple[Path, dict[str, str]], started: Registry) -> Path:
    """The same folder; a registry has the adapter, signed by the key that lies there."""
    folder, image = told[0], f"{started.host}/team/adapter:1"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        do("run", TINY, "penguins.csv", "-o", image, "--run-dir", "run", *taught())
    signer = Signer(folder / "signer")
    (folder / "cosign.pub").symlink_to(signer.public)
    blob = Blob(MANIFEST, read_layout(folder / "penguins").digest, 1)
    to, bundle = registry.Remote(reference.parse(image)), signer.bundle(blob.digest)
    registry.attach(to, blob, bundle, media_type=signature.BUNDLE, annotations={})
    return folder


@pytest.fixture
def here(pushed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for a page, with all of that and the files that pages name."""
    for each in pushed.iterdir():
        (tmp_path / each.name).symlink_to(each)
    shutil.copy(pushed / "run" / "spec.yaml", tmp_path / "workspace.yaml")
    prices = next(code for _, code in blocks(ROOT / "docs/kubernetes.md") if "perHour" in code)
    (tmp_path / "policy.yaml").write_text(prices)
    (tmp_path / "key.json").write_text("{}")
    (tmp_path / "axolotl.yml").write_text(
        f"base_model: {TINY}\nadapter: lora\nlora_r: 8\nlora_alpha: 16\nnum_epochs: 1\n"
        "datasets:\n  - path: penguins.csv\n    type: chat_template\noutput_dir: ./out\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Who sings?\n")))
    return tmp_path


def test_the_tutorial(told: tuple[Path, dict[str, str]]) -> None:
    """Its lines in order: own CSV, preview, plan, run, inspect, chat, pull, and the answer."""
    folder, said = told
    assert ["preview", "plan", "run", "inspect", "chat", "pull"] == list(said)
    assert "⟦Fish, squid and krill." in said["preview"]
    assert "after       What do penguins eat? Fish, squid and krill." in said["run"]
    assert "Fish, squid and krill." in said["chat"]
    assert (folder / "penguins-peft" / "adapter_config.json").is_file()


def waiting(page: Path) -> list[str]:
    """The commands of a page that no other test runs."""
    return [
        line
        for language, line in commands(page)
        if not listed(line)
        and not (page == TUTORIAL and language == "sh")
        and not (line.startswith("tuning ") and part(language, line))
        and not line.startswith(("tuning serve", "curl"))
    ]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if waiting(page)], ids=lambda page: page.name
)
def test_the_commands_of_a_page(page: Path, here: Path, hub: FakeHub, started: Registry) -> None:
    """In its order, as they stand there: each ends well."""
    for number, line in enumerate(waiting(page)):
        words = [
            re.sub(r"\bDIR$", f"folder-{number}", word)
            .replace("registry.example.com", started.host)
            .replace("/adapters/", "adapters/")
            .replace("~", str(here))
            for word in arguments(line)
        ]
        words += MORE.get(words[0], "").split()
        if words[0] == "run" or (words[0] == "preview" and "ORG/" not in line):
            words += ["--run-dir", "run", *taught()[: None if words[0] == "run" else -2]]
        if words[0] in ("plan", "run") and words[1].startswith("-") and "-f" not in words:
            words += ["-f", "workspace.yaml"]
        if "-o workspace.yaml" in line:
            (here / "workspace.yaml").unlink()
        with naming(f"{page.name}: {line}"):
            if line.startswith("tuning "):
                do(*words)
            elif words[0] == "python":
                jobs.app(words[3:], standalone_mode=False)
            else:
                subprocess.run(words, check=True, input="hf_good\n", text=True)


@contextlib.contextmanager
def naming(line: str) -> Iterator[None]:
    """An error names the page and its command."""
    try:
        yield
    except BaseException as error:
        error.add_note(line)
        raise


def test_the_server(here: Path) -> None:
    """Its commands are one: it lists base and adapter by name, answers, and stops when asked to."""
    lines = [(lang, line) for page in PAGES for lang, line in commands(page) if not listed(line)]
    served = {
        tuple(arguments(line))
        for lang, line in lines
        if line.startswith("tuning serve ") and not part(lang, line)
    }
    (words,) = served
    command = [sys.executable, "-m", "tuning", *words, *shlex.split(MORE["serve"])]
    with subprocess.Popen(command, cwd=here, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        said: list[str] = []
        while not (said and said[-1].startswith("Ready")):
            said.append(server.stderr.readline())
            assert said[-1], said
        address = re.search(r"http://[\w.:]+", "".join(said))
        assert address is not None
        (asked,) = (line for _, line in lines if line.startswith("curl "))
        asked = asked.replace("http://127.0.0.1:8000", address[0])
        answer = json.loads(subprocess.check_output(["curl", "-sS", *shlex.split(asked)[1:]]))
        with urllib.request.urlopen(f"{address[0]}/v1/models", timeout=60) as models:
            names = [model["id"] for model in json.load(models)["data"]]
        server.terminate()
        server.stderr.read()
    assert ["tiny-model", "penguins", "tuned"] == names
    assert answer["Result"]
    assert server.returncode in (0, -15)


@pytest.mark.parametrize(
    "code",
    [c for page in PAGES for lang, c in blocks(page) if lang == PYTHON and c.startswith(RUNS)],
)
def test_the_lines_of_python(code: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the run of the tutorial. Those for a cluster: tests/cluster/test_from_python.py."""
    words = taught()
    keys = {key: json.loads(value) for key, _, value in (w.partition("=") for w in words) if value}
    code = re.sub(r", settings=\{.*?\}", "", code).replace("rows.csv", "penguins.csv")
    code = code.replace('"oci:adapter"', f'"oci:third", settings={keys}').replace("org/model", TINY)
    code = code.replace("tuning.run(spec", f'tuning.run(spec, run_dir="run", ask={words[-1:]}')
    exec(code, {})

    assert re.search(r"^sha256:[0-9a-f]{64} \(?\d", capsys.readouterr().out, re.M)


def test_every_command_runs_or_says_what_it_needs() -> None:
    """A new one that neither runs here nor is listed is an error, and so is an entry of none."""
    lines = {(page, line): lang for page in PAGES for lang, line in commands(page)}
    wrong = [
        f"{page.name}: {line}" for page, line in lines if not listed(line) and not HERE.match(line)
    ]
    wrong += [key for key in ELSEWHERE if not any(re.fullmatch(key, line) for _, line in lines)]
    for reason in ELSEWHERE.values():
        for file, name in re.findall(r"(tests/\S+\.py)::(\w+)", reason):
            if not re.search(rf"(def|class) {name}\b", (ROOT / file).read_text()):
                wrong.append(f"{file}::{name}")
    for (page, line), language in lines.items():
        if re.match(r"tuning [a-z]", line) and not part(language, line) and refusal(line):
            wrong.append(f"{page.name}: {line}: {refusal(line)}")
    code = [(page, code) for page in PAGES for language, code in blocks(page) if language == PYTHON]
    wrong += [f"{page.name}: {c}" for page, c in code if not c.startswith((RUNS, CLUSTER))]
    assert [] == wrong


def test_pages_name_what_is_there() -> None:
    """Targets of make, files of this tree, and extras of the package."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wrong = []
    lines = [(page, line) for page in PAGES for _, line in commands(page)]
    for page, line in lines:
        words = line.split()
        if words[0] == "make":
            wrong += [line for word in words[1:] if "=" not in word and word not in targets]
        for name in re.findall(r"tuning-jobs\[([\w,]+)\]", line):
            wrong += [line] * (name not in project["optional-dependencies"])
        for name in re.findall(r"(?<!\S)((?:examples|configs|tests|tools)/[\w./-]+)", line):
            wrong += [f"{page.name}: {name}"] * (not (ROOT / name).exists())
    assert [] == wrong
