"""A step of every family on a CUDA device: where its tensors are, what it waits for, its kernels.

The default run covers every pair of choices; `make slow` runs all of them.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from fake_cuda import counts, ways
from fake_cuda.ways import EXPERTS, Way
from fake_cuda.worker import Worker

from tuning.presets import config as presets

BY_OFFSETS = "torch_varlen"
EVERY = tuple(ways.every())
CHOSEN = tuple(ways.covering(EVERY))
RECORDS: dict[Way, dict[str, Any]] = {}
MASKS = 2  # kinds of masks of one model: sliding and full
TRL_LOSS = (
    5  # numbers that trl's own loss reports at each micro-batch; experts' balance is one more
)


def record(worker: Worker, way: Way) -> dict[str, Any]:
    """What a step of `way` did; each is run once."""
    if way not in RECORDS:
        RECORDS[way] = worker.call("steps.step", **asdict(way))
    return RECORDS[way]


def check(found: dict[str, Any], way: Way) -> None:
    """Every tensor is on the device, in its type; nothing waits but what is named here."""
    assert found["asked"] == found["attention"]
    assert 5 < found["loss"] < 7 and found["loss_place"] == "cuda float32"
    assert [] == found["off_device"] == found["without_gradient"]
    assert {} == found["strays"], "made on the CPU in the middle of a step"
    assert {"cuda float32"} == set(found["trained"]) == set(found["gradients"])
    assert {"cuda float32"} == set(found["states"])

    waits = found["waits"]
    assert "layers" not in waits
    rest = waits.get("rest", {})
    assert set(rest) <= {"_local_scalar_dense"}
    # transformers asks whether sdpa can do without a mask
    masks = MASKS if found["attention"] == "sdpa" else 0
    reported = 0 if found["one_pass"] else TRL_LOSS
    assert rest.get("_local_scalar_dense", 0) <= masks + reported
    # loss and norm come back at once, the loss again for the log and the mean of the run;
    # a scaler asks whether a gradient overflowed
    scaled = way.precision == "float16"
    assert waits["loop"] == {"device to host": 1, "_local_scalar_dense": 2 + scaled}
    # the batch goes to the device tensor by tensor, while the host goes on
    assert set(found["ahead"]) == {"loop"} and found["ahead"]["loop"]["host to device"] <= 9

    layers = found["kernels"]["layers"]
    if found["attention"] == BY_OFFSETS:
        assert (2 + 2 * way.checkpointing, 2) == (
            layers["_varlen_attn"],
            layers["_varlen_attn_backward"],
        )
    # scores of all pairs are planned for eager, and for Falcon's one key head; routers have others
    all_pairs = found["attention"] == "eager" or way.family == "falcon"
    assert way.family in EXPERTS or all_pairs == any("softmax" in name for name in layers)
    if way.method == "qlora":
        assert way.fused != ("bitsandbytes::gemm_4bit" in layers)


@pytest.mark.parametrize("way", CHOSEN, ids=lambda way: way.name)
def test_a_step_stays_on_the_device(way: Way, worker: Worker) -> None:
    """Weights, gradients, optimizer state and loss are on cuda, in the types of the recipe."""
    check(record(worker, way), way)


@pytest.mark.parametrize("way", CHOSEN, ids=lambda way: way.name)
def test_a_step_runs_the_kernels_that_it_did(way: Way, worker: Worker) -> None:
    """Another number of casts, copies or products is a difference to kernels.json."""
    recorded = counts.read()
    if recorded["versions"] != counts.versions():
        pytest.skip(f"kernels.json is of other libraries, {recorded['versions']}")

    assert recorded["counts"][way.name] == counts.of(record(worker, way)), (
        "the kernels of a step have changed: say why, and write them down by make kernel-counts"
    )


OFFLOADED = ("llama", "qwen3moe", "gemma3-vision")


@pytest.mark.parametrize("family", OFFLOADED)
@pytest.mark.parametrize("tiled", [False, True])
def test_offloaded_inputs_cross_once_each_way(family: str, tiled: bool, worker: Worker) -> None:
    """To the host in the forward, back in the backward: not the embeddings, nor the last layer's.

    The layers wait for nothing else, and make nothing else on the host; the loss is that without.
    """
    way = ways.usual(family)
    found = worker.call("steps.offloaded", kept={"tiled_mlp": tiled}, **asdict(way))

    assert {"device to host": 1} == found["waits"].pop("layers")
    assert {"layers": {"empty_like": 1, "copy_": 1}} == found.pop("strays")
    plain = record(worker, way)
    assert plain["loss"] == pytest.approx(found["loss"], rel=0 if not tiled else 1e-5)
    check(found | {"strays": {}}, way)
    if not tiled:
        layers, copies = plain["kernels"]["layers"], {"copy_": 1}
        more = {name: layers.get(name, 0) + count for name, count in copies.items()}
        assert layers | more == found["kernels"]["layers"]


def test_embeddings_on_the_host_send_tokens_there_and_rows_back(worker: Worker) -> None:
    """Both once a micro-batch, and the table once before the first; the kernels stay the same."""
    choices = asdict(ways.usual("llama"))
    before, after = (
        worker.call("steps.offloaded", kept={"tiled_mlp": True, **more}, **choices)
        for more in ({}, {"host_embeddings": True})
    )

    more = {"device to host": 1, "host to device": 1}
    assert more == after["waits"].pop("rest") and "rest" not in before["waits"]
    assert 1 == after["waits"]["loop"].pop("device to host") - before["waits"]["loop"].pop(
        "device to host"
    )
    assert after["waits"] == before["waits"] and after["off_device"] == []
    assert {"_to_copy", "embedding"} == set(after["strays"].pop("rest"))
    assert after["strays"] == before["strays"] and after["loss"] == before["loss"]
    assert after["kernels"]["layers"] == before["kernels"]["layers"]
    assert "embedding" not in after["kernels"]["rest"]


@pytest.mark.slow
@pytest.mark.parametrize("way", [way for way in EVERY if way not in CHOSEN], ids=lambda w: w.name)
def test_every_way_stays_on_the_device(way: Way, worker: Worker) -> None:
    """The same for all families, methods, types, cards, attentions and kernels together."""
    check(record(worker, way), way)


def test_the_ways_cover_every_known_architecture() -> None:
    """A new `model_type` in configs/architectures.yaml needs a tiny family."""
    import tiny_models
    import transformers

    families = tiny_models.FAMILIES | tiny_models.MORE_FAMILIES
    known = {getattr(transformers, name).model_type for name, *_ in families.values()}

    assert set(presets.families()) <= known


def test_every_pair_of_choices_is_in_the_default_run() -> None:
    """Any two choices that can be made together are made together in one of the ways."""
    paired = [[w for w in some if w.family not in ways.BESIDE] for some in (EVERY, CHOSEN)]
    every, chosen = (set().union(*map(ways._pairs, some)) for some in paired)

    assert every == chosen and len(CHOSEN) < len(EVERY) / 20
    assert {way.family for way in EVERY} == {way.family for way in CHOSEN}
