"""One copy of a model on several ranks: each keeps a share of every layer (FSDP2).

A layer is whole only while it computes, forward and backward; then its other shares are forgotten.
An embedding and an output head that are not tied are shared alike.
Weights are read layer by layer and cut at once, so that no rank ever holds the whole base. LoRA
weights and their optimizer state are cut alike. What else lies outside of the layers stays whole.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from bitsandbytes.nn import Linear4bit
from peft.utils.other import TrainableTokensWrapper
from safetensors import safe_open
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import core_model_loading

from tuning.errors import SpecError
from tuning.models.survey import TOWER

logger = logging.getLogger(__name__)

NUMBERED = re.compile(r"^(.*?\.\d+)\.")  # the outermost numbered module of a name
SHARE = "share"  # attribute of a parameter: this rank's part, until FSDP holds it


@dataclass(frozen=True)
class Split:
    """How a copy of the model is shared: over the last dimension of `mesh`."""

    mesh: DeviceMesh  # [shards], or [replicas, shards]
    offload: bool = False  # shares lie in host memory between uses

    @property
    def count(self) -> int:
        """Ranks that share a copy."""
        return int(self.mesh.size(self.mesh.ndim - 1))

    @property
    def number(self) -> int:
        """This one among them."""
        return int(self.mesh.get_local_rank(self.mesh.ndim - 1))

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of `whole`, as FSDP cuts it: by rows, the last parts may be empty."""
        parts = torch.chunk(whole, self.count)
        return parts[self.number] if self.number < len(parts) else whole[:0]


# Reading.


@contextmanager
def read_by_layer(split: Split | None) -> Iterator[None]:
    """Inside, transformers reads a layer at a time, and of each this rank's share is kept.

    Until `share_out`, a parameter of a layer has its shape and type, but no numbers.
    """
    if split is None:
        yield
        return
    kind = transformers.PreTrainedModel
    own = vars(kind)["_load_pretrained_model"]
    kind._load_pretrained_model = staticmethod(partial(_load, split))
    try:
        yield
    finally:
        kind._load_pretrained_model = own


def _load(
    split: Split, model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *_: Any
) -> tuple[Any, Any]:
    """What transformers' `_load_pretrained_model` does, layer by layer."""
    with ExitStack() as stack:
        if state_dict is None:
            state_dict = {}
            for path in checkpoint_files:
                file = stack.enter_context(safe_open(path, framework="pt"))
                state_dict |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        whole: Any = None
        for group in _groups(state_dict):
            report, _ = core_model_loading.convert_and_load_state_dict_in_model(
                model, group, load_config
            )
            whole = report if whole is None else _both(whole, report)
            _keep_shares(model, split)
        return whole, None


def _groups(weights: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """The weights of each layer together, since some are made of others; the rest as one group."""
    groups: dict[str, dict[str, Any]] = {}
    for name, weight in weights.items():
        match = NUMBERED.match(name)
        groups.setdefault(match[1] if match else "", {})[name] = weight
    return groups.values()


def _both(one: Any, other: Any) -> Any:
    """One report of two loads: what neither found is missing."""
    one.missing_keys &= other.missing_keys
    for name in ("unexpected_keys", "mismatched_keys", "skipped_pp_keys"):
        getattr(one, name).update(getattr(other, name))
    one.conversion_errors.update(other.conversion_errors)
    one.error_msgs += other.error_msgs
    return one


def _keep_shares(model: Any, split: Split) -> None:
    """Cut the parameters of layers that have been read since."""
    for layer in layers(model):
        for parameter in layer.parameters():
            if not parameter.is_meta and not hasattr(parameter, SHARE):
                data = parameter.data
                setattr(parameter, SHARE, split.cut(data).clone())
                parameter.data = data.new_empty(1).expand(data.shape)


def layers(model: Any) -> list[torch.nn.Module]:
    """The repeated layers of a language model, without those of towers."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and not TOWER.search(name)
    ]
    outer = [one for one in lists if not any(one[0].startswith(f"{n}.") for n, _ in lists)]
    return [
        layer
        for _, module in outer
        for layer in module
        if any(isinstance(part, torch.nn.Linear) for part in layer.modules())
    ]


# Sharing.


def share_out(tuned: Any, split: Split) -> None:
    """Give the peft model `tuned`, read by `read_by_layer`, to FSDP. Raises SpecError.

    Adapters are cut, too; they must have their final type.
    """
    base = tuned.get_base_model()
    _refuse_shared(base)
    policy = OffloadPolicy()
    if split.offload:
        policy = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    wrap = partial(fully_shard, mesh=split.mesh, offload_policy=policy)
    for module in base.modules():
        if isinstance(module, Linear4bit):  # FSDP's parameters have none
            module.quant_state = module.weight.quant_state
    for layer in layers(base):
        held = {n: getattr(p, SHARE) for n, p in layer.named_parameters() if hasattr(p, SHARE)}
        for name, parameter in layer.named_parameters():
            if name in held:
                parameter.data = torch.empty_like(parameter, memory_format=torch.contiguous_format)
        wrap(layer, reshard_after_forward=True)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if name in held:
                    local(parameter).copy_(held[name])
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    if not tied and type(head) is torch.nn.Linear:
        wrap(head, reshard_after_forward=True)
    # in host memory, the embedding would pass for the model's device
    if not (tied or split.offload or isinstance(embedding, TrainableTokensWrapper)):
        wrap(embedding, reshard_after_forward=True)
    _wrap_root(base, wrap)
    own = sum(local(p).numel() * p.element_size() for p in base.parameters())
    every = sum(p.numel() * p.element_size() for p in base.parameters())
    logger.info("one of %d that share %d bytes of weights: holds %d", split.count, every, own)


def _wrap_root(base: Any, wrap: Any) -> None:
    """The module around the layers, whose forward `base` calls; so that they prefetch each other.

    What it holds itself stays whole.
    """
    root = base.base_model
    own = {p for p in root.parameters() if not isinstance(p, DTensor)}
    wrap(root, ignored_params=own)


def _refuse_shared(base: Any) -> None:
    """Refuse a model whose layers share weights: FSDP would cut them twice."""
    owners: dict[int, int] = {}
    for number, layer in enumerate(layers(base)):
        for parameter in layer.parameters():
            if owners.setdefault(id(parameter), number) != number:
                raise SpecError.at(
                    "MODEL-120",
                    base.config.model_type,
                    "has layers that share weights, which cannot be split over several GPUs",
                    "use a GPU that holds the whole model, or method qlora",
                )


@contextmanager
def gathered(module: torch.nn.Module) -> Iterator[None]:
    """Inside, the module's own weights are whole, if they are shared."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def is_split(model: torch.nn.Module) -> bool:
    """Whether the model is shared by several ranks."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def each(tuned: torch.nn.Module) -> Iterator[Any]:
    """All modules; those of a shared layer while it is whole on this rank."""
    if not is_split(tuned):
        yield from list(tuned.modules())
        return
    inside: set[int] = set()
    for layer in [m for m in tuned.modules() if isinstance(m, FSDPModule)]:
        parts = list(layer.modules())
        if any(part is not layer and isinstance(part, FSDPModule) for part in parts):
            continue  # the root, whose own parts come last
        layer.unshard()
        yield from parts
        layer.reshard()
        inside |= {id(part) for part in parts}
    yield from [module for module in tuned.modules() if id(module) not in inside]


# Numbers of a shared parameter.


def local(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part, by reference."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def is_whole(parameter: torch.Tensor) -> bool:
    """Whether each rank has all of it."""
    return not isinstance(parameter, DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor; every rank that shares it must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """`value`, which every rank has whole, shared as `parameter` is."""
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    mesh = parameter.device_mesh
    part = Split(mesh).cut(value).contiguous()
    return DTensor.from_local(
        part, mesh, parameter.placements, run_check=False, shape=value.shape, stride=value.stride()
    )


def cast(parameter: torch.nn.Parameter, dtype: torch.dtype) -> None:
    """Give a parameter another type, before it is shared out as well."""
    if hasattr(parameter, SHARE):
        part = getattr(parameter, SHARE).to(dtype)
        setattr(parameter, SHARE, part)
        parameter.data = part.new_empty(1).expand(parameter.shape)
    else:
        parameter.data = parameter.data.to(dtype)


def gradients(loss: torch.Tensor, weights: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients of `loss` by `weights`; where those are shared, the mean of all ranks'."""
    weights = list(weights)
    if not any(isinstance(weight, DTensor) for weight in weights):
        found = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        return list(found)
    loss.backward()  # type: ignore[no-untyped-call]
    made = [weight.grad for weight in weights]
    for weight in weights:
        weight.grad = None
    return [
        torch.zeros_like(whole(weight)) if grad is None else whole(grad)
        for weight, grad in zip(weights, made, strict=True)
    ]


def assign(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Give `parameter` the numbers of `value`, which every rank has whole."""
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            value = Split(parameter.device_mesh).cut(value)
        local(parameter).copy_(value)
