"""One optimizer step of the trainer on the fake device, for one way to train one family."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import tiny_models
import tiny_runs
import torch
import transformers
from fake_cuda.device import Card, Device
from fake_cuda.spy import Spy
from fake_cuda.ways import CARDS, Way

from tuning.models import four_bit
from tuning.models.kernels import whole
from tuning.models.load import DTYPES, load_base
from tuning.models.lora import adapt
from tuning.plan import backends
from tuning.plan.device import Device as Planned
from tuning.presets import class_of, facts
from tuning.training.arguments import sft_config
from tuning.training.progress import Saves
from tuning.training.trainer import Exact


@cache
def _root() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fake-cuda-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def base(family: str) -> Path:
    """The folder of a tiny model of two layers."""
    return tiny_models.build(family, _root() / family)


class Watched(Exact):
    """The trainer; decoder layers, the rest of a micro-batch and the loop are told apart."""

    spy: Spy
    asked: str  # the attention that was to be used

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        layers = self._layers()
        hooks = [
            layers[0].register_forward_pre_hook(lambda *_: self.spy.enter("layers")),
            layers[-1].register_forward_hook(lambda _, __, out: self._behind(out)),
        ]
        self.spy.enter("rest")
        try:
            return super().training_step(*args, **kwargs)
        finally:
            self.spy.enter("loop")
            for hook in hooks:
                hook.remove()

    def _layers(self) -> list[Any]:
        """The decoder layers: blocks of the model's longest list of modules with adapters."""
        lists = [m for m in self.model.modules() if isinstance(m, torch.nn.ModuleList)]
        with_adapters = [m for m in lists if any("lora_A" in name for name, _ in m.named_modules())]
        return list(with_adapters[0])

    def _behind(self, output: Any) -> None:
        """The layers' forward has ended; their backward begins with the gradient of the output.

        It ends the step: what is before the layers is frozen.
        """
        if self.spy.phase != "layers" or self.spy.backward:
            return  # run again, for checkpointing
        self.spy.enter("rest")
        hidden = output[0] if isinstance(output, tuple) else output
        hidden.register_hook(lambda _: self.spy.enter("layers", backward=True))

    def save(self, random: Any) -> None:
        """A checkpoint is no part of the step."""


def step(device: Device, **choices: Any) -> dict[str, Any]:
    """What one optimizer step did, and where its tensors are.

    Kernels and waits are those of the decoder layers, of the rest of the micro-batch, and of the
    loop around it with the optimizer.
    """
    return _step(device, Way(**choices), {})


def offloaded(device: Device, kept: dict[str, bool], **choices: Any) -> dict[str, Any]:
    """The same with the layers' inputs in host memory."""
    return _step(device, Way(**choices), {"activation_offloading": True, **kept})


def _step(device: Device, way: Way, kept: dict[str, bool]) -> dict[str, Any]:
    device.become(Card(way.card, CARDS[way.card]))
    loop, spy = _trainer(way, kept)
    watch_gradients = _gradients(loop)
    with spy:
        loop.train()
    return _record(loop, spy, watch_gradients) | {"asked": loop.asked}


def _attention(way: Way, config: dict[str, Any]) -> tuple[str, bool]:
    """The attention of the plan or the config, and whether rows are packed."""
    shape, kind = facts(config), class_of(config)
    card = Planned("cuda", way.card, 1, 1 << 34, True, CARDS[way.card])
    precision = way.precision
    planned = backends.attention(shape, card, precision=precision, packages=(), kind=kind).name
    chosen = planned if way.attention == "planned" else way.attention
    safe = shape.packing_safe if shape else kind is not None and kind.packing
    return chosen, safe and chosen != "eager"


def _trainer(way: Way, kept: dict[str, bool]) -> tuple[Watched, Spy]:
    folder = base(way.family)
    config = transformers.AutoConfig.from_pretrained(folder).to_dict()
    attention, packing = _attention(way, config)
    recipe = tiny_runs.recipe(
        method=way.method,
        precision=way.precision,
        quantisation=tiny_runs.NF4 | {"compute": way.precision} if way.method == "qlora" else None,
        dropout=0.0,
        packing=packing,
        steps=1,
    )
    placement = tiny_runs.placement(
        device="cuda",
        accumulation=1,
        checkpointing=way.checkpointing,
        attention=attention,
        kernels=backends.FUSED if way.fused else (),
        float_constants=way.fused and way.method == "qlora",
        unpacked_layer=way.fused and way.method == "qlora" and not kept.get("tiled_mlp"),
        **kept,
    )
    model = load_base(
        folder,
        precision=way.precision,
        quantisation=recipe.quantisation,
        device="cuda",
        attention=attention,
        finite_only=True,
    )
    tuned, _ = adapt(model, recipe)
    if placement.float_constants:
        four_bit.unpack_constants(tuned)
    whole.replace(
        tuned, placement.kernels, attention, precision=DTYPES[way.precision], packing=packing
    )
    run = Path(tempfile.mkdtemp(dir=_root()))
    by_offsets = model.config._attn_implementation in backends.BY_OFFSETS
    loop = Watched(
        tuned,
        transformers.AutoTokenizer.from_pretrained(folder),
        rows=datasets.Dataset.from_list(_rows(packing)),
        held_out=None,
        recipe=recipe,
        arguments=sft_config(recipe, placement, run, by_offsets=by_offsets),
        activations=placement.activations,
        metrics=run / "metrics.jsonl",
        saves=Saves(
            run / "checkpoints", seconds=600, steps=None, asked=lambda: False, check=lambda: None
        ),
    )
    loop.spy, loop.asked = Spy(), attention
    return loop, loop.spy


def _rows(packing: bool) -> list[dict[str, Any]]:
    """Two rows of other lengths, and some labels masked."""
    made = []
    for lengths in ((9, 7, 24), (30, 2)):
        ids = [3 + n % 200 for n in range(sum(lengths))]
        labels = [-100, -100, *ids[2:]]
        row: dict[str, Any] = {"input_ids": ids, "labels": labels}
        made.append(row | ({"seq_lengths": list(lengths)} if packing else {}))
    return made


def _gradients(loop: Exact) -> dict[str, str]:
    """Device and type of each gradient as it is there, by the parameter's name."""
    found: dict[str, str] = {}
    for name, parameter in loop.trained().items():

        def note(p: torch.Tensor, name: str = name) -> None:
            assert p.grad is not None
            found[name] = _place(p.grad)

        parameter.register_post_accumulate_grad_hook(note)
    return found


def _place(tensor: torch.Tensor) -> str:
    return f"{tensor.device.type} {str(tensor.dtype).removeprefix('torch.')}"


def _record(loop: Watched, spy: Spy, gradients: dict[str, str]) -> dict[str, Any]:
    trained = loop.trained()
    base = loop.model.get_base_model()
    states = [
        _place(value)
        for state in loop.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    everything = [*loop.model.named_parameters(), *loop.model.named_buffers()]
    return {
        "attention": base.config._attn_implementation,
        "packed": loop.recipe.packing,
        "one_pass": loop.one_pass,
        "loss": loop.state.log_history[0]["loss"],
        "loss_place": _place(loop.loss_so_far),
        "off_device": [name for name, t in everything if t.device.type != "cuda"],
        "trained": dict(Counter(map(_place, trained.values()))),
        "gradients": dict(Counter(gradients.values())),
        "without_gradient": sorted(trained.keys() - gradients.keys()),
        "states": dict(Counter(states)),
        "kernels": {phase: dict(sorted(c.items())) for phase, c in spy.kernels.items()},
        "waits": {phase: dict(c) for phase, c in spy.waits.items()},
        "ahead": {phase: dict(c) for phase, c in spy.ahead.items()},
        "strays": {phase: dict(c) for phase, c in spy.strays.items() if phase != "loop"},
    }
