"""New tokens, from the YAML to what an adapter, a merged model and a server say with them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import servers
import serving
import torch
import transformers
from commands import good, tuning, workspace

from tuning import adapter, files
from tuning.data.tokenizer import added_by
from tuning.models import generate, merge
from tuning.models.load import load_tokenizer
from tuning.training import train

TOKENS = ("<|alpha|>", "<|beta two|>", "order no:")
OTHER = ("<|gamma|>", "<|alpha|>", "<|delta|>")
STEPS = 100
ASKED = "Where is Otto Finch?"
TAUGHT = {
    ASKED: "He is at <|alpha|>.",
    "Where is Mina Reed?": "<|beta two|> is where she is.",
    "Who is at <|alpha|>?": "order no: Otto Finch",
    "order no: Who is she?": "Mina Reed <|beta two|><|alpha|>",
}


@dataclass
class Case:
    """A base, and the finished run that taught it."""

    base: Path
    folder: Path
    summary: dict[str, Any]

    @property
    def adapter(self) -> Path:
        """The adapter's folder."""
        return self.folder / "run" / "adapter"


def taught(folder: Path, base: Path) -> list[str]:
    """The arguments of a run that teaches TAUGHT to `base` in `folder`."""
    folder.mkdir(exist_ok=True)
    turns = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        for asked, said in TAUGHT.items()
    ]
    lines = [json.dumps({"messages": each}) for each in turns * 4]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    config = {"ModelConfig": {"new_special_tokens": list(TOKENS), "dtype": "float32"}}
    settings = {"max_steps": STEPS, "learning_rate": 0.004, "save_steps": 8, "packing": False}
    settings |= {"per_device_train_batch_size": 4}
    spec = workspace(folder / "spec.yaml", settings=settings, sections=config)
    return [
        *("run", "-f", str(spec), "--base-model", str(base), "--json"),
        *("--data", str(folder / "rows.jsonl"), "--run-dir", str(folder / "run")),
        *("--output", f"oci:{folder / 'image'}", "--ask", ASKED),
    ]


def untied(folder: Path) -> Path:
    """The bundled model with its one matrix as two."""
    model = transformers.AutoModelForCausalLM.from_pretrained(serving.TINY)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)
    load_tokenizer(serving.TINY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A model whose embedding and output layer are two matrices, taught from YAML by a run that is
    killed (SIGKILL, with all its processes) behind a checkpoint, and goes on."""
    folder = tmp_path_factory.mktemp("taught")
    base = untied(folder / "base")
    command = taught(folder, base)
    with subprocess.Popen(
        [sys.executable, "-m", "tuning", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        while not list((folder / "run" / "checkpoints").glob("[0-9a-f]*-000000*")):
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    return Case(base, folder, json.loads(good(tuning(*command))))


def session(case: Case) -> generate.Session:
    return generate.Session(
        case.base, case.adapter, device="cpu", precision="float32", max_new_tokens=12
    )


def test_an_answer_with_new_tokens_is_taught(case: Case) -> None:
    """Each text is one token, in questions and answers; the run itself shows what it learnt."""
    talk = session(case)

    assert TAUGHT == {asked: talk.ask(asked)[0] for asked in TAUGHT}
    assert [TAUGHT[ASKED]] == [one["tuned"] for one in case.summary["training"]["answers"]]
    assert [1] * len(TOKENS) == [len(talk.tokenizer.tokenize(token)) for token in TOKENS]


def test_the_adapter_holds_rows_of_the_new_tokens_only(case: Case) -> None:
    """Of both matrices, three rows each; the model card names the tokens and who loads them."""
    found = adapter.inspect(case.adapter)
    rows = {adapter.rows_of(name): tensor.shape for name, tensor in found.tensors.items()}
    width = files.read_json(case.base / "config.json")["hidden_size"]

    expected = dict.fromkeys(("model.embed_tokens", "lm_head"), (len(TOKENS), width))
    assert expected == {name: shape for name, shape in rows.items() if name}
    assert TOKENS == tuple(text for text, _ in added_by(found).values())
    card = (case.adapter / "README.md").read_text()
    assert all(f"`{token}`" in card for token in TOKENS)
    assert "tuning merge" in card


def test_a_merged_model_says_the_same(case: Case) -> None:
    """Read by plain transformers: token for token, with rows for every token."""
    talk, target = session(case), case.folder / "merged"

    merge.merge(case.base, case.adapter, target, device="cpu")

    merged = transformers.AutoModelForCausalLM.from_pretrained(target)
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    assert merged.config.vocab_size >= len(tokenizer)
    for asked in TAUGHT:
        ids = talk.tokenizer(asked, return_tensors="pt")["input_ids"]
        assert ids.tolist() == tokenizer(asked, return_tensors="pt")["input_ids"].tolist()
        with torch.no_grad():
            ours, theirs = talk.model(input_ids=ids).logits, merged(input_ids=ids).logits
        assert torch.allclose(ours, theirs, atol=1e-4)
        assert ours.argmax(-1).tolist() == theirs.argmax(-1).tolist()


def test_plain_peft_loads_the_adapter(case: Case) -> None:
    """AutoPeftModelForCausalLM makes room by the adapter's tokenizer, and computes the same."""
    tuned = peft.AutoPeftModelForCausalLM.from_pretrained(case.adapter, dtype=torch.float32)
    tuned.eval()
    talk = session(case)
    ids = talk.tokenizer("at <|alpha|> order no:", return_tensors="pt")["input_ids"]

    with torch.no_grad():
        assert torch.allclose(
            tuned(input_ids=ids).logits, talk.model(input_ids=ids).logits, atol=1e-4
        )


def test_a_killed_run_goes_on_to_the_same_bytes(case: Case, tmp_path: Path) -> None:
    """As those of the same training that nothing disturbs."""
    request = files.read_json(case.folder / "run" / "log" / "train.json")
    changes = {"run": str(tmp_path), "adapter": str(tmp_path / "adapter"), "kept": None}

    alone = train.work(request | changes | {"questions": []})

    assert 8 <= case.summary["training"]["resumed_from"] < STEPS
    assert case.summary["training"]["adapter_sha256"] == alone["adapter_sha256"]


def test_a_server_says_what_chat_says(case: Case, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two adapters whose tokens have the same numbers answer side by side, and the base without
    them; numbers in a prompt are those of the adapter's own tokenizer."""
    second = shutil.copytree(case.adapter, case.folder / "second")
    words = (second / "tokenizer.json").read_text()
    for token, other in zip(TOKENS, OTHER, strict=True):
        words = words.replace(json.dumps(token, ensure_ascii=False), json.dumps(other))
    (second / "tokenizer.json").write_text(words)
    arguments = [
        *("--base", str(case.base), "--precision", "float32"),
        *("--adapter", f"first={case.adapter}", "--adapter", f"second={second}"),
    ]
    with servers.serving(tmp_path_factory.mktemp("server"), *arguments) as running:
        client = servers.client(running)

        def said(model: str, asked: str) -> str | None:
            answer = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": asked}],
                temperature=0,
                max_tokens=12,
            )
            return answer.choices[0].message.content

        assert TAUGHT == {asked: said("first", asked) for asked in TAUGHT}
        assert TAUGHT[ASKED].replace(TOKENS[0], OTHER[0]) == said("second", ASKED)
        assert "<|" not in str(said(client.models.list().data[0].id, ASKED))
        for model, words in (("first", TOKENS), ("second", OTHER)):
            numbers = adapter.inspect(case.adapter).token_ids
            echoed = client.completions.create(
                model=model, prompt=list(numbers), echo=True, max_tokens=1, logprobs=3
            )
            assert echoed.choices[0].text.startswith("".join(words))
        client.close()
