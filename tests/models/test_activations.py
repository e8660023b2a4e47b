"""Where activations lie changes no result: on the host, recomputed in part, MLPs in tiles."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import bitsandbytes as bnb
import pytest
import tiny_runs
import torch

from tuning.models import activations
from tuning.models.kernels import fuse, linear
from tuning.models.load import load_base
from tuning.models.lora import adapt
from tuning.plan.activations import ALL, INPUTS, LOOKED_UP, OFFLOADED, TILED, TILES, Activations
from tuning.plan.backends import FUSED

Build = Callable[..., Path]
Step = tuple[torch.Tensor, dict[str, torch.Tensor]]
SHAPES = ((2, 37), (1, 5), (3, 1))


def adapted(
    folder: Path, kept: Activations, *, method: str = "lora", fused: bool = True, **changes: Any
) -> Any:
    """A tiny model in float32 with LoRA layers that do something, in training."""
    packing = tiny_runs.NF4 | {"compute": "float32"} if method == "qlora" else None
    recipe = tiny_runs.recipe(
        **{"method": method, "precision": "float32", "dropout": 0.0, "quantisation": packing}
        | changes
    )
    base = load_base(folder, precision="float32", quantisation=packing, device="cpu")
    tuned, _ = adapt(base, recipe)
    draw = torch.Generator().manual_seed(0)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.05, generator=draw)
    tuned.enable_input_require_grads()
    if kept.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    if fused:
        fuse.fuse(tuned, FUSED)
    activations.arrange(tuned, kept)
    return tuned.train()


def step(tuned: Any, shape: tuple[int, int], seed: int = 1) -> Step:
    """Loss and gradients of a step."""
    tuned.zero_grad()
    torch.manual_seed(seed)
    ids = torch.randint(3, 200, shape)
    loss = tuned(input_ids=ids, labels=ids, use_cache=False).logits.square().mean()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in tuned.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *(("llama", method) for method in ("lora", "qlora")),
        *((family, "lora") for family in ("falcon", "gemma3", "gemma3-vision")),
        ("qwen3moe", "qlora"),
        ("gptoss", "lora"),
    ],
)
def test_offload_and_selective_checkpointing_change_no_bit(
    family: str, method: str, tiny_base: Build
) -> None:
    """Loss and all gradients, of dense models, mixtures and a text model with a tower."""
    folder, options = tiny_base(family), {"method": method, "fused": family == "llama"}
    plain = adapted(folder, INPUTS, **options)
    expected = [step(plain, shape) for shape in SHAPES]

    for kept in (OFFLOADED, Activations(True, 1), Activations(True, 0), ALL):
        tuned = adapted(folder, kept, **options)
        for shape, (loss, gradients) in zip(SHAPES, expected, strict=True):
            found = step(tuned, shape)
            assert torch.equal(loss, found[0]), kept
            assert gradients.keys() == found[1].keys()
            assert [] == [n for n, g in gradients.items() if not torch.equal(g, found[1][n])], kept


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
def test_a_weight_that_is_kept_is_unpacked_twice_and_changes_no_bit(
    family: str, tiny_base: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the forward, which forgets it, and in the layer's second one; not for the backward.

    An MLP's last weight is not used in the second forward, unless a norm comes after it: then its
    own backward unpacks it.
    """
    folder, keeping = tiny_base(family), Activations(True, unpacked=True)
    before, after = (adapted(folder, kept, method="qlora") for kept in (INPUTS, keeping))
    made: list[weakref.ref[torch.Tensor]] = []
    own = bnb.functional.dequantize_4bit

    def counted(*args: Any, **options: Any) -> torch.Tensor:
        whole = own(*args, **options)
        made.append(weakref.ref(whole))
        return whole

    monkeypatch.setattr(bnb.functional, "dequantize_4bit", counted)
    loss, gradients = step(before, (2, 37))
    times = len(made)
    made.clear()
    alive: list[int] = []
    after.get_output_embeddings().register_forward_hook(
        lambda *_: alive.append(sum(each() is not None for each in made))
    )
    found = step(after, (2, 37))

    packed, last = sum(map(_packed, after.modules())), len(activations.decoder_layers(after))
    normed = family == "gemma3"
    assert 3 * packed - (0 if normed else last) == times
    assert 2 * packed + (last if normed else 0) == len(made)
    assert [0] == alive and not any(each() is not None for each in made)
    assert torch.equal(loss, found[0])
    assert [] == [n for n, g in gradients.items() if not torch.equal(g, found[1][n])]


def test_layers_that_keep_their_activations_keep_no_unpacked_weight(tiny_base: Build) -> None:
    """They would all be alive at once."""
    tuned = adapted(tiny_base("llama"), Activations(True, 1, unpacked=True), method="qlora")
    first, second = activations.decoder_layers(tuned)
    for layer, keeps in ((first, True), (second, False)):
        found = {getattr(m, linear.KEEPS, False) for m in layer.modules() if _packed(m)}
        assert {keeps} == found


def _packed(module: Any) -> bool:
    return isinstance(module, bnb.nn.Linear4bit)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_on_the_host_change_no_bit(tied: bool, tiny_base: Build) -> None:
    """They are no parameter any more: all of those are on the device. Tied ones stay."""
    folder = tiny_base("llama", tie_word_embeddings=tied)
    before, after = (adapted(folder, kept) for kept in (TILED, LOOKED_UP))
    (loss, gradients), found = step(before, (2, 37)), step(after, (2, 37))

    embedding = after.get_input_embeddings()
    assert tied == isinstance(embedding.weight, torch.nn.Parameter)
    assert torch.equal(before.get_input_embeddings().weight, embedding.weight)
    names = [{name for name, _ in tuned.named_parameters()} for tuned in (before, after)]
    lost = {"base_model.model.model.embed_tokens.weight"}
    assert names[0] - names[1] == (set() if tied else lost)
    assert torch.equal(loss, found[0])
    assert all(torch.equal(g, found[1][n]) for n, g in gradients.items())


def test_embeddings_that_are_trained_stay(tiny_base: Build) -> None:
    """As those of new tokens are."""
    tuned = adapted(tiny_base("llama", tie_word_embeddings=False), INPUTS)
    tuned.get_input_embeddings().weight.requires_grad_()
    activations.arrange(tuned, LOOKED_UP)
    assert isinstance(tuned.get_input_embeddings().weight, torch.nn.Parameter)


def test_dropout_is_the_same_when_offloaded(tiny_base: Build) -> None:
    """Random numbers are drawn again as they were."""
    options = {"dropout": 0.3, "fused": False}
    loss, gradients = step(adapted(tiny_base("llama"), INPUTS, **options), (2, 37))
    for kept in (OFFLOADED, TILED):  # MLPs with dropout are left whole
        found = step(adapted(tiny_base("llama"), kept, **options), (2, 37))
        assert torch.equal(loss, found[0])
        assert all(torch.equal(g, found[1][n]) for n, g in gradients.items())


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3", "falcon", "phi2"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_tiled_mlp_gives_what_a_whole_one_does(
    family: str, method: str, tiny_base: Build
) -> None:
    """To rounding: gradients of weights are added up in another order. Rows of any length."""
    whole = adapted(tiny_base(family), INPUTS, method=method)
    tiled = adapted(tiny_base(family), TILED, method=method)
    assert 2 == sum(hasattr(m.forward, "func") for m in tiled.modules())

    for number, shape in enumerate(SHAPES):
        (loss, gradients), found = step(whole, shape, number), step(tiled, shape, number)
        torch.testing.assert_close(loss, found[0], rtol=1e-5, atol=0)
        most = max(float(gradient.abs().max()) for gradient in gradients.values())
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5 * most)


def test_an_mlp_that_takes_more_than_the_hidden_states_stays_whole(tmp_path: Path) -> None:
    """BLOOM's adds the residual itself: tiles would call it without."""
    folder = architectures.write("bloom", tmp_path / "bloom")
    whole, tiled = (step(adapted(folder, kept, fused=False), (2, 9)) for kept in (INPUTS, TILED))
    assert torch.equal(whole[0], tiled[0])


def test_a_strided_input_gets_its_gradient(tiny_base: Build) -> None:
    """Rows that lie transposed in memory: the gradient is written where it is returned."""
    tuned = adapted(tiny_base("llama"), TILED)
    layer = tuned.get_base_model().model.layers[0]
    x = torch.randn(5, 2, layer.mlp.gate_proj.in_features).transpose(0, 1)
    found = []
    for forward in (layer.mlp.forward, type(layer.mlp).forward.__get__(layer.mlp)):
        leaf = x.detach().requires_grad_()
        assert not leaf.is_contiguous()
        forward(leaf).square().sum().backward()
        found.append(leaf.grad)
    assert torch.allclose(*found, rtol=1e-4, atol=1e-6) and found[0].any()


def test_a_tile_is_computed_twice_and_recomputed_layers_skip_it(tiny_base: Build) -> None:
    """In the forward and in its own backward: as often as with checkpointing alone."""
    tuned = adapted(tiny_base("llama"), TILED)
    mlps = [module for module in tuned.modules() if hasattr(module.forward, "func")]
    rows: list[int] = []
    for module in mlps:
        inner = module.forward.args[1]

        def counted(x: torch.Tensor, inner: Any = inner) -> Any:
            rows.append(x.shape[1])
            return inner(x)

        module.forward = type(module.forward)(module.forward.func, module, counted)
    step(tuned, (2, 32))

    assert [2 * 32 // TILES] * (2 * TILES * len(mlps)) == rows


def test_inputs_of_layers_are_held_on_the_host_only_until_their_backward(tiny_base: Build) -> None:
    """One tensor a layer but the first, whose input stays: embeddings."""
    folder = tiny_base("llama", num_hidden_layers=6)
    tuned = adapted(folder, INPUTS)
    made: list[weakref.ref[torch.Tensor]] = []

    def host(tensor: torch.Tensor) -> torch.Tensor:
        copy = torch.empty_like(tensor)
        made.append(weakref.ref(copy))
        return copy

    activations.arrange(tuned, OFFLOADED, host=host)
    alive: list[int] = []
    gc.disable()
    try:
        for layer in activations.decoder_layers(tuned):
            layer.register_forward_hook(
                lambda *_: alive.append(sum(each() is not None for each in made))
            )
        step(tuned, (1, 8))
        # forward, and again from the last layer to the first: each copy goes with its layer
        assert [0, 1, 2, 3, 4, 5] == alive[:6]
        assert alive[6:] == sorted(alive[6:], reverse=True) or not alive[6:]
        assert 0 == sum(each() is not None for each in made)
    finally:
        gc.enable()


def test_two_forwards_before_their_backwards(tiny_base: Build) -> None:
    """As KTO has them: each has its own inputs back."""
    found = []
    for kept in (INPUTS, OFFLOADED):
        tuned = adapted(tiny_base("llama"), kept)
        ids = torch.arange(3, 40)[None]
        first, second = (tuned(input_ids=i, use_cache=False).logits for i in (ids, ids + 7))
        (first.square().mean() - second.square().mean()).backward()
        found.append({n: p.grad for n, p in tuned.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())
