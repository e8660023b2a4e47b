"""Headers of a model's weights: from its folder, the cache, or ranges of the hub's files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_hub import MODEL, FakeHub
from safetensors.numpy import save

from tuning.errors import RefusedError, SpecError
from tuning.sources import base, headers

LARGE = 200_000  # numbers of the large tensor; a first look takes 100 kB
NAMES = {f"model.layers.{n}.self_attn.q_proj.weight": (3, n + 1) for n in range(1500)}


def files() -> dict[str, bytes]:
    """A model of two files: one with a header of more than a first look, one with much data."""
    many = {name: np.zeros(shape, np.float32) for name, shape in NAMES.items()}
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index = ", ".join(f'"{name}": "{first}"' for name in NAMES)
    return {
        "config.json": MODEL["config.json"],
        "tokenizer.json": b"{}",
        first: save(many),
        second: save({"lm_head.weight": np.zeros((4, LARGE // 4), np.float16)}),
        "model.safetensors.index.json": (
            f'{{"metadata": {{}}, "weight_map": {{{index}, "lm_head.weight": "{second}"}}}}'
        ).encode(),
    }


def test_headers_come_by_ranges(fake: FakeHub, tmp_path: Path) -> None:
    """All names, types and shapes, also of a long header; the weights stay at the hub."""
    fake.add("org/shards", files())
    model = base.resolve("org/shards", revision=None, token=None, cache=tmp_path)
    fake.sent = 0
    found = headers.read(model, token=None, cache=tmp_path)

    assert {n: t.shape for n, t in found.items()} == NAMES | {"lm_head.weight": (4, LARGE // 4)}
    assert {"F32", "F16"} == {tensor.dtype for tensor in found.values()}
    assert fake.sent < 0.25 * model.needed_bytes
    folder = base.fetch(model, cache=tmp_path)
    fake.requests.clear()
    assert found == headers.read(model, token=None, cache=tmp_path)
    assert found == headers.read(base.resolve(str(folder), revision=None, token=None), token=None)
    assert not fake.downloads()


def test_a_file_that_is_none_is_refused_by_its_header(fake: FakeHub, tmp_path: Path) -> None:
    """The revision cannot be trained on, and the message names its file."""
    name = "model-00002-of-00002.safetensors"
    fake.add("org/damaged", files() | {name: b"\xff" * 300_000})
    model = base.resolve("org/damaged", revision=None, token=None, cache=tmp_path)
    with pytest.raises(SpecError, match=f"BASE-105 org/damaged {name}"):
        headers.read(model, token=None, cache=tmp_path)


def test_headers_need_the_same_access_as_the_weights(fake: FakeHub, tmp_path: Path) -> None:
    """Of a gated model with its token only."""
    fake.add("org/closed", files(), gated=True)
    model = base.resolve("org/closed", revision=None, token=fake.token, cache=tmp_path)
    assert headers.read(model, token=fake.token, cache=tmp_path)
    with pytest.raises(RefusedError, match="HUB-101"):
        headers.read(model, token=fake.outsider, cache=tmp_path)


def test_only_what_the_index_leads_to_counts(fake: FakeHub, tmp_path: Path) -> None:
    """A shard that it does not name is not loaded, here and at the hub."""
    more = {"model-00003-of-00003.safetensors": save({"foo.weight": np.zeros((2, 2), np.float32)})}
    fake.add("org/more", files() | more)
    model = base.resolve("org/more", revision=None, token=None, cache=tmp_path)

    assert set(NAMES) | {"lm_head.weight"} == set(headers.read(model, token=None, cache=tmp_path))
