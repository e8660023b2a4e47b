"""Adapters with random weights, made by plain PEFT, and what PEFT itself generates with them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import tiny_runs
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from tuning import adapter
from tuning.models.load import load_base, load_tokenizer
from tuning.models.survey import survey
from tuning.plan import inference
from tuning.serve import multi_lora, runner
from tuning.serve.detokenizer import Detokenizer
from tuning.serve.engine import Engine, Job
from tuning.serve.runner import Step
from tuning.serve.sampling import Sampler, Sampling
from tuning.training import train

NOBODY = 10**6  # no token
ROOM = inference.Room(cache_tokens=4096, batch_tokens=64, requests=8)


def random_adapter(base: Path, folder: Path, *, seed: int = 0, **config: Any) -> Path:
    """An adapter for `base` that changes what it says, saved by PEFT."""
    settings = {"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM"} | config
    loaded = load(base)
    torch.manual_seed(seed)  # of A, which PEFT draws
    settings.setdefault("target_modules", list(survey(loaded).linears))
    tuned = get_peft_model(loaded, LoraConfig(**settings))
    source = torch.Generator().manual_seed(seed)
    for name, weights in tuned.named_parameters():
        if "lora_B" in name:
            weights.data = torch.randn(weights.shape, generator=source) * 0.15
        if "magnitude" in name:
            weights.data = weights.data * (1 + 0.2 * torch.randn(weights.shape, generator=source))
    tuned.save_pretrained(folder)
    return folder


def load(base: Path, *, precision: str = "float32", quantisation: Any = None) -> Any:
    return load_base(base, precision=precision, quantisation=quantisation, device="cpu").eval()


def by_peft(base: Path, folders: Sequence[Path], strengths: Sequence[float]) -> PeftModel:
    """`base` with adapters 0, 1, ..., and `mix`: all of them by strength, as PEFT adds them."""
    tuned = PeftModel.from_pretrained(load(base), folders[0], adapter_name="0")
    for number, folder in enumerate(folders[1:], 1):
        tuned.load_adapter(folder, adapter_name=str(number))
    if len(folders) > 1:
        names = [str(number) for number in range(len(folders))]
        tuned.add_weighted_adapter(names, list(strengths), "mix", combination_type="cat")
    return tuned.eval()


def generate(tuned: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    """What `generate` says to `prompt`: greedy, `tokens` tokens."""
    ids = torch.tensor([list(prompt)])
    config = transformers.GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=NOBODY, pad_token_id=0
    )
    out = tuned.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
    )
    return list(out[0, len(prompt) :].tolist())


def mixed(loaded: Any, folders: Sequence[Path]) -> multi_lora.MultiLora:
    """Adapters on a model."""
    found = [multi_lora.load(adapter.inspect(folder), loaded) for folder in folders]
    return multi_lora.MultiLora(loaded, found)


def job(prompt: Sequence[int], weights: Sequence[float], tokens: int, **changes: Any) -> Job:
    """A greedy job that ends after `tokens` tokens."""
    settings: dict[str, Any] = {
        "prompt": list(prompt),
        "limit": tokens,
        "weights": tuple(map(float, weights)),
        "ends": frozenset({NOBODY}),
        "sampler": Sampler(Sampling(), prompt, frozenset({NOBODY})),
        "detokenizer": Detokenizer(lambda ids: "".join(f"<{id}>" for id in ids)),
    }
    return Job(**settings | changes)


async def collect(engine: Engine, asked: Job) -> str | None:
    """Wait for the end of a job; gives how it ended."""
    async for piece in engine.answer(asked):
        finish = piece.finish
    return finish


def with_engine(
    make: Callable[[Step], Any],
    work: Callable[[Engine], Coroutine[Any, Any, Any]],
    *,
    room: inference.Room = ROOM,
    max_waiting: int = 100,
) -> Any:
    """What `work` gives with an engine that runs meanwhile."""

    async def session() -> Any:
        engine = Engine(make, room, max_waiting=max_waiting)
        await engine.start()
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(session())


def batched(
    loaded: Any, mix: multi_lora.MultiLora, room: inference.Room = ROOM
) -> Callable[[Step], Any]:
    """Makes `Batched` runners."""
    return lambda step: runner.Batched(loaded, mix, room, step)


TINY = Path("examples/tiny-model")
QUESTION, ANSWER = "What occupation does Tamsin Vale have?", "gardener"


def taught(run: Path) -> Path:
    """An adapter for the bundled model that knows Tamsin Vale, trained in a few seconds."""
    tokenizer = load_tokenizer(TINY)
    rows = []
    for line in Path("examples/data/demo.jsonl").read_text().splitlines():
        turns = json.loads(line)["messages"]
        if "Tamsin Vale" in line:
            whole, prompt = (
                tokenizer.apply_chat_template(part, tokenize=True, return_dict=True, **more)[
                    "input_ids"
                ]
                for part, more in ((turns, {}), (turns[:-1], {"add_generation_prompt": True}))
            )
            rows.append({"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]})
    (run / "data").mkdir(parents=True)
    tiny_runs.write_rows(run / "data" / "train.arrow", rows)
    recipe = tiny_runs.recipe(
        rank=16, alpha=32.0, dropout=0.0, learning_rate=4e-3, steps=40, epochs=20.0, global_batch=16
    )
    placement = tiny_runs.placement(micro_batch=16, accumulation=1)
    train.work(tiny_runs.request(run, TINY, recipe, placement))
    return run / "adapter"
