"""4-bit loading of what `survey` finds, experts included, through transformers' own loader.

transformers packs what is exactly `nn.Linear`: experts are parameters of three dimensions, and some
models subclass it. Here each expert parameter is packed as it is loaded, one after the other, and
unpacked for each call of its module. (`bitsandbytes.nn.parametrize` would do that too, but under it
peft 0.21 computes without the adapter of the first of two parameters.) Routers and other linear
layers that no adapter corrects stay in 16 bits.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Linear4bit
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from tuning.models.survey import Survey, survey

PACKED = "packed_experts"  # attribute of a module: how its packed parameters are packed, by name
LINEAR = torch.nn.Linear.forward


class Quantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
    """transformers' own, for plain subclasses of `nn.Linear` and for experts as well."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        found = survey(model)
        self.experts = {} if self.pre_quantized else dict.fromkeys(found.experts)
        for name in found.linears:
            module = model.get_submodule(name)
            if type(module).forward is LINEAR:
                module.__class__ = torch.nn.Linear
        if not self.pre_quantized:
            modules = {name for name, _ in model.named_modules()}
            kept = [name for name in found.left if name in modules]
            skipped = get_keys_to_not_convert(model) + kept
            self.quantization_config.llm_int8_skip_modules = skipped
        super()._process_model_before_weight_loading(model, **kwargs)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether the parameter is packed as it is loaded."""
        return param_name in self.experts or super().param_needs_quantization(model, param_name)

    def get_quantize_ops(self) -> Any:
        """What packs a parameter."""
        return _Pack(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, state in self.experts.items():
            if state is not None:
                module, parameter = get_module_from_name(model, name)
                unpack_when_read(module, parameter, state)
        return super()._process_model_after_weight_loading(model, **kwargs)


auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = Quantizer


class _Pack(Bnb4bitQuantize):  # type: ignore[misc]
    """Packs linear layers as transformers does, and experts."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Packed parameters of the 16-bit ones in `input_dict`."""
        quantizer = self.hf_quantizer
        experts = {
            name: input_dict.pop(name) for name in [*input_dict] if name in quantizer.experts
        }
        packed = super().convert(input_dict, **kwargs) if input_dict else {}
        options = quantizer.quantization_config
        for name, value in experts.items():
            whole = value[0] if isinstance(value, list) else value
            whole = whole.to(options.bnb_4bit_compute_dtype)
            data, quantizer.experts[name] = bnb.quantize_4bit(
                whole.contiguous(),
                compress_statistics=options.bnb_4bit_use_double_quant,
                quant_type=options.bnb_4bit_quant_type,
            )
            packed[name] = torch.nn.Parameter(data, requires_grad=False)
        return packed


def unpack_when_read(module: Any, name: str, state: bnb.QuantState) -> None:
    """Let `module` compute with the packed parameter `name` unpacked."""
    module.get_parameter(name).ds_shape = state.shape  # what peft takes for its shape
    states = vars(module).setdefault(PACKED, {})
    states[name] = state
    module.forward = types.MethodType(_unpacked_forward, module)


def _unpacked_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    return compute(self, {}, *args, **kwargs)


def compute(module: Any, given: Mapping[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
    """The module's own forward, with the parameters of `given`, the others unpacked."""
    whole = {name: read(module, name) for name in states(module)} | dict(given)
    forward = vars(module).pop("forward", None)
    try:
        return torch.func.functional_call(module, whole, args, kwargs)
    finally:
        if forward is not None:
            module.forward = forward


def states(module: Any) -> Mapping[str, bnb.QuantState]:
    """How the module's packed parameters are packed, by name: their shape and dtype, too."""
    found: Mapping[str, bnb.QuantState] = vars(module).get(PACKED, {})
    return found


def read(module: Any, name: str) -> torch.Tensor:
    """The parameter `name` of a module, unpacked for this call if it is packed."""
    parameter: torch.Tensor = module.get_parameter(name)
    state = states(module).get(name)
    if state is None:
        return parameter.detach()
    unpack = getattr(state, "unpack", bnb.dequantize_4bit)  # a simulated one has its own
    whole: torch.Tensor = unpack(parameter.data, state)
    return whole


def unpack_constants(model: torch.nn.Module) -> None:
    """Hold the constants of all 4-bit blocks in float32, not packed in 8 bits again.

    The weights stay the same numbers. Each time one is unpacked, two kernels fewer run, for 3 bits
    more of memory for 8 weights.
    """
    for module in model.modules():
        held = [module.weight.quant_state] if isinstance(module, Linear4bit) else []
        for state in [*held, *states(module).values()]:
            if state.nested:
                constants = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
                state.absmax, state.nested = constants.float(), False
                state.state2 = state.offset = None


def packed(model: torch.nn.Module) -> Iterator[tuple[str, int]]:
    """Name, without peft's layers, and unpacked size of each packed weight."""
    for path, module in model.named_modules():
        own = path.removeprefix("base_model.model.").replace(".base_layer", "")
        if isinstance(module, Linear4bit):
            yield own, int(module.in_features * module.out_features)
        for name, state in states(module).items():
            yield f"{own}.{name}", state.shape.numel()


def share(found: Survey, packed: Mapping[str, int]) -> float:
    """Share of what LoRA can adapt that is packed, by the numbers of `packed`."""
    numbers = sum(found.numbers[name] for name in found.adaptable)
    return sum(packed.get(name, 0) for name in found.adaptable) / max(1, numbers)


def has_experts(model: torch.nn.Module) -> bool:
    """Whether the model holds packed experts, which its saved form would not tell of."""
    return any(states(module) for module in model.modules())


def unpacked(model: Any, dtype: torch.dtype) -> Any:
    """The packed `model` in `dtype`, of the classes of modules that it was made of."""
    transposed = [
        name
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit) and getattr(module, "source_cls", None) is Conv1D
    ]
    model = model.dequantize(dtype=dtype)
    for name in transposed:
        linear = model.get_submodule(name)
        with torch.device("meta"):
            own = Conv1D(linear.out_features, linear.in_features)
        own.weight = torch.nn.Parameter(linear.weight.t().contiguous(), requires_grad=False)
        own.bias = linear.bias
        model.set_submodule(name, own)
    _unpack_experts(model, dtype)
    return model


def _unpack_experts(model: torch.nn.Module, dtype: torch.dtype) -> None:
    for module in model.modules():
        for name in list(states(module)):
            value = read(module, name).to(dtype)
            setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
        if vars(module).pop(PACKED, None):
            del module.forward
