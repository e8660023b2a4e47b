"""Fused kernels give what peft, trl and transformers give: forward, backward, 16 bits and NF4."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny_models
import tiny_runs
import torch
import transformers
from peft import get_peft_model_state_dict
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from tuning.models.kernels import fuse, head, heap, norm
from tuning.models.load import DTYPES, load_base
from tuning.models.lora import adapt
from tuning.plan import backends

Build = Callable[..., Path]
DENSE = sorted(set(tiny_models.FAMILIES) - {"gptoss", "qwen3moe"})
# LoRA layers, MLPs and norms of two decoder layers
COUNTS = {
    "phi3": (8, 2, 5),
    "phi3-longrope": (8, 2, 5),
    "phi4-mini": (8, 2, 5),
    "llama": (14, 2, 5),
    "mistral": (14, 2, 5),
    "ministral3": (14, 2, 5),
    "qwen2": (14, 2, 5),
    "qwen3": (14, 2, 9),
    "gemma3": (14, 2, 13),
    "falcon": (8, 2, 0),
    "falcon-new": (8, 2, 0),
    "phi2": (12, 2, 0),
}
Step = tuple[torch.Tensor, dict[str, torch.Tensor]]


def adapted(folder: Path, *, method: str, precision: str, **changes: Any) -> Any:
    """A tiny model with LoRA layers that do something, in training."""
    packing = tiny_runs.NF4 | {"compute": precision} if method == "qlora" else None
    recipe = tiny_runs.recipe(
        **{"method": method, "precision": precision, "dropout": 0.0, "quantisation": packing}
        | changes
    )
    base = load_base(folder, precision=precision, quantisation=packing, device="cpu")
    tuned, _ = adapt(base, recipe)
    draw = torch.Generator().manual_seed(0)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.05, generator=draw)
    tuned.enable_input_require_grads()
    return tuned.train()


def step(tuned: Any, precision: str) -> Step:
    """Logits, and gradients by name, of a forward and a backward."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 200, (2, 40), generator=draw)
    vocabulary = tuned.config.get_text_config().vocab_size
    weights = torch.randn(2, 40, vocabulary, generator=draw)
    tuned.zero_grad()
    dtype = DTYPES[precision]
    plain = dtype == torch.float32
    with contextlib.nullcontext() if plain else torch.autocast("cpu", dtype):
        logits = tuned(input_ids=ids, use_cache=False).logits.float()
    (logits * weights).sum().backward()
    grads = {n: p.grad.clone() for n, p in tuned.named_parameters() if p.grad is not None}
    return logits.detach(), grads


def away(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative distance."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def furthest(found: Step, expected: Step) -> float:
    """The largest of logits and all gradients."""
    assert found[1].keys() == expected[1].keys()
    return max(away(found[0], expected[0]), *(away(found[1][n], g) for n, g in expected[1].items()))


def gradients(made: Step, names: Iterable[str]) -> torch.Tensor:
    """All in one."""
    return torch.cat([made[1][name].flatten().double() for name in names])


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("family", DENSE)
def test_every_family_gives_what_peft_gives(family: str, method: str, tiny_base: Build) -> None:
    """In float32, logits and all gradients agree to its last digits, with NF4 weights, too."""
    tuned = adapted(tiny_base(family), method=method, precision="float32")
    expected = step(tuned, "float32")

    counts = fuse.fuse(tuned, backends.FUSED).counts

    assert COUNTS[family] == tuple(counts.values())
    assert furthest(step(tuned, "float32"), expected) < 3e-6


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3", "falcon"])
def test_half_precision_is_no_further_from_the_truth(
    family: str, method: str, precision: str, tiny_base: Build
) -> None:
    """Fewer roundings: as near to float32 with the same weights as peft is, to one rounding.

    In which order a product's sums are rounded is up to the processor's kernel.
    """
    rounding = torch.finfo(DTYPES[precision]).eps / 2
    tuned = adapted(tiny_base(family), method=method, precision=precision)
    eager = step(tuned, precision)
    fuse.fuse(tuned, backends.FUSED)
    fused = step(tuned, precision)
    if method == "qlora":
        tuned.get_base_model().dequantize(dtype=torch.float32)
        for layer in tuned.modules():
            vars(layer).pop("forward", None)
    truth = step(tuned.float(), "float32")

    assert away(fused[0], truth[0]) < 1.1 * away(eager[0], truth[0]) + rounding
    names = list(eager[1])
    near, far = (away(gradients(s, names), gradients(truth, names)) for s in (fused, eager))
    assert near < 1.1 * far + rounding


def test_checkpointing_changes_nothing(tiny_base: Build) -> None:
    """Layers computed again in the backward give the same gradients bit for bit."""
    tuned = adapted(tiny_base("llama"), method="qlora", precision="float32")
    fuse.fuse(tuned, backends.FUSED)
    expected = step(tuned, "float32")
    tuned.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})

    found = step(tuned, "float32")

    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][name], grad) for name, grad in expected[1].items())


def test_peft_still_works(tiny_base: Build) -> None:
    """Names, switching off, merging and taking out are those of an unfused model."""
    plain = adapted(tiny_base("llama"), method="lora", precision="float32").eval()
    fused = adapted(tiny_base("llama"), method="lora", precision="float32").eval()
    fuse.fuse(fused, backends.FUSED)
    ids = torch.arange(5, 40)[None]

    def logits(tuned: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = tuned(input_ids=ids).logits
        return found

    close = {"atol": 2e-5, "rtol": 0}
    assert list(get_peft_model_state_dict(plain)) == list(get_peft_model_state_dict(fused))
    torch.testing.assert_close(logits(fused), logits(plain), **close)
    with plain.disable_adapter(), fused.disable_adapter():
        torch.testing.assert_close(logits(fused), logits(plain), **close)
    fused.merge_adapter()
    torch.testing.assert_close(logits(fused), logits(plain), **close)
    fused.unmerge_adapter()
    torch.testing.assert_close(logits(fused), logits(plain), **close)
    torch.testing.assert_close(
        logits(fused.merge_and_unload()), logits(plain.merge_and_unload()), **close
    )


@pytest.mark.parametrize("changes", [{"dropout": 0.1}, {"dora": True}])
def test_what_a_kernel_does_not_cover_stays_peft_s(
    changes: dict[str, Any], tiny_base: Build
) -> None:
    """With dropout or DoRA no LoRA layer is touched."""
    tuned = adapted(tiny_base("llama"), method="lora", precision="float32", **changes)

    assert (0, 0, 5) == tuple(fuse.fuse(tuned, backends.FUSED).counts.values())


def test_fewer_targets_fuse_what_there_is(tiny_base: Build) -> None:
    """A lone query projection is fused by itself; an MLP without all its adapters is not."""
    changes = {"targets": ("q_proj", "up_proj")}
    tuned = adapted(tiny_base("llama"), method="lora", precision="float32", **changes)
    expected = step(tuned, "float32")

    assert (4, 0, 5) == tuple(fuse.fuse(tuned, backends.FUSED).counts.values())
    assert furthest(step(tuned, "float32"), expected) < 3e-6


def test_nothing_is_fused_unasked(tiny_base: Build) -> None:
    """Without names of kernels the model stays as it is."""
    tuned = adapted(tiny_base("llama"), method="lora", precision="float32")
    fuse.fuse(tuned, ())

    assert not [m for m in tuned.modules() if "forward" in vars(m)]


# The head.


def head_case(dtype: torch.dtype, *, biased: bool) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 700, 64, generator=draw).to(dtype)
    weight = (torch.randn(5000, 64, generator=draw) * 0.3).to(dtype)
    bias = torch.randn(5000, generator=draw).to(dtype) if biased else None
    labels = torch.randint(0, 5000, (2, 700), generator=draw)
    labels[0, :300] = labels[1, 650:] = head.IGNORED
    return hidden, weight, bias, labels  # type: ignore[return-value]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_head_s_loss_is_cross_entropy(dtype: torch.dtype, biased: bool) -> None:
    """Loss and gradient of the labelled tokens, at least as close to float64 as trl's head."""
    hidden, weight, bias, labels = head_case(dtype, biased=biased)
    wide = hidden.double().requires_grad_()
    logits = torch.nn.functional.linear(
        wide[:, :-1], weight.double(), None if bias is None else bias.double()
    )
    expected = torch.nn.functional.cross_entropy(
        logits.reshape(-1, 5000), labels[:, 1:].reshape(-1), reduction="sum"
    )
    (expected / 7).backward()

    ours, theirs = (hidden.clone().requires_grad_() for _ in range(2))
    loss = head.loss(ours, weight, bias, labels)
    (loss / 7).backward()
    scored = labels[:, 1:] != head.IGNORED
    said = ChunkedLogProbFunction.apply(
        theirs[:, :-1].reshape(-1, 64), weight, bias, labels[:, 1:].clamp(min=0).reshape(-1),
        1.0, 32768, None, 1.0, (),
    )[0]  # fmt: skip
    (-said.view(scored.shape).masked_fill(~scored, 0).sum() / 7).backward()

    assert loss.item() == pytest.approx(expected.item(), rel=2e-5)
    assert ours.grad is not None and theirs.grad is not None and wide.grad is not None
    rounding = torch.finfo(dtype).eps / 2  # the order of sums is up to the processor's kernel
    assert away(ours.grad, wide.grad) < 1.05 * away(theirs.grad, wide.grad) + rounding


def test_a_row_without_labels_has_no_loss() -> None:
    """Nothing to score is a loss of zero with a gradient of zeros, not an error."""
    hidden, weight, _, labels = head_case(torch.float32, biased=False)
    hidden.requires_grad_()

    loss = head.loss(hidden, weight, None, torch.full_like(labels, head.IGNORED))
    loss.backward()

    assert loss.item() == 0.0
    assert hidden.grad is not None and not hidden.grad.any()


def test_a_wrong_certainty_is_still_finite() -> None:
    """A target of no probability at all has its true loss, not infinity."""
    hidden = torch.tensor([[[200.0, 0.0], [0.0, 0.0]]])

    loss = head.loss(hidden, torch.eye(2), None, torch.tensor([[head.IGNORED, 1]]))

    assert loss.item() == pytest.approx(200.0)


@pytest.mark.parametrize("name", ["llama", "nemotron_h", "bamba"])
def test_a_model_with_the_one_pass_head_still_answers(name: str, tmp_path: Path) -> None:
    """`generate` asks the forward which inputs it takes."""
    base = architectures.write(name, tmp_path / "base")
    model = load_base(base, precision="float32", quantisation=None, device="cpu")
    prompt = torch.arange(4, 12)[None]
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)

    head.install(model)

    assert torch.equal(expected, model.generate(**inputs, max_new_tokens=3, do_sample=False))


def test_a_head_of_another_kind_is_trl_s(tiny_base: Build) -> None:
    """Capped or scaled logits, and a head that is trained, are left alone."""
    base = load_base(tiny_base("llama"), precision="float32", quantisation=None, device="cpu")
    base.requires_grad_(False)
    assert head.suits(base)
    base.config.final_logit_softcapping = 30.0
    assert not head.suits(base)
    base.config.final_logit_softcapping = None
    base.lm_head.weight.requires_grad_()
    assert not head.suits(base)


# Norms and memory.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(fuse.NORMS))
def test_norms_are_transformers_own(name: str, dtype: torch.dtype) -> None:
    """The kernel gives what the class of that name gives, and its gradient."""
    lifted = fuse.NORMS[name]
    family = name.removesuffix("RMSNorm").lower()
    kind = getattr(getattr(transformers.models, family), f"modeling_{family}")
    layer = getattr(kind, name)(48).to(dtype).requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    layer.weight.normal_(generator=draw)
    x, y = (torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(2)).to(dtype)
            .requires_grad_() for _ in range(2))  # fmt: skip
    grad = torch.randn(3, 7, 48, generator=draw).to(dtype)

    expected = layer(x)
    expected.backward(grad)
    found = norm.rms_norm(y, layer.weight, 1e-6, lifted=lifted)
    found.backward(grad)

    assert found.dtype == expected.dtype
    assert x.grad is not None and y.grad is not None
    within = 1e-6 if dtype == torch.float32 else 4e-3
    assert away(found, expected) < within
    assert away(y.grad, x.grad) < within


def test_freed_memory_is_kept() -> None:
    """glibc takes both settings; elsewhere nothing happens."""
    assert heap.keep() in (True, False)
