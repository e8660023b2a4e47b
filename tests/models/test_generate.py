"""Base and adapter answer side by side, and a wrong pair is refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_runs
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tuning import adapter
from tuning.errors import SpecError
from tuning.models import generate, merge
from tuning.sources.base import weights_of
from tuning.training import train

Base = Callable[..., Path]
EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-model"


@pytest.fixture(scope="module")
def tuned(tiny_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny adapter that has learned to answer `yes yes` whatever it is asked."""
    run = tmp_path_factory.mktemp("chat")
    recipe = tiny_runs.recipe(dropout=0.0, learning_rate=2e-2, steps=40, epochs=10.0)
    asked = tiny_runs.request(
        run, tiny_base("phi3"), recipe, tiny_runs.placement(), questions=["cat dog"]
    )
    (run / "answers.json").write_text(json.dumps(train.work(asked)["answers"]))
    return run


def test_the_tuned_model_answers_as_it_did_in_training(tuned: Path, tiny_base: Base) -> None:
    """A session gives the base's and the tuned model's answers of the training run."""
    (expected,) = json.loads((tuned / "answers.json").read_text())
    session = generate.Session(tiny_base("phi3"), tuned / "adapter", max_new_tokens=64)

    said, base = session.ask("cat dog", compare=True)

    assert expected == {"question": "cat dog", "base": base, "tuned": said}
    assert said != base
    assert (said, None) == session.ask("cat dog")


def test_the_history_is_heard(tuned: Path, tiny_base: Base) -> None:
    """Earlier turns are part of the question, and the same question gets the same answer."""
    session = generate.Session(tiny_base("phi3"), tuned / "adapter", max_new_tokens=8)
    history = [
        {"role": "user", "content": "one two three"},
        {"role": "assistant", "content": "three two one"},
    ]

    first = session.ask("big dog", history=history)

    assert first == session.ask("big dog", history=history)


def test_without_an_adapter_the_base_answers(tiny_base: Base) -> None:
    """One answer, and nothing to compare it with."""
    said, base = generate.Session(tiny_base("phi3"), max_new_tokens=8).ask("cat", compare=True)

    assert base is None
    assert isinstance(said, str)


def test_an_answer_ends_where_the_template_ends_a_turn(tiny_base: Base) -> None:
    """`<|end|>` stops a Phi-3 answer although the tokenizer's end token is another."""
    session = generate.Session(tiny_base("phi3"))

    stops = generate.stops(session.model, session.tokenizer)

    names = session.tokenizer.convert_ids_to_tokens(stops)
    assert {"<|endoftext|>", "<|end|>"} == set(names)


def test_an_answer_ends_in_a_token_that_nothing_names(tmp_path: Path) -> None:
    """The bundled model with another end in its tokenizer and its configs: the template's marker,
    an added special token, ends the answer."""
    base = Path(shutil.copytree(EXAMPLE, tmp_path / "base"))
    for name, changes in {
        "tokenizer_config.json": {"eos_token": "<|pad|>"},
        "config.json": {"eos_token_id": 0},
        "generation_config.json": {"eos_token_id": 0},
    }.items():
        record = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps(record | changes))
    template = base / "chat_template.jinja"
    template.write_text(template.read_text().replace("eos_token", "'<|end|>'"))

    said, _ = generate.Session(base).ask("Who is Tamsin Vale?")

    expected, _ = generate.Session(EXAMPLE).ask("Who is Tamsin Vale?")
    assert expected == said
    assert 1 == said.count(".")


def test_an_adapter_of_another_base_is_refused(tuned: Path, tiny_base: Base) -> None:
    """Width and depth are checked before the weights load."""
    with pytest.raises(SpecError, match=r"MODEL-206 .*width 64; the base model has 128"):
        generate.Session(tiny_base("phi3", hidden_size=128), tuned / "adapter")


def test_an_adapter_of_another_family_is_refused(tuned: Path, tiny_base: Base) -> None:
    """Fused projections do not fit a base that keeps them apart."""
    with pytest.raises(SpecError, match=r"MODEL-210 .*does not fit the base model"):
        generate.Session(tiny_base("llama"), tuned / "adapter")


def test_a_hostile_config_never_reaches_peft(tuned: Path, tiny_base: Base, tmp_path: Path) -> None:
    """A config that names code to import is refused by our parser."""
    hostile = shutil.copytree(tuned / "adapter", tmp_path / "adapter")
    path = hostile / adapter.CONFIG
    record = json.loads(path.read_text()) | {"auto_mapping": {"parent_library": "antigravity"}}
    path.write_text(json.dumps(record))

    with pytest.raises(SpecError, match=r"MODEL-203 .*auto_mapping"):
        generate.Session(tiny_base("phi3"), hostile)


def test_a_base_without_a_chat_template_says_so(tiny_base: Base, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base("phi3"), tmp_path / "base")
    (base / "chat_template.jinja").unlink()

    with pytest.raises(SpecError, match=r"MODEL-211 .*no chat template"):
        generate.Session(base).ask("cat")


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "layers_pattern"])
def test_a_pattern_of_a_stranger_is_never_run(
    key: str, tuned: Path, tiny_base: Base, tmp_path: Path
) -> None:
    """One that backtracks for ever costs nothing; the modules are those of the tensors."""
    folder = tmp_path / "adapter"
    shutil.copytree(tuned / "adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config[key] = "(([a-z._0-9])+)+!"
    (folder / "adapter_config.json").write_text(json.dumps(config))

    session = generate.Session(tiny_base("phi3"), folder, max_new_tokens=4)

    adapted = [name for name, _ in session.model.named_parameters() if "lora_B" in name]
    assert len(adapter.inspect(folder).modules) == len(adapted)


@pytest.mark.parametrize("change", ["one weight", "beside", "renamed", "no record"])
def test_an_adapter_of_other_weights_is_refused(
    change: str, tuned: Path, tiny_base: Base, tmp_path: Path
) -> None:
    """Of the same shapes and another training: refused, unless told; other files do not matter."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny_base("phi3"), base)
    shutil.copytree(tuned / "adapter", folder)
    record = {} if change == "no record" else {"base_weights": weights_of(base)}
    (folder / "tuning.json").write_text(json.dumps(record))
    path = base / "model.safetensors"
    if change in ("one weight", "no record"):
        tensors = load_file(path)
        tensors["model.norm.weight"][0] += 1
        save_file(tensors, path, metadata={"format": "pt"})
    elif change == "renamed":
        index = {"metadata": {}}
        index["weight_map"] = dict.fromkeys(load_file(path), "model-00001-of-00001.safetensors")
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
        path.rename(base / "model-00001-of-00001.safetensors")
    else:
        (base / "generation_config.json").write_text('{"top_k": 9}')

    if change == "one weight":
        with pytest.raises(SpecError, match=r"MODEL-213 .*--any-base"):
            generate.Session(base, folder)
        with pytest.raises(SpecError, match=r"MODEL-213 .*--any-base"):
            merge.merge(base, folder, tmp_path / "merged", method="lora")
        merge.merge(base, folder, tmp_path / "merged", method="lora", any_base=True)

    session = generate.Session(base, folder, any_base=change == "one weight")
    assert isinstance(session.model, PeftModel)
