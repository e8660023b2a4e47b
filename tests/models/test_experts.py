"""LoRA on the experts of mixtures: kernels, the published adapter, and the merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny_runs
import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from tuning import adapter as adapters
from tuning import files
from tuning.models import four_bit, generate, lora, merge
from tuning.models.kernels import fuse
from tuning.models.load import load_base
from tuning.models.survey import survey
from tuning.plan.backends import FUSED
from tuning.training.finish import config_of, finish
from tuning.training.train import round_adapter

MIXTURES = (
    *("qwen3_moe", "mixtral", "gpt_oss", "nemotron_h"),
    *("qwen2_moe", "deepseek_v3"),  # with a shared expert, and a dense layer before the others
)
OWN_WAYS = ("llama4_text", "jetmoe", "longcat_flash", "inkling_text")
OTHERS = ("gpt2", "bert", "mamba2", "qwen3_5_text")  # Conv1D; an encoder; states; a hybrid
NF4 = {"type": "nf4", "double": True, "compute": "float32"}
IDS = torch.arange(5, 29).reshape(2, 12)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Builds a class's tiny checkpoint once."""
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(name: str) -> Path:
        return root / name if (root / name).exists() else architectures.write(name, root / name)

    return folder


def tuned(folder: Path, method: str, *, scale: float = 0.3, precision: str = "float32") -> Any:
    """The model in `folder` with a random adapter on all that LoRA reaches."""
    base = load_base(
        folder,
        precision=precision,
        quantisation=NF4 | {"compute": precision} if method == "qlora" else None,
        device="cpu",
        attention="sdpa",
    )
    found, recipe = survey(base), tiny_runs.recipe(method=method, rank=3, dropout=0.0)
    names = lora.targets(base, found, found.adaptable, layers=None)
    torch.manual_seed(0)
    made = lora.put(base, lora.lora_options(recipe), found.adaptable)
    for key, value in names.items():
        setattr(made.peft_config["default"], key, value)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return made.eval()


def step(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradient of each trained weight."""
    logits = model(input_ids=IDS, use_cache=False).logits
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    directions = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(logits, list(weights.values()), directions.to(logits.dtype))
    return logits.detach(), dict(zip(weights, grads, strict=True))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("name", MIXTURES)
def test_the_kernel_computes_what_peft_does(name: str, method: str, checkpoint: Any) -> None:
    """Same logits and gradients as the sum W + BA that peft makes of all experts."""
    model = tuned(checkpoint(name), method)
    expected, slopes = step(model)

    fused = fuse.fuse(model, FUSED)

    other = {key for key in fused.refused if "MLP" not in key}
    assert other <= {"rotary of GptOssAttention"}, fused  # it pairs halves in another way
    found, ours = step(model)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    for key, slope in slopes.items():
        assert slope.any(), key
        assert (ours[key] - slope).norm() <= 1e-3 * slope.norm(), key


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("name", OWN_WAYS)
def test_experts_of_an_own_kind_keep_their_way(name: str, method: str, checkpoint: Any) -> None:
    """Where a class computes its experts otherwise, each adapter still gets its gradient."""
    model = tuned(checkpoint(name), method)

    before, slopes = step(model)
    fuse.fuse(model, FUSED)
    after, _ = step(model)

    assert not [key for key, slope in slopes.items() if not slope.any()]
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


def publish(model: Any, base: Path, target: Path, method: str) -> adapters.Adapter:
    """The adapter folder that a run would leave."""
    tensors = round_adapter(model, torch.float32)
    config = config_of(model.peft_config["default"].to_dict(), base_name="o/m", base_revision=None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    finish(
        target, tensors=tensors, config=config, save_tokenizer=tokenizer.save_pretrained,
        step=1, steps=1,
    )  # fmt: skip
    made = {"method": method, "quantisation": NF4 if method == "qlora" else None}
    files.write_json(target / "tuning.json", {"recipe": made | {"precision": "float32"}})
    return adapters.inspect(target)


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("name", [*MIXTURES, *OWN_WAYS, *OTHERS])
def test_an_adapter_says_the_same_everywhere(
    name: str, method: str, checkpoint: Any, tmp_path: Path
) -> None:
    """The trained model, the attached adapter, plain peft and the merged model give one answer."""
    base = checkpoint(name)
    model = tuned(base, method)
    expected = logits(model)
    with model.disable_adapter():
        assert (logits(model) - expected).norm() > 0.1 * expected.norm()
    found = publish(model, base, tmp_path / "adapter", method)

    packing = NF4 if method == "qlora" else None
    again = load_base(base, precision="float32", quantisation=packing, device="cpu")
    torch.testing.assert_close(
        logits(generate.attach(again, found).eval()), expected, rtol=1e-3, atol=1e-4
    )
    merge.merge(base, tmp_path / "adapter", tmp_path / "merged", device="cpu")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged.eval()), expected, rtol=1e-3, atol=1e-4)
    if method == "lora":
        plain = load_base(base, precision="float32", quantisation=None, device="cpu")
        loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-3, atol=1e-4)


def test_packed_experts_take_a_quarter(checkpoint: Any) -> None:
    """Experts are held in 4 bits, by name and size; the router and the head in 16."""
    base = load_base(checkpoint("mixtral"), precision="bfloat16", quantisation=NF4, device="cpu")
    found = survey(base)

    packed = dict(four_bit.packed(base))

    assert packed == {name: found.numbers[name] for name in found.adaptable}
    stored = sum(base.get_parameter(name).nbytes for name in found.experts)
    assert 2 * stored == sum(found.numbers[name] for name in found.experts)
    assert torch.bfloat16 == base.model.layers[0].mlp.gate.weight.dtype


def test_dropout_is_for_the_linear_layers(checkpoint: Any) -> None:
    """peft has none for experts: the others get it, and the published config says so."""
    base = load_base(checkpoint("qwen3_moe"), precision="bfloat16", quantisation=None, device="cpu")
    recipe = tiny_runs.recipe(dropout=0.25)

    model, _ = lora.adapt(base, recipe)

    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    kinds = {type(m).__name__: type(m.lora_dropout["default"]).__name__ for m in layers}
    assert {"Linear": "Dropout", "ParamWrapper": "Identity"} == kinds
    assert 0.25 == model.peft_config["default"].lora_dropout
