"""`--set KEY=VALUE` reaches every key of the ConfigMap, and says what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tuning import spec
from tuning.errors import SpecError
from tuning.spec import Overrides, keys

NUMBERS = [
    key
    for rows in keys.sections().values()
    for key in rows.values()
    if key.type in ("number", "count") and key.use == "honoured"
]
SETTINGS = {"TrainingArguments": {"learning_rate": 0.001, "warmup_ratio": 0.1, "max_steps": 7}}


def said(*assigned: str, method: str | None = None) -> spec.Spec:
    """The spec of a command line without a file."""
    overrides = Overrides(set=assigned, method=method)
    return spec.from_command_line("org/model", ("org/rows",), overrides=overrides)


def refusals(*assigned: str) -> list[str]:
    """What is wrong, as people read it."""
    with pytest.raises(SpecError) as caught:
        said(*assigned)
    return [str(problem) for problem in caught.value.problems]


def written(folder: Path, *, config: str = "mine") -> Path:
    """A Workspace with a ConfigMap, in a file."""
    workspace = {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": "own"},
        "tuning": {
            "preset": {"name": "org/model"},
            "method": "qlora",
            "config": config,
            "input": {"urls": ["https://data.example.com/a.jsonl"]},
            "output": {"image": "registry.example.com/a:1", "imagePushSecret": "login"},
        },
    }
    text = yaml.safe_dump({"training_config": SETTINGS})
    data = {"data": {"training_config.yaml": text}}
    mine = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "mine"}, **data}
    path = folder / "w.yaml"
    path.write_text(yaml.safe_dump_all([workspace, mine]))
    return path


@pytest.mark.parametrize("key", NUMBERS, ids=lambda key: key.name)
@pytest.mark.parametrize("form", ["{0.name}", "{0.section}.{0.name}"])
def test_every_number_can_be_set_by_its_name(key: keys.Key, form: str) -> None:
    """With or without its section; a value out of its range names the flag and the range."""
    inside = 0.5 if key.type == "number" and 1 in (key.below, key.max) else 8
    needs = ("train_test_split=0.9", "eval_steps=5") if "early" in key.name else ()
    name = form.format(key)
    assert key.setting is not None

    assert inside == getattr(said(f"{name}={inside}", *needs).settings, key.setting)
    (refused,) = refusals(f"{name}=-2")
    assert f"SPEC-104 --set {name}: is -2" in refused


def test_no_name_means_two_settings() -> None:
    """So that a section need not be written."""
    settings: dict[str, set[str | None]] = {}
    for rows in keys.sections().values():
        for key in rows.values():
            if key.use == "honoured":
                settings.setdefault(key.name, set()).add(key.setting)

    assert {} == {name: found for name, found in settings.items() if len(found) > 1}


def test_what_is_set_replaces_what_the_file_says(tmp_path: Path) -> None:
    """Also under another name of the same setting; the rest of the file stays."""
    overrides = Overrides(set=("learning_rate=1e-4", "warmup_steps=5"), method="lora")
    actual = spec.load(written(tmp_path), overrides=overrides)

    s = actual.settings
    assert ("lora", 1e-4, 5, 7) == (actual.method, s.learning_rate, s.warmup, s.max_steps)
    again = tmp_path / "again.yaml"
    again.write_text(spec.dump(actual))
    assert actual.settings == spec.load(again).settings


def test_a_template_of_kaito_gives_way(tmp_path: Path) -> None:
    """A file that names KAITO's template gets a ConfigMap of its own."""
    path = written(tmp_path, config="qlora-params-template")
    actual = spec.load(path, overrides=Overrides(set=("r=32",), method="lora"))

    assert ("lora", 32, None) == (actual.method, actual.settings.rank, actual.settings.max_steps)
    assert actual.config is not None
    assert "own-settings" == actual.config["metadata"]["name"]


@pytest.mark.parametrize(
    ("assigned", "setting", "value"),
    [
        ("target_modules=q_proj,v_proj", "target_modules", ("q_proj", "v_proj")),
        ("target_modules=[q_proj, v_proj]", "target_modules", ("q_proj", "v_proj")),
        ("report_to=mlflow,wandb", "report_to", ("mlflow", "wandb")),
        ("run_name=a=b", "run_name", "a=b"),
        ("max_steps=null", "max_steps", None),
        ("shuffle_dataset=false", "shuffle", False),
    ],
)
def test_values_are_read_as_yaml(assigned: str, setting: str, value: object) -> None:
    """Lists may be written with commas; null means not set."""
    assert value == getattr(said(assigned).settings, setting)


def test_all_problems_come_in_one_pass_with_what_was_written() -> None:
    """Unknown, ambiguous, not KEY=VALUE, of a wrong type; each with its remedy."""
    bad = ("max_stepz=4", "lr=1", "foo", "Training.x=3", "seed=many", "max_length=[", "beta={")
    bad += ("learning_rate=", "run_name= ", "method=qlora")
    refused = "\n".join(refusals(*bad))

    for words in (
        '--set max_stepz: unknown key. Change: did you mean "max_steps" of TrainingArguments',
        "--set lr: unknown key. Change: use TrainingArguments.learning_rate",
        "--set foo: ",
        '--set Training.x: unknown section. Change: did you mean "TrainingArguments"',
        '--set max_length: "[" is not a value',
        "--set learning_rate: has no value",
        "run_name=null for none",
        "--set method: unknown key. Change: give --method",
        '--set beta: "{" is not a value',
        '--set seed: is "many", expected a whole number',
    ):
        assert words in refused


@pytest.mark.parametrize(
    ("assigned", "words"),
    [
        (("max_length=64", "max_seq_length=128"), "max_seq_length: contradicts max_length"),
        (("max_length=64", "max_length=128"), "max_length: is given twice, with two values"),
        (("warmup_ratio=0.5", "warmup_steps=1"), "warmup_steps: contradicts warmup_ratio"),
        (
            ("assistant_only_loss=true", "completion_only_loss=false"),
            "completion_only_loss: contradicts assistant_only_loss",
        ),
        (("fp16=true", "bf16=true"), "bf16: contradicts fp16, which asks for float16"),
        (("ModelConfig.dtype=float16", "bf16=true"), "bf16: contradicts dtype"),
    ],
)
def test_two_of_them_that_contradict_are_refused(assigned: tuple[str, ...], words: str) -> None:
    """As in a ConfigMap: neither is dropped in silence. The same twice is no contradiction."""
    (refused,) = refusals(*assigned)

    assert "SPEC-108" in refused and words in refused
    assert said(assigned[0], assigned[0]).settings == said(assigned[0]).settings


def test_what_counts_as_not_set_is_noted() -> None:
    """Values of KAITO's templates do nothing, and the run says so."""
    (note,) = said("per_device_train_batch_size=1").notes

    assert "--set per_device_train_batch_size: 1 counts as not set: the plan decides" == note


@pytest.mark.parametrize("name", ["load_in_4bit", "deepspeed", "trust_remote_code"])
def test_refused_keys_are_refused_under_the_flag(name: str) -> None:
    """As in a file."""
    (refused,) = refusals(f"{name}=true")

    assert f"--set {name}" in refused or "QuantizationConfig" in refused
