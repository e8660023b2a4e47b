"""The model card and the provenance that travel with an adapter."""

import re

import yaml

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
