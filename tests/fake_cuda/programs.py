"""Whole programs on the fake device: the GPU suite's checks, answers, merge and serving."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import serving
import tiny_models
import tiny_runs
import torch
from fake_cuda.device import Card, Device
from gpu import checks, runs

from tuning.models import generate
from tuning.models.load import load_base
from tuning.models.merge import merge
from tuning.plan.backends import FUSED, VARLEN
from tuning.serve import runner
from tuning.training import train

PROMPTS = [[5 + n * step % 250 for n in range(count)] for step, count in ((3, 3), (7, 40))]
QUESTION = "the big red dog"


def check(device: Device, name: str, folder: str = "") -> dict[str, Any]:
    """A check of the GPU suite in tiny form."""
    device.become(Card())
    found: dict[str, Any]
    if folder:
        found = getattr(runs, name)(checks.TINY, Path(folder))
    else:
        found = getattr(checks, name)(checks.TINY)
    return found


@cache
def _base(folder: str) -> Path:
    return tiny_models.build("llama", Path(folder) / "base")


def trained(
    device: Device, folder: str, place: str, held_out: int, **recipe: Any
) -> dict[str, Any]:
    """A training on cuda or the CPU; with an evaluation split, sample answers, too."""
    device.become(Card())
    run = Path(folder) / f"{place}-{'-'.join(map(str, recipe.values()))}"
    split = {"eval_steps": 2, "keep_best": True} if held_out else {}
    made = tiny_runs.recipe(dropout=0.0, steps=3, **split, **recipe)
    attention = VARLEN if made.packing else "sdpa"
    placement = tiny_runs.placement(device=place, attention=attention, kernels=FUSED)
    request = tiny_runs.request(run, _base(folder), made, placement, count=36, held_out=held_out)
    done = train.work(request)
    return done | {"samples": (run / "samples.jsonl").read_text().splitlines()}


def answers(device: Device, folder: str, place: str) -> list[Any]:
    """What an adapter on its base answers, and the base alone."""
    adapter = _adapter(folder)
    session = generate.Session(
        _base(folder), adapter, device=place, precision="float32", max_new_tokens=12
    )
    assert {place} == {p.device.type for p in session.model.parameters()}
    return list(session.ask(QUESTION, compare=True))


def merged(device: Device, folder: str, place: str, method: str) -> str:
    """The hash of the merged model's weights."""
    target = Path(folder) / f"merged-{place}-{method}"
    merge(_base(folder), _adapter(folder), target, method=method, device=place)
    return hashlib.sha256((target / "model.safetensors").read_bytes()).hexdigest()


def served(device: Device, folder: str, place: str) -> dict[str, Any]:
    """What the server's engine answers for the base and an adapter, batched together."""
    loaded = load_base(_base(folder), precision="float32", quantisation=None, device=place).eval()
    mix = serving.mixed(loaded, [_adapter(folder)])
    assert {place} == {p.device.type for p in loaded.parameters()}
    chosen = runner.choose_runner(loaded, mix, serving.ROOM).__name__
    jobs = [serving.job(prompt, by, 8) for by in ((0,), (1,)) for prompt in PROMPTS]

    async def work(engine: Any) -> list[list[int]]:
        await asyncio.gather(*(serving.collect(engine, job) for job in jobs))
        return [job.tokens for job in jobs]

    made = serving.batched(loaded, mix) if chosen == "Batched" else None
    tokens = serving.with_engine(
        made or (lambda step: runner.Sequential(loaded, mix, serving.ROOM, step)), work
    )
    return {"runner": chosen, "tokens": tokens}


@cache
def _adapter(folder: str) -> Path:
    return serving.random_adapter(_base(folder), Path(folder) / "random")


def one_document(device: Device, capability: list[int]) -> dict[str, int]:
    """The attention kernels of a row that is one document, whose heads share keys."""
    from fake_cuda.spy import Spy

    device.become(replace(Card(), capability=tuple(capability)))
    config = tiny_models.FAMILIES["llama"][1] | {"vocab_size": 300}
    import transformers

    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM._from_config(
            transformers.LlamaConfig(**config), dtype=torch.float16, attn_implementation="sdpa"
        )
    spy = Spy()
    with spy:
        model(input_ids=torch.ones(1, 24, dtype=torch.long, device="cuda"), use_cache=False)
    found = spy.kernels["loop"]
    return {name: n for name, n in found.items() if "attention" in name or "softmax" in name}
