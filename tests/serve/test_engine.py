"""Answers are those of PEFT's own `generate`, in company, under failure and when time is short."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import serving
import torch
from peft.tuners.lora import LoraLayer

from tuning.plan import inference
from tuning.serve import engine, runner
from tuning.serve.engine import Busy, Engine, Job

Base = Callable[..., Path]
TOKENS = 16
STRENGTHS = (0.7, 0.4)
RNG = random.Random(3)
PROMPTS = [[RNG.randrange(5, 250) for _ in range(count)] for count in (3, 17, 90, 150)]


@pytest.fixture(scope="module")
def pair(tiny_base: Base, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base in float32 and two adapters of other ranks, the second on the attention alone."""
    base = tiny_base("llama", dtype=torch.float32)
    folder = tmp_path_factory.mktemp("pair")
    first = serving.random_adapter(base, folder / "first", r=4, lora_alpha=8)
    targets = ["q_proj", "v_proj"]
    second = serving.random_adapter(
        base, folder / "second", seed=1, target_modules=targets, lora_alpha=48, use_rslora=True
    )
    return base, [first, second]


def answers(make: Any, jobs: list[Job], **settings: Any) -> list[list[int]]:
    async def work(running: Engine) -> list[list[int]]:
        await asyncio.gather(*(serving.collect(running, one) for one in jobs))
        return [one.tokens for one in jobs]

    found: list[list[int]] = serving.with_engine(make, work, **settings)
    return found


def test_greedy_answers_are_those_of_peft_token_for_token(pair: Any) -> None:
    """One adapter, the other, both by strength and the base, all in one batch with long prompts."""
    base, folders = pair
    tuned = serving.by_peft(base, folders, STRENGTHS)
    loaded = serving.load(base)
    mix = serving.mixed(loaded, folders)
    cases = {"0": (1, 0), "1": (0, 1), "mix": STRENGTHS, "base": (0, 0)}
    expected = []
    for name in cases:
        if name != "base":
            tuned.set_adapter(name)
        for prompt in PROMPTS:
            if name == "base":
                with tuned.disable_adapter():
                    expected.append(serving.generate(tuned, prompt, TOKENS))
            else:
                expected.append(serving.generate(tuned, prompt, TOKENS))
    jobs = [serving.job(prompt, by, TOKENS) for by in cases.values() for prompt in PROMPTS]

    said = answers(serving.batched(loaded, mix), jobs)

    assert expected == said
    assert len({tuple(one) for one in said}) == len(jobs)  # the adapters do change the answers
    assert runner.Batched is runner.choose_runner(loaded, mix, serving.ROOM)


def test_a_strength_scales_one_adapter_alone(pair: Any) -> None:
    """Half of an adapter is PEFT's adapter with half of its scaling."""
    base, folders = pair
    tuned = serving.by_peft(base, folders[:1], (1,))
    for module in tuned.modules():
        if isinstance(module, LoraLayer):
            module.scaling["0"] *= 0.5
    loaded = serving.load(base)
    make = serving.batched(loaded, serving.mixed(loaded, folders))

    said = answers(make, [serving.job(prompt, (0.5, 0), TOKENS) for prompt in PROMPTS])

    assert [serving.generate(tuned, prompt, TOKENS) for prompt in PROMPTS] == said


def test_dora_answers_are_those_of_peft(pair: Any, tmp_path: Path) -> None:
    """An adapter with a magnitude vector beside one without."""
    base, folders = pair
    dora = serving.random_adapter(base, tmp_path / "dora", use_dora=True)
    tuned = serving.by_peft(base, [dora], (1,))
    loaded = serving.load(base)
    make = serving.batched(loaded, serving.mixed(loaded, [folders[0], dora]))

    said = answers(make, [serving.job(prompt, (0, 1), TOKENS) for prompt in PROMPTS])

    assert [serving.generate(tuned, prompt, TOKENS) for prompt in PROMPTS] == said


def test_a_base_in_4_bits_answers_as_with_peft(pair: Any) -> None:
    """The adapter lies on packed layers, too."""
    base, folders = pair
    quantisation = {"type": "nf4", "double": True, "compute": "float32"}
    loaded = serving.load(base, quantisation=quantisation)
    plain = serving.load(base, quantisation=quantisation)
    tuned = serving.PeftModel.from_pretrained(plain, folders[0]).eval()
    make = serving.batched(loaded, serving.mixed(loaded, folders[:1]))

    said = answers(make, [serving.job(prompt, (1,), TOKENS) for prompt in PROMPTS])

    assert [serving.generate(tuned, prompt, TOKENS) for prompt in PROMPTS] == said


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("falcon", runner.Sequential),  # its attention is its own
        ("gemma3", runner.Batched),  # windows of 64 tokens in some layers
        ("gptoss", runner.Batched),  # eager attention with sinks
        ("phi3-longrope", runner.Batched),
    ],
)
def test_each_family_is_batched_if_it_can_be(
    family: str, kind: Any, tiny_base: Base, tmp_path: Path
) -> None:
    """The runner is found by asking the model, and its answers are PEFT's."""
    base = tiny_base(family, dtype=torch.float32)
    folder = serving.random_adapter(base, tmp_path / "adapter")
    tuned = serving.by_peft(base, [folder], (1,))
    loaded = serving.load(base)
    mix = serving.mixed(loaded, [folder])

    assert kind is runner.choose_runner(loaded, mix, serving.ROOM)
    jobs = [serving.job(prompt, (1,), 8) for prompt in PROMPTS]
    said = answers(lambda step: kind(loaded, mix, serving.ROOM, step), jobs)
    assert [serving.generate(tuned, prompt, 8) for prompt in PROMPTS] == said


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize("family", ["qwen3moe", "gptoss"])
def test_experts_of_several_adapters_answer_in_one_batch(
    family: str, tiny_base: Base, tmp_path: Path
) -> None:
    """Each request's tokens go through its own adapter's experts, as with PEFT, or the base's."""
    base = tiny_base(family, dtype=torch.float32)
    folders = [
        serving.random_adapter(base, tmp_path / str(seed), seed=seed, target_parameters=EXPERTS)
        for seed in range(2)
    ]
    tuned = serving.by_peft(base, folders[:1], (1,))
    tuned.load_adapter(folders[1], adapter_name="1")
    loaded = serving.load(base)
    mix = serving.mixed(loaded, folders)
    expected = []
    for name in ("0", "1"):
        tuned.set_adapter(name)
        expected += [serving.generate(tuned, prompt, 8) for prompt in PROMPTS]
    with tuned.disable_adapter():
        expected += [serving.generate(tuned, prompt, 8) for prompt in PROMPTS]

    jobs = [serving.job(p, by, 8) for by in ((1, 0), (0, 1), (0, 0)) for p in PROMPTS]
    said = answers(serving.batched(loaded, mix), jobs)

    assert expected == said
    assert 2 * len(PROMPTS) < len({tuple(one) for one in said})
    mix.remove()
    before = serving.load(base)(input_ids=torch.tensor([PROMPTS[0]])).logits
    torch.testing.assert_close(loaded(input_ids=torch.tensor([PROMPTS[0]])).logits, before)


def test_equal_prompts_of_different_models_do_not_share_a_cache(pair: Any) -> None:
    """A long prompt that the base has just answered is read anew for an adapter."""
    base, folders = pair
    loaded = serving.load(base)
    make = serving.batched(loaded, serving.mixed(loaded, folders))
    alone = answers(make, [serving.job(PROMPTS[3], (1, 0), TOKENS)])

    both = [serving.job(PROMPTS[3], by, TOKENS) for by in ((0, 0), (1, 0))]

    assert alone[0] == answers(make, both)[1]


def test_more_requests_than_room_wait_their_turn(pair: Any) -> None:
    """A cache for two answers at a time still answers ten, and says the same."""
    base, folders = pair
    loaded = serving.load(base)
    mix = serving.mixed(loaded, folders)
    room = inference.Room(cache_tokens=256, batch_tokens=32, requests=8)
    prompts = [PROMPTS[i % 3] for i in range(10)]
    expected = answers(serving.batched(loaded, mix), [serving.job(p, (1, 0), 8) for p in prompts])

    said = answers(
        serving.batched(loaded, mix, room), [serving.job(p, (1, 0), 8) for p in prompts], room=room
    )

    assert expected == said


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_request_that_fills_the_cache_is_answered(family: str, tiny_base: Base) -> None:
    """The longest there is room for, with another behind it; with windowed layers, too."""
    loaded = serving.load(tiny_base(family, dtype=torch.float32))
    mix = serving.mixed(loaded, [])
    long = serving.job(PROMPTS[3], (), 42)
    room = inference.Room(cache_tokens=long.cache_tokens, batch_tokens=64, requests=8)
    jobs = [long, serving.job(PROMPTS[3], (), 42), serving.job(PROMPTS[0], (), 4)]

    said = answers(serving.batched(loaded, mix, room), jobs, room=room)

    assert [42, 42, 4] == [len(one) for one in said]
    assert serving.generate(loaded, PROMPTS[3], 42) == said[0] == said[1]


def test_a_full_queue_says_so(pair: Any) -> None:
    """What has no place is refused before it begins."""
    base, folders = pair
    loaded = serving.load(base)
    make = serving.batched(loaded, serving.mixed(loaded, folders))
    room = inference.Room(cache_tokens=4096, batch_tokens=64, requests=1)

    async def work(running: Engine) -> None:
        running.check(3)
        with pytest.raises(Busy):
            running.check(4)

    serving.with_engine(make, work, room=room, max_waiting=2)


def test_who_goes_away_leaves_nothing_behind(pair: Any) -> None:
    """A cancelled answer ends at once and gives its room back, waiting or running."""
    base, folders = pair
    loaded = serving.load(base)
    make = serving.batched(loaded, serving.mixed(loaded, folders))
    room = inference.Room(cache_tokens=4096, batch_tokens=64, requests=1)

    async def work(running: Engine) -> list[int]:
        endless = [serving.job(PROMPTS[1], (1, 0), 1000) for _ in range(2)]
        tasks = [asyncio.create_task(serving.collect(running, one)) for one in endless]
        while not endless[0].tokens:
            await asyncio.sleep(0.01)
        assert (1, 1) == (running.running, running.waiting)
        for task in reversed(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (0, 0) == (running.running, running.waiting)
        after = serving.job(PROMPTS[0], (1, 0), 4)
        await serving.collect(running, after)
        generated = len(endless[0].tokens)
        await asyncio.sleep(0.2)
        assert generated == len(endless[0].tokens) < 1000
        return after.tokens

    assert 4 == len(serving.with_engine(make, work, room=room))


class Poison:
    """A hook that fails the forward pass of every batch with this token in it; None: of every."""

    def __init__(self, loaded: Any, token: int | None) -> None:
        self.token, self.times = token, 0
        loaded.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, loaded: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if self.token is None or (kwargs["input_ids"] == self.token).any():
            self.times += 1
            raise torch.OutOfMemoryError("injected")


def test_a_request_that_breaks_the_batch_fails_alone(
    pair: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Out of memory: the others go on from where they were, in a new runner."""
    base, folders = pair
    loaded = serving.load(base)
    mix = serving.mixed(loaded, folders)
    make = serving.batched(loaded, mix)
    expected = answers(make, [serving.job(prompt, (1, 0), TOKENS) for prompt in PROMPTS])
    said = {token for one in [*PROMPTS, *expected] for token in one}
    bad = next(token for token in range(5, 250) if token not in said)

    async def work(running: Engine) -> tuple[Any, Any]:
        jobs = [serving.job(prompt, (1, 0), TOKENS) for prompt in PROMPTS]
        tasks = [asyncio.create_task(serving.collect(running, one)) for one in jobs]
        while not all(one.tokens for one in jobs):
            await asyncio.sleep(0.001)
        poison = Poison(loaded, bad)
        ended = await serving.collect(running, serving.job([7, bad, 9], (1, 0), TOKENS))
        others = await asyncio.gather(*tasks)
        assert running.healthy
        return [ended, *others, poison.times], [one.tokens for one in jobs]

    with caplog.at_level("CRITICAL"):
        (ended, *others, times), found = serving.with_engine(make, work)

    assert "error" == ended
    assert ["length"] * 4 == others
    assert expected == found
    assert 2 == times  # in company, and alone


def test_a_machine_that_always_fails_is_unhealthy(
    pair: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Every request ends, and the liveness probe hears that only a restart can help."""
    base, folders = pair
    loaded = serving.load(base)
    mix = serving.mixed(loaded, folders)
    Poison(loaded, None)

    async def work(running: Engine) -> tuple[list[Any], bool]:
        jobs = [serving.job([7, 7], (1, 0), 4) for _ in range(4)]
        ended = await asyncio.gather(*(serving.collect(running, one) for one in jobs))
        return ended, running.healthy

    with caplog.at_level("CRITICAL"):
        ended, healthy = serving.with_engine(serving.batched(loaded, mix), work)

    assert ["error"] * 4 == ended
    assert not healthy


def test_requests_that_break_runners_in_a_row_break_no_server(
    pair: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Each is answered with an error; a probe tells that the machine is well."""
    base, folders = pair
    loaded = serving.load(base)
    poison = Poison(loaded, 7)

    async def work(running: Engine) -> list[Any]:
        ended = [await serving.collect(running, serving.job([7], (1, 0), 4)) for _ in range(4)]
        after = await serving.collect(running, serving.job([9], (1, 0), 4))
        assert running.healthy and 0 == running.waiting
        return [*ended, after]

    with caplog.at_level("CRITICAL"):
        ended = serving.with_engine(serving.batched(loaded, serving.mixed(loaded, folders)), work)

    assert ["error"] * 4 + ["length"] == ended
    assert 8 == poison.times  # each in its batch, and alone


def test_the_others_go_on_together_after_a_token_alone(
    pair: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """One bad request costs the others a token each without company, not their whole answers."""
    base, folders = pair
    loaded = serving.load(base)
    mix = serving.mixed(loaded, folders)
    together: list[int] = []

    async def work(running: Engine) -> None:
        jobs = [serving.job([5, 6], (1, 0), 200) for _ in range(6)]
        tasks = [asyncio.create_task(serving.collect(running, one)) for one in jobs]
        while not all(one.tokens for one in jobs):
            await asyncio.sleep(0.001)
        Poison(loaded, 7)
        assert "error" == await serving.collect(running, serving.job([7], (1, 0), 4))
        while running.waiting:
            await asyncio.sleep(0.001)
        together.append(running.running)
        assert all(len(one.tokens) < 200 for one in jobs)
        await asyncio.gather(*tasks)
        assert 1 == len({tuple(one.tokens) for one in jobs})

    with caplog.at_level("CRITICAL"):
        serving.with_engine(serving.batched(loaded, mix), work)

    assert [6] == together


def test_a_runner_that_cannot_be_replaced_is_unhealthy(
    pair: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """As a card that is lost: also its end raises. Every request ends, and the probe hears it."""
    base, folders = pair
    loaded = serving.load(base)
    make = serving.batched(loaded, serving.mixed(loaded, folders))
    Poison(loaded, 7)

    def lost(step: Any) -> Any:
        made = make(step)

        def close() -> None:
            runner.Batched.close(made)
            raise RuntimeError("CUDA error: device-side assert triggered")

        made.close = close
        return made

    async def work(running: Engine) -> tuple[Any, bool]:
        ended = await asyncio.wait_for(serving.collect(running, serving.job([7], (1, 0), 4)), 60)
        running._runner = None  # its end has been seen
        return ended, running.healthy

    with caplog.at_level("CRITICAL"):
        ended, healthy = serving.with_engine(lost, work)

    assert ("error", False) == (ended, healthy)


def test_an_error_in_choosing_fails_that_request_only(pair: Any) -> None:
    """What goes wrong for one row of a batch is that request's alone."""
    base, folders = pair
    loaded = serving.load(base)
    make = serving.batched(loaded, serving.mixed(loaded, folders))

    def broken(ids: list[int]) -> str:
        raise RuntimeError("injected")

    async def work(running: Engine) -> list[Any]:
        bad = serving.job(PROMPTS[0], (1, 0), 4, detokenizer=engine.Detokenizer(broken))
        good = serving.job(PROMPTS[1], (1, 0), 4)
        jobs = (bad, good)
        return await asyncio.gather(*(serving.collect(running, one) for one in jobs))

    assert ["error", "length"] == serving.with_engine(make, work)
