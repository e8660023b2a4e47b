"""The facts of any model class, counted on the meta device: for mixtures and hybrids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from tuning.models.survey import REPEATED, TOWER, survey
from tuning.plan.coefficients import Variant
from tuning.presets import Facts, stored
from tuning.presets.architecture import Matrix
from tuning.presets.counted import packing
from tuning.training.simulate.step import build, read

# A decoder layer that has one of these attends to all tokens before.
QUERIES = frozenset({"q_proj", "q_b_proj", "qkv_proj", "query_key_value", "Wqkv"})
# Name within its decoder layer, inputs, outputs, bias and copies of a matrix.
Found = tuple[str, int, int, bool, int]
CHOSEN = ("num_experts_per_tok", "top_k_experts", "num_experts_per_token", "moe_topk")


def count(config: dict[str, Any]) -> Facts:
    """What `config`, a parsed config.json, describes."""
    model = build(config, variant=Variant(attention="eager"))
    whole = read(config)
    text = whole.get_text_config()
    text.allow_global_per_layer_attribute_access = True  # of what differs by layer, the usual value
    modules = dict(model.named_modules())
    every, reached = dict(model.named_parameters()), survey(model)
    linears = _matrices(_linears(modules, reached.linears), used=1)
    used = next((value for name in CHOSEN if (value := getattr(text, name, None))), 0)
    experts = _matrices(_experts(every, reached.experts), used=used)
    tower = sum(p.numel() for name, p in every.items() if TOWER.search(name))
    parameters = sum(p.numel() for p in every.values()) - tower
    idle = sum(
        p.numel() * (1 - used / p.shape[0]) for name, p in every.items() if ".experts." in name
    )
    wrapped = text is not whole and type(model.config) is type(whole)
    windowed = list(getattr(text, "layer_types", None) or ()).count("sliding_attention")
    window = getattr(text, "sliding_window", None) if windowed else None
    rope = getattr(text, "rope_parameters", None) or {}
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Facts(
        model_type=text.model_type,
        architecture=type(model).__name__,
        wrapper=type(model).__name__ if wrapped else None,
        hidden=text.hidden_size,
        intermediate=_width(text, linears, experts),
        layers=text.num_hidden_layers,
        attending=sum(x.layers for x in linears if _short(x.name) in QUERIES),
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=max(getattr(one, "head_dim", None) or head_dim for one in _each_layer(text)),
        vocab=text.vocab_size,
        context=text.max_position_embeddings,
        norms=_norms(modules, text),
        window=window,
        windowed_layers=windowed if window else 0,
        rotary=float(rope.get("partial_rotary_factor") or 1.0),
        softcap=bool(getattr(text, "attn_logit_softcapping", None)),
        sinks=any(name.endswith("sinks") for name in every),
        linears=linears,
        experts=experts,
        parameters=parameters,
        active=parameters - round(idle),
        tower=tower,
        stored=stored.of(config),
        **packing(config),
    )


def _each_layer(text: Any) -> list[Any]:
    """The config of each layer, where a class says one thing of some and another of others."""
    return list(getattr(text, "per_layer_config", None) or [text])


def _linears(modules: dict[str, Any], names: Iterable[str]) -> Iterator[Found]:
    for name in names:
        linear = modules[name]
        yield _within(name), linear.in_features, linear.out_features, linear.bias is not None, 1


def _experts(parameters: dict[str, Any], names: Iterable[str]) -> Iterator[Found]:
    """Some classes multiply with W, some with its transpose: sizes are the same."""
    for name in names:
        copies, outputs, inputs = parameters[name].shape
        yield _within(name), inputs, outputs, f"{name}_bias" in parameters, copies


def _matrices(found: Iterator[tuple[str, int, int, bool, int]], *, used: int) -> tuple[Matrix, ...]:
    """Each different one, with the number of layers that have it."""
    return tuple(
        Matrix(name, inputs, outputs, bias, layers, copies, used)
        for (name, inputs, outputs, bias, copies), layers in Counter(found).items()
    )


def _within(name: str) -> str:
    match = REPEATED.search(name)
    return name[match.end() :] if match else name


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _width(text: Any, linears: tuple[Matrix, ...], experts: tuple[Matrix, ...]) -> int:
    """Numbers that a token is in the middle of an MLP, in its experts and beside them."""
    down = {"down_proj", "output_linear", "w2", "fc2"}
    dense = [x for x in linears if _short(x.name) in down]
    chosen = [x for x in experts if _short(x.name) in down]
    width = sum(x.inputs * x.layers for x in dense)
    width += sum((x.elements // x.copies // text.hidden_size) * x.used for x in chosen)
    return int(width / text.num_hidden_layers + 0.5)


def _norms(modules: dict[str, Any], text: Any) -> int:
    """Norms of hidden size in a decoder layer, on average."""
    found = [
        name
        for name, module in modules.items()
        if type(module).__name__.endswith("Norm")
        and REPEATED.search(name)
        and not TOWER.search(name)
        and getattr(module, "weight", None) is not None
        and module.weight.shape[-1] == text.hidden_size
    ]
    return max(1, int(len(found) / text.num_hidden_layers + 0.5))
