"""The model card and the provenance that travel with an adapter."""

import dataclasses
import re

import huggingface_hub
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from tuning import files
from tuning.pipeline import model_card

RECIPE = {
    "base_model": "org/model",
    "base_revision": "a" * 40,
    "data": ["d" * 64],
    "method": "qlora",
    "rank": 16,
    "alpha": 32.0,
    "steps": 120,
    "global_batch": 4,
    "max_length": 512,
    "learning_rate": 2e-4,
    "schedule": "cosine",
    "precision": "bfloat16",
    "versions": {"torch": "2.13.0"},
}
FACTS = model_card.Facts(
    preset="org/model",
    licence="mit",
    weights="sha256:" + "e" * 64,
    rows=300,
    trained_tokens=9000,
    trainable=1000,
    total=51000,
    loss_by_step=[(1, 3.5), (2, 2.5), (3, 1.0)],
    loss_before=3.25,
    loss_after=1.5,
)


def test_the_card_has_the_metadata_that_hubs_read(tmp_path):
    """Base model, library and licence are in the YAML block; figures in the table."""
    model_card.write(tmp_path, recipe=RECIPE, run_id="f" * 64, facts=FACTS)

    text = (tmp_path / "README.md").read_text()
    block = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.S)[1])

    assert ("org/model", "peft", "mit") == (
        block["base_model"],
        block["library_name"],
        block["license"],
    )
    assert "| loss | 3.5 -> 1 |" in text
    assert "| loss on held-out rows | 3.25 -> 1.5 |" in text
    assert f"`sha256:{'d' * 64}`" in text


@settings(deadline=None)
@given(
    st.sampled_from(["org/model", "gpt2", "1.5e3", "2024", "yes", "my model", "a: b", "/models/x"])
    | st.text(min_size=1, max_size=20),
    st.sampled_from([None, "mit", "llama3.1", "no"]),
)
def test_any_base_gives_metadata_that_a_hub_reads(base, licence):
    """Strings stay strings in YAML; a name that no repository can have is left out."""
    facts = dataclasses.replace(FACTS, licence=licence)
    card = ModelCard(model_card.card(RECIPE | {"base_model": base}, run_id="f" * 64, facts=facts))
    data = card.data.to_dict()

    assert ("peft", "text-generation") == (data["library_name"], data["pipeline_tag"])
    assert licence == data.get("license")
    assert ["lora", "qlora", "transformers"] == data["tags"][:3]
    named = data.get("base_model")
    assert named in (base, None)
    assert (f"base_model:adapter:{base}" in data["tags"]) == (named is not None)
    if base in ("org/model", "gpt2"):
        assert base == named
    if named is not None:
        huggingface_hub.utils.validate_repo_id(named)


def test_the_card_loads_the_adapter_as_it_says():
    """By name from a hub; of a local base, whose path does not travel, by the folder to name."""
    local = RECIPE | {"base_revision": "sha256:" + "a" * 64}
    hub, folder = (model_card.card(r, run_id="f" * 64, facts=FACTS) for r in (RECIPE, local))

    assert "AutoPeftModelForCausalLM.from_pretrained" in hub
    assert "PeftModel.from_pretrained(AutoModelForCausalLM" in folder
    for text in (hub, folder):
        lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
        compile("\n".join(lines), "card", "exec")


def test_the_provenance_holds_the_whole_recipe(tmp_path):
    """tuning.json names the run, the recipe and the loss by step."""
    model_card.write(tmp_path, recipe=RECIPE, run_id="f" * 64, facts=FACTS)

    record = files.read_json(tmp_path / "tuning.json")

    assert (RECIPE, "f" * 64) == (record["recipe"], record["run_id"])
    assert [[1, 3.5], [2, 2.5], [3, 1.0]] == record["loss_by_step"]


def test_a_loss_curve_is_one_short_line():
    """Falling values end low; many values are averaged; equal ones do not divide by zero."""
    assert "█▅▁" == model_card.curve([3.5, 2.5, 1.0])
    assert 60 == len(model_card.curve(range(1000)))
    assert "▁▁" == model_card.curve([1.0, 1.0])
    assert "" == model_card.curve([])
