"""`start_adapter`: training goes on from an adapter, in its shape, and only on its own base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import serving
import tiny_runs
import torch
from commands import good, tuning, workspace

import tuning.plan as plan
from tuning import adapter, files, spec
from tuning.console import Console
from tuning.errors import RefusedError, SpecError
from tuning.models import start_adapter
from tuning.models.load import load_for_training
from tuning.oci import delivery
from tuning.oci.access import Access
from tuning.oci.layout.package import build_adapter
from tuning.oci.policy import Trust
from tuning.pipeline import start
from tuning.training import train

Build = Callable[..., Path]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a short training of the bundled model, with a token of its own."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "rows.jsonl").write_text(ROWS)
    sections = {"ModelConfig": {"new_special_tokens": ["<|port|>"]}, "LoraConfig": {"r": 4}}
    good(tuning(*command(folder, sections)))
    return folder / "run" / "adapter"


ROWS = "\n".join(
    json.dumps(
        {
            "messages": [
                {"role": "user", "content": f"Where is number {n}?"},
                {"role": "assistant", "content": f"<|port|> {n}"},
            ]
        }
    )
    for n in range(8)
)


def command(folder: Path, sections: dict[str, Any], steps: int = 6) -> list[str]:
    settings = {"max_steps": steps, "packing": False, "learning_rate": 0.005}
    settings |= {"per_device_train_batch_size": 4}
    path = workspace(folder / "spec.yaml", settings=settings, sections=sections)
    return [
        *("run", "-f", str(path), "--base-model", str(serving.TINY), "--json"),
        *("--data", str(folder / "rows.jsonl"), "--run-dir", str(folder / "run")),
        *("--output", f"oci:{folder / 'image'}"),
    ]


def test_a_run_goes_on_from_an_image(taught: Path, tmp_path: Path) -> None:
    """The loss begins where the first run ended, in its rank, with its token and a new one; the
    recipe, the card and the same command again know of it."""
    shutil.copytree(taught.parents[1] / "image", tmp_path / "first")
    (tmp_path / "rows.jsonl").write_text(ROWS)
    sections = {
        "ModelConfig": {"start_adapter": "oci:first", "new_special_tokens": ["<|quay|>"]},
    }
    arguments = command(tmp_path, sections)

    summary = json.loads(good(tuning(*arguments)))

    before = files.read_json(taught / "tuning.json")
    recipe = files.read_json(tmp_path / "run" / "adapter" / "tuning.json")["recipe"]
    assert (4, ["<|port|>", "<|quay|>"]) == (recipe["rank"], recipe["new_tokens"])
    assert adapter.inspect(taught).sha256 == recipe["start_adapter"]
    assert recipe["start_adapter"] in (tmp_path / "run" / "adapter" / "README.md").read_text()
    losses = [loss for _, loss in before["loss_by_step"]]
    assert summary["training"]["loss_first"] < (losses[0] + losses[-1]) / 2
    again = json.loads(good(tuning(*arguments)))
    assert summary == again


def test_its_weights_are_the_first_ones(taught: Path, tmp_path: Path) -> None:
    """Bit for bit; rows of new tokens stay where they begin, and other weights are refused."""
    found = adapter.inspect(taught)
    recipe = plan.recipe_from_json(files.read_json(taught / "tuning.json")["recipe"])
    recipe = replace(recipe, new_tokens=("<|port|>", "<|quay|>"), start_adapter=found.sha256)

    tuned, _, _ = load_for_training(
        serving.TINY, recipe=recipe, placement=tiny_runs.placement(), start=taught
    )

    stored = safetensors.torch.load_file(taught / adapter.WEIGHTS)
    for name, tensor in train.round_adapter(tuned, torch.bfloat16).items():
        assert torch.equal(tensor[: len(stored[name])], stored[name].bfloat16())
    with pytest.raises(SpecError, match=r"MODEL-141 .*run the same command again"):
        start_adapter.load(tuned, taught, sha256="0" * 64)


def spec_of(path: Path, **sections: Any) -> spec.Spec:
    workspace(path / "ws.yaml", sections=sections)
    return spec.load(path / "ws.yaml", overrides=spec.Overrides(base_model=str(serving.TINY)))


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"r": 8, "lora_alpha": 16}, "MODEL-144 LoraConfig.r: is 8, and 4 in start_adapter"),
        ({"lora_alpha": 3}, "MODEL-144 LoraConfig.lora_alpha: is 3.0, and 8.0"),
        ({"use_dora": True}, "MODEL-144 LoraConfig.use_dora: is True, and False"),
        ({"use_rslora": True}, "MODEL-144 LoraConfig.use_rslora"),
        ({"target_modules": ["q_proj"]}, "MODEL-144 LoraConfig.target_modules: is q_proj, and "),
        ({"layers_to_transform": [0]}, "MODEL-144 LoraConfig.layers_to_transform: is 0, and "),
    ],
)
def test_another_shape_is_refused_by_a_plan(
    lora: dict[str, Any], words: str, taught: Path, tmp_path: Path
) -> None:
    """With the key to remove; the same shape, said again, is taken."""
    model = plan.known_base(spec_of(tmp_path))
    other = spec_of(tmp_path, ModelConfig={"start_adapter": str(taught)}, LoraConfig=lora)
    same = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    taken = spec_of(tmp_path, ModelConfig={"start_adapter": str(taught)}, LoraConfig=same)

    with pytest.raises(SpecError) as caught:
        start.known(other, model, access=Access())

    assert words in str(caught.value)
    shaped = start.known(taken, model, access=Access()).settings
    assert (4, 8.0, ("<|port|>",)) == (shaped.rank, shaped.alpha, shaped.new_tokens)
    assert shaped.layers is None


def test_the_plan_shows_it(taught: Path, tmp_path: Path) -> None:
    """Rank and tokens of the adapter, and where training begins."""
    spec_of(tmp_path, ModelConfig={"start_adapter": str(taught)})

    said = good(tuning("plan", "-f", tmp_path / "ws.yaml", "--base-model", serving.TINY))

    assert str(taught)[:20] in said
    assert "<|port|>" in said
    shown = json.loads(
        good(tuning("plan", "-f", tmp_path / "ws.yaml", "--base-model", serving.TINY, "--json"))
    )
    assert (4, ["<|port|>"]) == (shown["recipe"]["rank"], shown["recipe"]["new_tokens"])


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, tiny_base: Build) -> None:
    """Of another shape, before anything is fetched or trained."""
    other = serving.random_adapter(tiny_base("llama"), tmp_path / "other")
    asked = spec_of(tmp_path, ModelConfig={"start_adapter": str(other)})
    config = files.read_json(serving.TINY / "config.json")
    model = plan.base_of(asked, config, revision="local")

    with pytest.raises(SpecError, match=r"MODEL-206 .*is made for width 64"):
        start.known(asked, model, access=Access())


@pytest.mark.parametrize("change", [{"bias": "all"}, {"auto_mapping": {"a": "b"}}, {"r": 5}])
def test_an_adapter_that_cannot_be_trained_on_is_refused(
    change: dict[str, Any], taught: Path, tmp_path: Path
) -> None:
    """With what is wrong with it, from its config and header alone."""
    broken = shutil.copytree(taught, tmp_path / "broken")
    config = files.read_json(broken / adapter.CONFIG)
    (broken / adapter.CONFIG).write_text(json.dumps(config | change))
    asked = spec_of(tmp_path, ModelConfig={"start_adapter": str(broken)})

    with pytest.raises(SpecError, match=r"MODEL-143 .*cannot be used: MODEL-20"):
        start.known(asked, plan.known_base(spec_of(tmp_path)), access=Access())


def test_some_layers_stay_some_layers(taught: Path, tmp_path: Path) -> None:
    """Short names and layers where each layer has the same; else every full name."""
    found = adapter.inspect(taught)
    model = plan.known_base(spec_of(tmp_path))
    layers = {int(name.split(".")[2]) for name in found.modules}
    assert model.facts is not None and layers == set(range(model.facts.layers))

    def cut(keep: Callable[[str], bool]) -> adapter.Adapter:
        tensors = {name: t for name, t in found.tensors.items() if keep(name)}
        return replace(found, tensors=tensors)

    first = cut(lambda name: ".layers.0." in name)
    assert (0,) == start._named(first, model)[1]
    ragged = cut(lambda name: not (".layers.0." in name and "q_proj" in name))
    names, all_layers = start._named(ragged, model)
    assert all_layers is None and names == ragged.modules


def test_signatures_that_are_required_are(taught: Path, tmp_path: Path) -> None:
    """A layout has none, so the policy that wants them refuses it, as elsewhere."""
    layout = tmp_path / "image"
    build_adapter(taught, layout, preset="x", run_id="r", annotations={})
    key = tmp_path / "key.pub"
    key.write_text("")
    access = Access(trust=Trust(signatures="require", keys=(key,)))

    with pytest.raises(RefusedError, match=r"SIGN-110 .*has no signatures"):
        delivery.pull(
            f"oci:{layout}", tmp_path / "pulled", access=access, console=Console(quiet=True)
        )
