"""A kernel replaces a module only where it computes what the module computes."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from tuning.models.kernels import fuse, parity
from tuning.plan import backends

CONFIG: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "ffn_hidden_size": 32,
    "dense_intermediate_size": 32,
    "mlp_bias": False,
    "bias": False,
    "hidden_act": "silu",
    "hidden_activation": "gelu_pytorch_tanh",
    "dropout_rate": 0.1,
    "hidden_dropout_prob": 0.1,
    "mlp_multipliers": [0.5, 2.0],
    "swiglu_limit": 7.0,
    "swiglu_alpha": 1.7,
    "rms_norm_eps": 1e-6,
    "add_bias_linear": False,
    "hybrid_layer_ids": [0],
    "use_shared_mlp_adapter": False,
    "adapter_rank": 4,
    "num_mem_blocks": 1,
    "layers_block_type": [],
}
# One of each way to write the plain computation
PLAIN = [
    ("llama", "LlamaMLP"),
    ("gemma2", "Gemma2MLP"),
    ("qwen2_5_vl", "Qwen2MLP"),
    ("llama4", "Llama4TextMLP"),
    ("phi3", "Phi3MLP"),
    ("phi", "PhiMLP"),
    ("gpt_neox", "GPTNeoXMLP"),
]
# The same children, and something else computed from them
OTHER = [
    ("gemma3n", "Gemma3nTextMLP"),  # a sparse activation
    ("falcon_h1", "FalconH1MLP"),  # scaled gate and output
    ("t5gemma", "T5GemmaMLP"),  # dropout inside
    ("bitnet", "BitNetMLP"),  # a norm inside
    ("zamba2", "Zamba2MLP"),  # a second argument
]


def mlp(module: str, name: str) -> Any:
    """The MLP of transformers with LoRA layers on all its projections, below a parent."""
    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    torch.manual_seed(0)
    config = CONFIG
    if name == "Gemma3nTextMLP":
        config = CONFIG | {"intermediate_size": [32], "activation_sparsity_pattern": [0.95]}
    more = {"Gemma3nTextMLP": (0,), "Zamba2MLP": (1, 0)}.get(name, ())
    made = getattr(modeling, name)(SimpleNamespace(**config), *more)
    linear = [each for each, part in made.named_modules() if isinstance(part, torch.nn.Linear)]
    parent = torch.nn.ModuleDict({"mlp": made})
    inject_adapter_in_model(
        LoraConfig(r=2, target_modules=[f"mlp.{each}" for each in linear]), parent
    )
    return parent


@pytest.mark.parametrize(("module", "name"), PLAIN)
def test_a_plain_mlp_is_fused(module: str, name: str) -> None:
    """However transformers writes it."""
    tuned = mlp(module, name)

    fused = fuse.fuse(tuned, (backends.MLP,))

    assert (1, {}) == (fused.counts[backends.MLP], fused.refused)


@pytest.mark.parametrize(("module", "name"), OTHER)
def test_an_mlp_that_computes_something_else_is_left_alone(module: str, name: str) -> None:
    """Its children have the usual names, and the output would be another; the log says so."""
    tuned = mlp(module, name)

    fused = fuse.fuse(tuned, (backends.MLP,))

    assert 0 == fused.counts[backends.MLP]
    assert "forward" not in vars(tuned["mlp"])
    assert f"1 mlp of {name} left out (another computation)" == str(fused)


def test_an_mlp_that_changes_its_projections_is_left_alone() -> None:
    """Its forward is the usual one, but a hook on a projection scales what comes out."""
    tuned = mlp("llama", "LlamaMLP")
    tuned["mlp"].gate_proj.register_forward_hook(lambda _, args, out: out * 1.5)

    assert "left out" in str(fuse.fuse(tuned, (backends.MLP,)))


@pytest.mark.parametrize(
    ("own", "same"),
    [
        (lambda x: [2 * x], True),
        (lambda x: [2.2 * x], False),
        (lambda x: [(2 * x).clamp(-40, 40)], False),  # only large inputs show it
        (lambda x: [torch.nn.functional.threshold(2 * x, 0.02, 0.0)], False),
        (lambda x: [2 * x.detach() + x - x.detach()], False),  # only the gradient differs
        (lambda x: [2 * x, x], False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_compared(own: Any, same: bool, dtype: torch.dtype) -> None:
    """At small and large inputs, forward and backward, one for one."""
    like = torch.empty(64, dtype=dtype)

    assert same is parity.agrees(own, lambda x: [x + x], (), like=like)


def test_a_comparison_leaves_no_trace() -> None:
    """B is zero again, no gradient stays, and the global random numbers go on as they were."""
    tuned = mlp("llama", "LlamaMLP")
    before = {name: p.clone() for name, p in tuned.named_parameters()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)

    fuse.fuse(tuned, backends.without_copies(backends.FUSED))  # which are of a whole peft model

    assert torch.equal(expected, torch.rand(3))
    for name, parameter in tuned.named_parameters():
        assert torch.equal(before[name], parameter), name
        assert parameter.grad is None


def test_a_simulated_model_is_fused_by_its_code_alone() -> None:
    """On the meta device there is nothing to compare; another computation stays out as before."""
    plain, other = mlp("llama", "LlamaMLP").to("meta"), mlp("falcon_h1", "FalconH1MLP").to("meta")

    assert fuse.fuse(plain, (backends.MLP,)).counts[backends.MLP] == 1
    assert fuse.fuse(other, (backends.MLP,)).counts[backends.MLP] == 0
