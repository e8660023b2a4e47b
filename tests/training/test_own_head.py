"""The loss that is trained is that of the model's own logits, whatever its output layer is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny_runs
import torch

from tuning import presets
from tuning.errors import SpecError, Stopped
from tuning.models.kernels import apart, whole
from tuning.models.load import load_for_training
from tuning.plan.backends import FUSED
from tuning.training import own_head, train
from tuning.training.distributed import Ranks
from tuning.training.interruption import Interruption

RECIPE = tiny_runs.recipe(precision="float32", dropout=0.0, max_length=64)
# dense, GELU and norm; a cap of another name; a scale; as wide as no layer; plain; experts
KINDS = ("bert", "recurrent_gemma", "granite", "rembert", "llama", "qwen3_moe")
# What these say of a row changes with the length of its batch: ProphetNet in transformers 5.x;
# sparse attention where scores tie, as half of a random indexer's are 0
BY_LENGTH = ("prophetnet", "deepseek_v32", "dots3_note_text", "hy_v4")


def loop_of(name: str, folder: Path, kernels: tuple[str, ...] = FUSED, **changes: Any) -> Any:
    """A trainer of a tiny model of the class, before its first step."""
    base = architectures.write(name, folder / "base")
    kind = presets.class_of({"model_type": name})
    attention = kind.attention if kind else "sdpa"
    placement = tiny_runs.placement(attention=attention, kernels=kernels)
    recipe = tiny_runs.recipe(precision="float32", dropout=0.0, max_length=64, **changes)
    asked = train.Request.from_json(tiny_runs.request(folder, base, recipe, placement, count=4))
    tuned, tokenizer, _ = load_for_training(base, recipe=recipe, placement=placement)
    with Interruption() as stop:
        return train._trainer(asked, stop, Ranks(), tuned, tokenizer, train.read_rows(asked.train))


def same(loop: Any, numbers: tuple[int, ...] = (0, 1)) -> None:
    """Assert loss and gradients of a batch of these rows."""
    rows = [loop.train_dataset[number] for number in numbers]
    batch = loop._prepare_inputs(loop.data_collator(rows))
    del batch["weight"]  # as a step does: hybrids hand what they do not know to a convolution
    model = loop.model.eval()  # no dropout of the base's own
    weights = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    for weight in weights:
        weight.data = torch.randn(weight.shape, generator=generator) * 0.05
    count = loop._get_num_items_in_batch([batch], "cpu")
    loss = loop.compute_loss(model, dict(batch), num_items_in_batch=count)
    found = torch.autograd.grad(loss, weights)

    expected, labels = torch.zeros(()), 0
    for row in rows:
        ids, wanted = (torch.tensor(row[key].tolist())[None] for key in ("input_ids", "labels"))
        logits = model(input_ids=ids, use_cache=False).logits.float()
        scored = logits[:, :-1].log_softmax(-1).gather(-1, wanted[:, 1:, None].clamp(min=0))
        expected = expected - scored[..., 0][wanted[:, 1:] >= 0].sum()
        labels += int((wanted[:, 1:] >= 0).sum())
    gradients = torch.autograd.grad(expected / labels, weights)

    assert (expected / labels).item() == pytest.approx(loss.item(), rel=1e-5)
    ours, theirs = (torch.cat([g.flatten() for g in each]) for each in (found, gradients))
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-3


@pytest.mark.parametrize("kernels", [FUSED, ()], ids=["fused", "plain"])
@pytest.mark.parametrize("name", KINDS)
def test_the_loss_is_the_models_own(name: str, kernels: tuple[str, ...], tmp_path: Path) -> None:
    """trl's head skips what BERT's layer does after the hidden states, and knows caps by name."""
    loop = loop_of(name, tmp_path, kernels)
    same(loop)
    assert (name in ("bert", "recurrent_gemma", "rembert")) == loop.own_head


@pytest.mark.sweep
@pytest.mark.parametrize(
    "name",
    [
        name
        for name in architectures.model_types()
        if (kind := presets.class_of({"model_type": name}))
        and kind.architecture
        and not kind.refused
    ],
)
def test_the_loss_of_every_class(name: str, tmp_path: Path) -> None:
    """All of transformers' causal-LM mapping that trains."""
    loop = loop_of(name, tmp_path)
    for rows in [(0,), (1,)] if name in BY_LENGTH else [(0, 1)]:
        same(loop, rows)


def test_a_head_of_an_unknown_class_is_compared(tmp_path: Path, monkeypatch: Any) -> None:
    """Without the table the difference is found on the model."""
    monkeypatch.setattr(own_head.presets, "class_of", lambda _: None)
    assert loop_of("bert", tmp_path).own_head
    assert not loop_of("llama", tmp_path / "llama", ()).own_head


def test_preferences_are_refused(tmp_path: Path) -> None:
    """trl's log-probabilities would be those of another model."""
    with pytest.raises(SpecError, match="MODEL-121"):
        loop_of("bert", tmp_path, objective="dpo", beta=0.1)


def test_a_stop_is_no_difference(tmp_path: Path) -> None:
    """A signal during the comparisons before the first step ends the run, and nothing else."""
    loop = loop_of("llama", tmp_path, ())

    def stopped(*_: Any) -> None:
        raise Stopped.at("RUN-100", "run", "was stopped", "run the same command again")

    loop.model.get_base_model().model.register_forward_pre_hook(stopped)
    for compared in (
        lambda: own_head.differs(loop.model, torch.float32, 1e-3),
        lambda: apart.fault(loop.model, "sdpa", torch.float32),
        lambda: whole._agrees(loop.model, torch.float32, [], [], packing=False),
    ):
        with pytest.raises(Stopped):
            compared()
