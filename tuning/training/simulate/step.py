"""One training step of a real model class on no memory: what is allocated, operator by operator."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from tuning.models import activations, lora, reading
from tuning.models.kernels import fuse
from tuning.models.survey import REPEATED, plain_linears, survey
from tuning.plan.activations import Activations
from tuning.plan.backends import FUSED
from tuning.plan.coefficients import Variant
from tuning.training.simulate import standins
from tuning.training.simulate.memory import HOST, LiveBytes, kind

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ATTENTION = {"varlen": standins.VARLEN, "sdpa": "sdpa", "eager": "eager"}
History = NDArray[np.int64]


@dataclass(frozen=True)
class Point:
    """The sizes of one step: `rows` rows of `length` tokens each, adapters of `rank`."""

    rows: int
    length: int
    rank: int

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch."""
        return self.rows * self.length


@dataclass(frozen=True)
class Phase:
    """Live bytes above what stays (weights, adapters, optimizer) during a forward or a backward."""

    operators: tuple[str, ...]
    bytes: History  # after each: [operators, columns of `memory.LiveBytes.history`], int64
    head: int  # so many operators, up to the end of the layer that is run first
    tail: int  # so many, from the start of the layer that is run last


@dataclass(frozen=True)
class Trace:
    """One step."""

    forward: Phase
    backward: Phase
    host: tuple[int, ...] = ()  # bytes of each tensor in host memory

    @property
    def peak(self) -> int:
        """Most bytes alive at once."""
        return int(max(phase.bytes.sum(1).max() for phase in (self.forward, self.backward)))


def read(config: Any) -> Any:
    """A transformers config of `config`: one already, or a parsed config.json."""
    return reading.config_of(config) if isinstance(config, Mapping) else copy.deepcopy(config)


def build(config: Any, *, variant: Variant, layers: int | None = None) -> Any:
    """The base model of `config` as the trainer loads it, on the meta device.

    `layers` cuts the text model to that many and its towers to one.
    """
    config = read(config)
    text = config.get_text_config()
    text.use_cache = False
    if layers is not None:
        _cut(config, layers)
    plain_linears()
    causal = type(config) in transformers.AutoModelForCausalLM._model_mapping
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForImageTextToText
    with torch.device("meta"):
        model = auto.from_config(
            config,
            attn_implementation=ATTENTION[variant.attention],
            dtype=DTYPES[variant.precision],
        )
        if variant.method == "qlora":
            _pack(model, config, DTYPES[variant.precision])
    for module in model.modules():
        kind_of_rope = getattr(module, "rope_type", None)  # some look at the values of positions
        if isinstance(kind_of_rope, dict):
            module.rope_type = dict.fromkeys(kind_of_rope, "default")
        elif kind_of_rope is not None:
            module.rope_type = "default"
    return model.requires_grad_(False)


def _cut(config: Any, layers: int) -> None:
    text = config.get_text_config()
    text.num_hidden_layers = layers
    for name in ("layer_types", "no_rope_layers", "mlp_layer_types"):
        if getattr(text, name, None):
            setattr(text, name, getattr(text, name)[:layers])
    for name in ("vision_config", "audio_config"):
        if getattr(config, name, None) is not None:
            getattr(config, name).num_hidden_layers = 1


def _pack(model: Any, config: Any, compute: torch.dtype) -> None:
    """Replace what transformers would load in 4 bits."""
    skip = get_keys_to_not_convert(model) + list(survey(model).left)
    options = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute)
    plain = dict(model.named_modules())
    replace_with_bnb_linear(model, skip, options)
    for name, module in list(model.named_modules()):
        if module is not plain[name]:
            model.set_submodule(name, standins.PackedLinear(plain[name], compute))
    for name in survey(model).experts:
        module, _, parameter = name.rpartition(".")
        standins.pack_parameter(model.get_submodule(module), parameter, compute)
    model.is_loaded_in_4bit = True


def adapt(model: Any, *, variant: Variant, rank: int, kept: Activations) -> Any:
    """`model` with LoRA on every projection, ready to train; still on the meta device."""
    options = {"r": rank, "lora_dropout": 0.05 if variant.dropout else 0.0}
    with torch.device("meta"):
        adapted = lora.put(model, options | {"task_type": "CAUSAL_LM"}, survey(model).adaptable)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if kept.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        adapted.enable_input_require_grads()
    if variant.fused:
        fuse.fuse(adapted, FUSED)
    activations.arrange(adapted, kept, host=_on_host)
    return adapted.train()


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    with kind(HOST):
        return torch.empty_like(tensor)


class Stage:
    """A model with fake tensors for weights, to run steps of several sizes on.

    `kept` is what its layers keep of their activations; the variant's choice if not given.
    """

    def __init__(
        self,
        config: Any,
        *,
        variant: Variant,
        rank: int,
        layers: int | None = None,
        kept: Activations | None = None,
    ) -> None:
        self.variant, self.rank = variant, rank
        kept = kept or Activations(variant.checkpointing, tiled=variant.tiled)
        self.model = adapt(
            build(config, variant=variant, layers=layers), variant=variant, rank=rank, kept=kept
        )
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self._fake:
            swap(self.model)

    def run(self, point: Point) -> Trace:
        """What one micro-batch of `point` allocates."""
        if point.rank != self.rank:
            raise ValueError(f"this stage has adapters of rank {self.rank}, not {point.rank}")
        trained = [p for p in self.model.parameters() if p.requires_grad]
        with standins.installed(self.variant.device), self._fake:
            inputs = batch(self.model, point)
            resident = [*self.model.parameters(), *self.model.buffers()]
            live = LiveBytes(resident, rank=self.rank)
            hooks = [p.register_post_accumulate_grad_hook(_gradient_of(live)) for p in trained]
            starts, grads, layer_hooks = _follow_layers(self.model, live)
            with live:
                halves = step(self.model, inputs, self.variant)
                next(halves)
                middle = len(live.history)
                for hook in layer_hooks:  # or they would see the layers run again
                    hook.remove()
                for _ in halves:
                    pass
            for hook in hooks:
                hook.remove()
            for parameter in trained:
                parameter.grad = None
        history, names = np.array(live.history, dtype=np.int64), tuple(live.operators)
        second = starts[1] if len(starts) > 1 else middle
        below = grads[1] if len(grads) > 1 else len(names)
        return Trace(
            Phase(names[:middle], history[:middle], second, middle - starts[-1]),
            Phase(names[middle:], history[middle:], below - middle, len(names) - grads[-1]),
            tuple(live.host),
        )


def _follow_layers(model: Any, live: LiveBytes) -> tuple[list[int], list[int], list[Any]]:
    """Where in `live.history` each decoder layer starts, and its backward, in the order they run.

    The lists fill while a step runs; the hooks are to be removed after the forward.
    """
    starts: list[int] = []
    backwards: list[int] = []

    def enter(*_: Any) -> None:
        starts.append(len(live.history))

    def leave(_: Any, __: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden.register_hook(lambda _: backwards.append(len(live.history)))

    hooks = []
    for name in _layers(model):
        layer = model.get_submodule(name)
        hooks += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    return starts, backwards, hooks


def _layers(model: Any) -> list[str]:
    """Names of the decoder layers: the repeated blocks that hold projections."""
    names: dict[str, None] = {}
    for name in survey(model).adaptable:
        match = REPEATED.search(name)
        if match:
            names[name[: match.end(1)]] = None
    return list(names)


def _gradient_of(live: LiveBytes) -> Any:
    def hook(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            live.relabel(parameter.grad, "gradients")

    return hook


def batch(model: Any, point: Point) -> dict[str, torch.Tensor]:
    """Inputs as trl's collators make them: packed rows have positions, padded ones a mask."""
    shape = (point.rows, point.length)
    inputs = {"input_ids": torch.zeros(shape, dtype=torch.long)}
    inputs["labels"] = torch.zeros(shape, dtype=torch.long)
    if model.config._attn_implementation == standins.VARLEN:
        positions = torch.arange(point.length).repeat(point.rows)
        inputs = {name: tensor.reshape(1, -1) for name, tensor in inputs.items()}
        inputs["position_ids"] = positions[None]
        bounds = torch.arange(0, point.tokens + 1, point.length, dtype=torch.int32)
        inputs["cu_seq_lens_q"] = bounds
    else:
        inputs["attention_mask"] = torch.ones(shape, dtype=torch.long)
    if "token_type_ids" in getattr(model.config, "attribute_map", {}) or re.fullmatch(
        "gemma3", model.config.model_type
    ):
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return inputs


def step(model: Any, inputs: dict[str, torch.Tensor], variant: Variant) -> Iterator[None]:
    """A forward and a backward as trl runs them; yields once in between."""
    base = model.get_base_model()
    labels = inputs["labels"]
    rest = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    dtype = DTYPES[variant.precision]
    autocast = dtype != torch.float32
    with torch.autocast("cpu", dtype) if autocast else contextlib.nullcontext():
        hidden = base.base_model(**rest, use_cache=False).last_hidden_state
        head = base.get_output_embeddings()
        loss = standins.loss(
            hidden, head.weight, labels, device=variant.device, fused=variant.fused
        )
        del hidden
    yield
    loss.backward()


def swap(model: torch.nn.Module) -> None:
    """Put fake CPU tensors in the place of meta ones; tied tensors stay tied."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, torch.nn.Parameter):
                new = torch.nn.Parameter(new, requires_grad=tensor.requires_grad)
                if getattr(tensor, "quant_state", None) is not None:
                    standins.mark_packed(new)
            made[id(tensor)] = new, tensor  # the old one is kept, or its id could come again
        return made[id(tensor)][0]

    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = fake(tensor)  # type: ignore[assignment]
