"""A run whose layer inputs go to host memory, or that recomputes some layers, is the same run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny_runs

from tuning.errors import Stopped
from tuning.plan.backends import FUSED, VARLEN
from tuning.training import train

Base = Callable[..., Path]
FAST = tiny_runs.placement(attention=VARLEN, kernels=FUSED, checkpointing=True)
WAYS = (
    replace(FAST, activation_offloading=True),
    replace(FAST, recomputed_layers=1),
    replace(FAST, activation_offloading=True, host_embeddings=True),
)


@pytest.mark.parametrize("placement", WAYS)
def test_a_run_interrupted_and_resumed_gives_the_same_bytes(
    placement: Any, tiny_base: Base, signal_at: Any, tmp_path: Path
) -> None:
    """4-bit, packed, with dropout, stopped between two micro-batches; as checkpointing alone."""
    recipe = tiny_runs.recipe(method="qlora", packing=True, steps=4)

    def request(name: str, placed: Any) -> dict[str, Any]:
        return tiny_runs.request(tmp_path / name, tiny_base("llama"), recipe, placed, count=27)

    expected = train.work(request("plain", FAST))
    signal_at(1, 1)
    with pytest.raises(Stopped):
        train.work(request("other", placement))
    found = train.work(request("other", placement))

    assert 1 <= found["resumed_from"] < 4
    assert expected["adapter_sha256"] == found["adapter_sha256"]
    assert expected["loss_by_step"] == found["loss_by_step"]


def test_two_ranks_offload(tiny_base: Base, tmp_path: Path) -> None:
    """DDP adds up gradients as before, those of tiled MLPs once."""
    recipe = tiny_runs.recipe(precision="float32", learning_rate=1e-3, dropout=0.0, steps=3)
    two = replace(FAST, ranks=2, micro_batch=1, accumulation=2)
    kept = ({}, {"activation_offloading": True, "tiled_mlp": True})
    plain, tiled = (
        ranks.train(tmp_path / str(number), tiny_base("llama"), replace(two, **way), recipe=recipe)
        for number, way in enumerate(kept)
    )

    assert plain["loss_by_step"] == pytest.approx(tiled["loss_by_step"], rel=1e-5)
