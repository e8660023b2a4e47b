"""Clients as they are published, against a real server: make test-clients.

They are installed once into ~/.cache (2 GB; from PyPI and npm), each run unchanged.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import servers
import torch
from commands import good, tuning, workspace
from servers import Server

from tuning.models.load import load_base, load_tokenizer

pytestmark = [pytest.mark.clients, pytest.mark.timeout(1800)]
HERE, TINY = Path(__file__).parent / "clients", Path("examples/tiny-model").resolve()
NODE_VERSION = "6.49.0"  # of the package openai


@pytest.fixture(scope="module")
def home() -> Path:
    """Where the clients are installed."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tuning-clients"
    wanted = (HERE / "requirements.txt").read_text() + NODE_VERSION
    done = home / "done"
    if not done.exists() or done.read_text() != wanted:
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        python = str(home / "bin" / "python")
        torch_first = ["tools/install_torch.py", torch.__version__.partition("+")[0], "cpu"]
        subprocess.run([python, *torch_first], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", f"torch=={torch.__version__}"]
        subprocess.run([*pip, "-r", str(HERE / "requirements.txt")], check=True)
        (home / "node").mkdir()
        npm = ["npm", "install", "--silent", f"openai@{NODE_VERSION}"]
        subprocess.run(npm, cwd=home / "node", check=True)
        done.write_text(wanted)
    return home


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with servers.serving(folder, "--base", str(TINY), "--base-name", "tiny") as running:
        yield running


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's adapter after ten steps."""
    folder = tmp_path_factory.mktemp("tuned")
    file = workspace(folder / "demo.yaml", settings={"max_steps": 10, "learning_rate": 0.01})
    data = TINY.parent / "data" / "demo.jsonl"
    command = ("run", "-f", file, "--base-model", TINY, "--data", data)
    good(tuning(*command, "--output", f"oci:{folder / 'image'}", "--run-dir", folder / "run"))
    return folder / "run" / "adapter"


def run(home: Path, folder: Path, *arguments: str, **more: str) -> str:
    """What a client of the environment prints; its exit code is 0."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HOME": str(folder),
        "OPENAI_API_KEY": "none",
    }
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(home / "bin" / "python"), *arguments],
        cwd=folder,
        env=environment | more,
        capture_output=True,
        text=True,
        check=False,
    )
    assert 0 == done.returncode, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def test_python_clients_chat_stream_and_complete(
    home: Path, server: Server, tmp_path: Path
) -> None:
    """openai, litellm and langchain-openai: the same answer, streamed and whole, with usage."""
    assert "langchain-openai" in run(home, tmp_path, str(HERE / "python.py"), server.url)


def test_the_javascript_client_chats_and_streams(home: Path, server: Server) -> None:
    """The openai package of npm, with its stream helper and paged list of models."""
    command = ["node", str(HERE / "node.mjs"), server.url]
    done = subprocess.run(command, cwd=home / "node", capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stderr


def test_llm_answers_on_the_command_line(home: Path, server: Server, tmp_path: Path) -> None:
    """simonw's llm with the server as one of its OpenAI-like models."""
    model = [{"model_id": "tiny", "model_name": "tiny", "api_base": f"{server.url}/v1"}]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(model))
    user = {"LLM_USER_PATH": str(tmp_path)}
    arguments = (
        "-m",
        "llm",
        "-m",
        "tiny",
        "hello",
        "-o",
        "max_tokens",
        "5",
        "-o",
        "temperature",
        "0",
    )
    streamed = run(home, tmp_path, *arguments, **user)
    assert streamed.strip()
    assert streamed == run(home, tmp_path, *arguments, "--no-stream", **user)


def test_guidellm_measures_the_server(home: Path, server: Server, tmp_path: Path) -> None:
    """A load of 8 requests: each of them is answered with as many tokens as were asked for."""
    run(
        home,
        tmp_path,
        *("-m", "guidellm", "run", "--disable-console"),
        *("--backend", f"kind=openai_http,target={server.url}"),
        *("--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=8"),
        *("--tokenizer", f"kind=huggingface_auto,model={TINY}"),
        *("--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=8"),
        *("--output", f"kind=json,path={tmp_path / 'report.json'}"),
    )
    (benchmark,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    assert 8 == benchmark["metrics"]["request_totals"]["successful"]
    assert {8} == {
        one["output_metrics"]["text_tokens"] for one in benchmark["requests"]["successful"]
    }


QUESTIONS = [
    {"question": "What occupation does Tamsin Vale have?", "choices": ["gardener", "cook"]},
    {"question": "Where does Linden Moss work?", "choices": ["in the harbour", "at the mill"]},
    {"question": "cat dog", "choices": ["tree", "cat cat", "x"]},
    {"question": "naïve 😀", "choices": ["ä", "o"]},
]


@pytest.mark.parametrize("batch", ["1", "4"])
def test_lm_eval_measures_as_transformers_does(
    batch: str, home: Path, server: Server, tmp_path: Path
) -> None:
    """local-completions: likelihoods to 1e-2 of transformers' own, and generated answers."""
    rows = [question | {"answer": 0} for question in QUESTIONS]
    (tmp_path / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "answer.jsonl").write_text(
        "".join(json.dumps({"question": q["question"], "answer": "x"}) + "\n" for q in QUESTIONS)
    )
    for name in ("choice.yaml", "answer.yaml"):
        text = (HERE / name).read_text().replace("FOLDER", str(tmp_path))
        (tmp_path / name).write_text(text)
    arguments = f"model=tiny,base_url={server.url}/v1/completions,tokenizer={TINY},num_concurrent=4"
    run(
        home,
        tmp_path,
        *("-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments),
        *("--include_path", str(tmp_path), "--tasks", "own_choice,own_answer"),
        *("--batch_size", batch, "--output_path", str(tmp_path / "out"), "--log_samples"),
    )

    samples = {
        path.name.split("_20")[0]: _lines(path) for path in tmp_path.rglob("samples_*.jsonl")
    }
    model = load_base(TINY, precision="float32", quantisation=None, device="cpu").eval()
    tokenizer = load_tokenizer(TINY)
    for sample in samples["samples_own_choice"]:
        question, choices = sample["doc"]["question"], sample["doc"]["choices"]
        expected = [_likelihood(model, tokenizer, question, f" {choice}") for choice in choices]
        measured = [float(pair[0]) for pair in sample["filtered_resps"]]
        assert expected == pytest.approx(measured, abs=1e-2)
    assert len(QUESTIONS) == len(samples["samples_own_answer"])
    for sample in samples["samples_own_answer"]:
        ids = torch.tensor([tokenizer(sample["doc"]["question"])["input_ids"]])
        said = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        text = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
        assert text.split("\n")[0] == sample["resps"][0][0]


def test_eval_gives_what_lm_evals_own_model_gives(home: Path, tuned: Path, tmp_path: Path) -> None:
    """`eval` on our server against lm-eval's `hf` with PEFT: base and adapter, to 1e-3."""
    two = [each for each in QUESTIONS if len(each["choices"]) == 2]  # brier_score wants as many
    rows = [question | {"answer": 0} for question in two]
    (tmp_path / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = (HERE / "choice.yaml").read_text().replace("FOLDER", str(tmp_path))
    text = text.replace("{metric: acc_norm}", "{metric: acc_norm}, {metric: brier_score}")
    (tmp_path / "own_choice.yaml").write_text(text)
    command = ("eval", "--base", TINY, "--adapter", tuned, "--precision", "float32", "--json")
    command += ("--tasks", tmp_path / "own_choice.yaml", "--lm-eval", home / "bin" / "python")
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    record = json.loads(good(tuning(*command, env=offline, timeout=1200)))
    for model, more in (("base", ""), ("tuned", f",peft={tuned}")):
        run(
            home,
            tmp_path,
            *("-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"),
            *("--model_args", f"pretrained={TINY},dtype=float32{more}"),
            *("--include_path", str(tmp_path), "--tasks", "own_choice"),
            *("--output_path", str(tmp_path / model)),
        )
        (path,) = (tmp_path / model).rglob("results_*.json")
        results = json.loads(path.read_text())["results"]["own_choice"]
        compared = 0
        for task in record["tasks"]:
            value, own = task["models"][model]["value"], results[f"{task['metric']},none"]
            assert own == pytest.approx(value, abs=1e-3), (model, task)
            compared += 1
        assert 3 == compared
    brier = next(task for task in record["tasks"] if task["metric"] == "brier_score")["models"]
    assert abs(brier["base"]["value"] - brier["tuned"]["value"]) > 1e-3  # the adapter is measured


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _likelihood(model: Any, tokenizer: Any, question: str, continuation: str) -> float:
    """The log-probability of `continuation` after `question`, by transformers alone."""
    before = tokenizer(question)["input_ids"]
    ids = tokenizer(question + continuation)["input_ids"]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return sum(float(logprobs[i - 1, ids[i]]) for i in range(len(before), len(ids)))
