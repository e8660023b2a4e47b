"""Which weights of a model LoRA adapts and 4-bit loading packs; which are left, and why.

Asked of the model itself, on the meta device before a plan is made and with its weights before it
is trained: both must find the same. Projections are the linear layers of the model's repeated
blocks, so that fused names (`qkv_proj`, `query_key_value`, ...) need no table. Experts are the
parameters [experts, ., .] of modules that transformers computes as a mixture.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from peft.tuners.tuners_utils import BaseTuner
from transformers.pytorch_utils import Conv1D

from tuning.plan.verdict import OUT_OF_REACH, SPECIAL, TENSOR, Left, Verdict

TOWER = re.compile(r"vision|visual|image|audio|projector|multi_modal", re.IGNORECASE)
ROUTERS = frozenset({"router", "gate", "shared_expert_gate"})
REPEATED = re.compile(r"\.(\d+)\.")
STATE_SPACE = re.compile(r"mamba|rglru|ssm|rwkv|xlstm|delta", re.IGNORECASE)
# Linear layers whose adapter gets no gradient, since the model reads their weight itself or decides
# by their output. By the class that holds them; `make sweep` finds such layers.
READ_DIRECTLY = dict.fromkeys(
    ("DogeAttention", "MambaMixer", "FalconMambaMixer", "JambaMambaMixer"), frozenset({"dt_proj"})
) | {
    # which also clips the weight in place: of packed weights it would clip the bytes
    "Gemma3nTextAltUp": frozenset({"prediction_coefs", "correction_coefs"})
}
UNUSED = re.compile(r"encoder_attn|crossattention|cross_attn", re.IGNORECASE)
INDEXER = re.compile(r"\.(indexer|compressor)\.")
OWN_ADAPTERS = re.compile(r"adapter_list\.")

ROUTER = "the router, which chooses experts"
CROSS = "attention to an encoder, which a text alone does not have"
OWN = "an adapter of the model's own, which some layers have no use for"
INDEXES = "the indexer, which chooses tokens and gets no gradient"
TOWERS = "part of a vision or audio tower"
CONVOLUTION = "a convolution"
STATES = "part of a recurrence or a mask, which gets no gradient"
OUTSIDE = "outside the repeated layers"
EMBEDDING = "an embedding"


@dataclass(frozen=True)
class Survey:
    """Full names of weights: of linear layers by their module, of all others by the parameter."""

    linears: tuple[str, ...]
    experts: tuple[str, ...]  # parameters [experts, inputs, outputs] or [experts, outputs, inputs]
    left: dict[str, str] = field(default_factory=dict)  # with the reason; no norms, no biases
    numbers: dict[str, int] = field(default_factory=dict)  # how many, of each name in all three
    sizes: dict[str, int] = field(default_factory=dict)  # of `experts`: matrices in each

    @property
    def matrices(self) -> int:
        """Matrices of all experts together."""
        return sum(self.sizes.values())

    @property
    def adaptable(self) -> tuple[str, ...]:
        """What LoRA can adapt: linear layers, then experts."""
        return self.linears + self.experts

    def share(self) -> float:
        """Adaptable share of the weights of the repeated layers, towers left out."""
        reached = sum(self.numbers[name] for name in self.adaptable)
        unreached = sum(
            self.numbers[name] for name, reason in self.left.items() if reason in OUT_OF_REACH
        )
        return reached / max(1, reached + unreached)

    def verdict(self, attention: tuple[str, ...] = ()) -> Verdict:
        """The same for a plan, by kinds; `attention`: what the model's class offers."""
        kinds = Counter((REPEATED.sub(".*.", name), reason) for name, reason in self.left.items())
        left = tuple(Left(name, count, reason) for (name, reason), count in kinds.items())
        return Verdict(len(self.linears), self.matrices, self.share(), left, attention)


def plain_linears() -> None:
    """Let Falcon use torch's own linear layers: its subclass of them computes the same."""
    transformers.models.falcon.modeling_falcon.FalconLinear = torch.nn.Linear


def survey(model: torch.nn.Module) -> Survey:
    """What of `model`, on any device and packed or not, is adapted and what is left."""
    linears, experts, left, numbers, sizes = [], [], {}, {}, {}
    for path, module in _modules(model):
        if _is_linear(module):
            numbers[path] = _size(module)
            if reason := _why_not(model, path, module):
                left[path] = reason
            else:
                linears.append(path)
            continue
        for name, parameter in _parameters(module):
            full = f"{path}.{name}"
            numbers[full] = parameter.numel()
            if _is_expert(module, parameter) and REPEATED.search(full) and not TOWER.search(full):
                experts.append(full)
                sizes[full] = int(parameter.shape[0])
            elif parameter.ndim >= 2 and not _is_bias(module, name, parameter):
                left[full] = _reason(full, module)
    return Survey(tuple(linears), tuple(experts), left, numbers, sizes)


def _modules(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Each module but the output head and the embeddings; asked before peft wraps any."""
    whole: Any = model
    skipped = {id(whole.get_input_embeddings()), id(whole.get_output_embeddings())}
    for name, module in model.named_modules():
        if id(module) not in skipped:
            yield name, module


def _parameters(module: Any) -> Iterator[tuple[str, Any]]:
    """The module's own parameters; those packed in 4 bits by their unpacked shape."""
    states = vars(module).get("packed_experts", {})
    for name, parameter in module.named_parameters(recurse=False):
        yield name, torch.empty(states[name].shape, device="meta") if name in states else parameter


def _is_linear(module: Any) -> bool:
    return isinstance(module, (torch.nn.Linear, Conv1D))


def _size(module: Any) -> int:
    if isinstance(module, Conv1D):
        return int(module.nx * module.nf)
    return int(module.in_features * module.out_features)


def _why_not(model: Any, path: str, module: Any) -> str | None:
    """Why a linear layer is not adapted; None if it is."""
    parent, _, name = path.rpartition(".")
    if TOWER.search(path):
        return TOWERS
    if not REPEATED.search(f"{path}."):
        return OUTSIDE
    holder = type(model.get_submodule(parent)).__name__
    if name in ROUTERS or "Router" in f"{holder} {type(module).__name__}":
        return ROUTER
    if UNUSED.search(path):
        return CROSS
    if INDEXER.search(path):
        return INDEXES
    if OWN_ADAPTERS.search(path):
        return OWN
    if name in READ_DIRECTLY.get(holder, ()):
        return STATES
    if not _is_plain(module):
        return SPECIAL
    return None if _peft_takes(model, path) else STATES


def _is_plain(module: Any) -> bool:
    """Whether it computes x W^T + b as torch's own, packed or not."""
    kind = type(module)
    own = isinstance(module, Conv1D) or kind.forward is torch.nn.Linear.forward
    return own or kind.__module__.startswith("bitsandbytes") or hasattr(module, "quant_state")


def _peft_takes(model: Any, path: str) -> bool:
    """Whether peft allows LoRA on the module: some kernels read a projection's own weight."""
    try:
        BaseTuner._check_target_module_compatiblity(None, _LORA, model, path.rpartition(".")[2])
    except ValueError:
        return False
    return True


class _Lora:
    """What peft asks of a config before it forbids a module."""

    peft_type = "LORA"


_LORA: Any = _Lora()


def _is_expert(module: Any, parameter: Any) -> bool:
    """Whether the parameter holds one matrix for each expert of a mixture."""
    return len(parameter.shape) == 3 and "Experts" in type(module).__name__


def _is_bias(module: Any, name: str, parameter: Any) -> bool:
    """A vector for each expert, head or channel."""
    return "bias" in name or parameter.numel() == max(parameter.shape)


def _reason(full: str, module: Any) -> str:
    """Why a parameter that is in no linear layer is left."""
    kind = type(module).__name__
    if TOWER.search(full):
        return TOWERS
    if isinstance(module, torch.nn.Embedding):
        return EMBEDDING
    if "Router" in kind or "Gate" in kind or full.rpartition(".")[0].endswith(tuple(ROUTERS)):
        return ROUTER
    if "Conv" in kind:
        return CONVOLUTION
    if not REPEATED.search(full):
        return OUTSIDE
    return STATES if STATE_SPACE.search(f"{full} {kind}") else TENSOR
