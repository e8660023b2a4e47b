"""A checkpoint's headers against its class: what loading would refuse is known without weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import architectures
import pytest
import quantised_bases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tuning import safetensors
from tuning.errors import SpecError
from tuning.models.compare import compare
from tuning.models.load import load_base
from tuning.safetensors import Tensor

Build = Callable[..., Path]


def described(base: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config.json of `base`, and the tensors of its files."""
    record: dict[str, Any] = json.loads((base / "config.json").read_text())
    found: dict[str, Tensor] = {}
    for path in base.glob("*.safetensors"):
        found |= safetensors.read_header(path)
    return record, found


def refusal(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str | None:
    """What the comparison refuses; None if it finds that all is there."""
    try:
        assert compare("org/model", record, tensors)
    except SpecError as error:
        return str(error)
    return None


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(data=st.data(), family=st.sampled_from(["llama", "qwen3moe", "gemma3"]))
def test_the_headers_say_what_loading_would(
    data: st.DataObject, family: str, tiny_base: Build, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each weight that is gone or has another shape: the same refusal, or the same silence."""
    whole = tiny_base(family)
    record, tensors = described(whole)
    name = data.draw(st.sampled_from(sorted(tensors)))
    gone = data.draw(st.booleans())
    base = tmp_path_factory.mktemp("base")
    shutil.copytree(whole, base, dirs_exist_ok=True)
    held = load_file(base / "model.safetensors")
    shape = (tensors[name].shape[0] + 1, *tensors[name].shape[1:])
    changed = Tensor(tensors[name].dtype, shape)
    if gone:
        del held[name], tensors[name]
    else:
        held[name], tensors[name] = held[name].new_zeros(shape), changed
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})

    said = refusal(record, tensors)
    try:
        load_base(base, precision="float32", quantisation=None, device="cpu")
        loaded = None
    except SpecError as error:
        loaded = str(error).replace(str(base), "org/model")
    assert said == loaded
    assert loaded is not None or gone  # an output layer that is the embedding need not be there


@pytest.mark.parametrize("form", sorted(quantised_bases.FORMATS))
def test_packed_weights_are_compared_as_the_ones_they_stand_for(
    form: str, tiny_base: Build, tmp_path: Path
) -> None:
    """Whole ones pass; one that is gone is missed with its scale."""
    family = "gptoss" if form == "mxfp4" else "llama"
    base, _ = quantised_bases.pair(tiny_base(family), tmp_path, form)
    record, tensors = described(base)
    assert refusal(record, tensors) is None
    stem = "mlp.experts.down_proj" if form == "mxfp4" else "mlp.down_proj"
    less = {name: tensor for name, tensor in tensors.items() if f"layers.1.{stem}" not in name}
    assert len(less) < len(tensors)
    assert "MODEL-119" in str(refusal(record, less))


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_act": "bogus"},
        {"rms_norm_eps": "1e-6"},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"num_attention_heads": 0},
    ],
)
def test_a_config_of_which_no_model_can_be_made_is_named(
    values: dict[str, Any], tiny_base: Build
) -> None:
    """Before the files are blamed, or the tokenizer that transformers loads by it."""
    record, tensors = described(tiny_base("olmo2"))
    assert "MODEL-103 org/model/config.json" in str(refusal(record | values, tensors))


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type",
    [name for name in architectures.model_types() if name not in architectures.UNBUILT],
)
def test_no_class_is_refused_whose_weights_are_whole(model_type: str, tmp_path: Path) -> None:
    """Every class of transformers that can be built: what it saves itself is all that it has."""
    architectures.write(model_type, tmp_path)
    record, tensors = described(tmp_path)
    assert compare(model_type, record, tensors) or model_type in ("emu3", "mllama")
