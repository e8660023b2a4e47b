"""llama.cpp with exported GGUF files, beside PEFT: tokens, logits and greedy answers.

llama-cpp-python is built once into ~/.cache (10 minutes): make test-clients.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tiny_runs
import torch
import transformers
from commands import good, tuning, workspace
from tokenizers import Regex, normalizers, pre_tokenizers, trainers

from tuning.models import generate
from tuning.training import train

pytest.importorskip("gguf", reason="the extra gguf is not installed")

from tuning.models.gguf_files import export, vocabulary

pytestmark = [pytest.mark.clients, pytest.mark.timeout(3600)]
HERE, TINY = Path(__file__).parent / "llama_cpp", Path("examples/tiny-model").resolve()
VERSION = "0.3.36"  # of llama-cpp-python
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
BASES = {
    "llama": ("llama", {}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR, "attention_bias": True}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}
TEXTS = [
    "It's 1234567 o'clock,\tWE'LL see…  \n\n  x = y_2*3.50;\r\n   ",
    "naïve Straße 東京 тест ١٢٣ ½ \u00a0 🙂‍↔️ e\u0301",
    "<|user|> a<|end|> <|im_start|>b",
]


@pytest.fixture(scope="module")
def python() -> Path:
    """The Python that has llama-cpp-python."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = cache / "tuning-llama-cpp"
    done = home / "done"
    if not done.exists() or done.read_text() != VERSION:
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        pip = [str(home / "bin" / "pip"), "install", "--quiet", f"llama-cpp-python=={VERSION}"]
        subprocess.run(pip, check=True, env=os.environ | {"CMAKE_BUILD_PARALLEL_LEVEL": "2"})
        done.write_text(VERSION)
    return home / "bin" / "python"


def ask(python: Path, folder: Path, model: Path, lora: Path | None = None, **request: Any) -> Any:
    """What answer.py says to `request`."""
    whole = {"texts": [], "prompts": [], "count": 0, "lora": str(lora) if lora else None}
    (folder / "request.json").write_text(json.dumps(whole | {"model": str(model)} | request))
    command = [str(python), str(HERE / "answer.py"), str(folder / "request.json")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def expected(session: generate.Session, prompt: list[int], count: int) -> tuple[torch.Tensor, Any]:
    """PEFT's logits after `prompt`, and its greedy continuation, in float32."""
    model = session.model.float()
    ids = torch.tensor([prompt])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1]
        for _ in range(count):
            following = model(input_ids=ids).logits[0, -1].argmax()
            ids = torch.cat([ids, following[None, None]], dim=1)
    return logits, ids[0, len(prompt) :].tolist()


def compare(
    python: Path, folder: Path, base: Path, adapter: Path, prompts: list[list[int]], count: int
) -> None:
    """The pair of GGUF files and the merged one give what PEFT gives, not what the base does."""
    export.export(base, adapter, folder / "pair", with_base=True)
    export.export(base, adapter, folder / "whole", merged=True)
    session = generate.Session(base, adapter, precision="float32", device="cpu")
    pair = folder / "pair"
    request: dict[str, Any] = {"prompts": prompts, "count": count}
    alone = ask(python, folder, pair / "base.gguf", **request)
    answers = {
        "pair": ask(python, folder, pair / "base.gguf", pair / "adapter.gguf", **request),
        "whole": ask(python, folder, folder / "whole" / "model.gguf", **request),
    }
    for number, prompt in enumerate(prompts):
        logits, continued = expected(session, prompt, count)
        moved = (torch.tensor(alone["logits"][number]) - logits).abs().max().item()
        for kind, answer in answers.items():
            apart = (torch.tensor(answer["logits"][number]) - logits).abs().max().item()
            assert apart < 0.05 * moved, (kind, apart, moved)
        assert continued == answers["pair"]["continued"][number]
        if count > 8:  # an answer that was learned, which rounding to 16 bits does not change
            assert continued == answers["whole"]["continued"][number]


@pytest.mark.parametrize("name", BASES)
def test_each_family_answers_as_peft_does(python, tmp_path, name):
    """Each family, with each rotary embedding, at a length where these differ."""
    family, shape = BASES[name]
    base = tiny_models.build(family, tmp_path / "base", **shape)
    recipe = tiny_runs.recipe(dropout=0.0, learning_rate=2e-2, steps=24, epochs=6.0)
    train.work(tiny_runs.request(tmp_path / "run", base, recipe, tiny_runs.placement()))
    record = {"recipe": json.loads(json.dumps(vars(recipe), default=list))}
    (tmp_path / "run" / "adapter" / "tuning.json").write_text(json.dumps(record))
    rows = json.loads((base / "config.json").read_text())["vocab_size"]
    spread = torch.randint(10, rows, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    compare(python, tmp_path, base, tmp_path / "run" / "adapter", [spread, spread[:5]], 4)


def test_the_demo_answers_as_peft_does(python, tmp_path):
    """The bundled model after a short run: the same sentences, token by token."""
    file = workspace(tmp_path / "demo.yaml", settings={"max_steps": 60, "learning_rate": 0.01})
    data = TINY.parent / "data" / "demo.jsonl"
    command = ("run", "-f", file, "--base-model", TINY, "--data", data)
    good(tuning(*command, "--output", f"oci:{tmp_path / 'image'}", "--run-dir", tmp_path / "run"))
    adapter = tmp_path / "run" / "adapter"
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    asked = ["What is Wilma Starling heard playing at concerts?", "Where does Wilma Starling live?"]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in asked
    ]
    compare(python, tmp_path, TINY, adapter, prompts, 16)


def _words(digits: str) -> list[Any]:
    split = pre_tokenizers.Split(Regex(vocabulary._WORDS + digits + vocabulary._REST), "isolated")
    return [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


RULES = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "qwen2": _words(r"\p{N}"),
    "llama-bpe": _words(r"\p{N}{1,3}"),
}


@pytest.mark.parametrize("name", RULES)
def test_llama_cpp_makes_the_same_tokens(
    python: Path, tiny_base: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    """Of each named rule: numbers, contractions, whitespace, scripts, marks and special tokens."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base("qwen3"), base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    steps = RULES[name]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    special = [added.content for added in tokenizer.added_tokens_decoder.values()]
    trainer = trainers.BpeTrainer(
        vocab_size=len(tokenizer),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([t for t in TEXTS[:2] for _ in range(3)], trainer)
    backend.model.ignore_merges = name == "llama-bpe"
    new = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[0], eos_token=tokenizer.eos_token
    )
    assert name == vocabulary.pre_tokenizer(new) and len(new) <= len(tokenizer)
    export._write_model(base, new, tmp_path / "model.gguf", None)

    texts = [t.replace("e\u0301", "é") for t in TEXTS] if name == "qwen2" else TEXTS
    answer = ask(python, tmp_path, tmp_path / "model.gguf", texts=texts)
    assert [new(t, add_special_tokens=False)["input_ids"] for t in texts] == answer["tokens"]
