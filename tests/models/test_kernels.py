"""Fused kernels give what peft, trl and transformers give: forward, backward, 16 bits and NF4."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny_models
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model_state_dict
from tiny_steps import Step, adapted, away, furthest, step
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from tuning.models.kernels import fuse, head, heap, linear, norm
from tuning.models.load import DTYPES, load_base
from tuning.plan import backends

Build = Callable[..., Path]
DENSE = sorted(set(tiny_models.FAMILIES) - {"gptoss", "qwen3moe"})
# LoRA layers, MLPs, norms and rotary positions of two decoder layers
COUNTS = {
    "phi3": (8, 2, 5, 2),
    "phi3-longrope": (8, 2, 5, 2),
    "phi4-mini": (8, 2, 5, 2),
    "llama": (14, 2, 5, 2),
    "mistral": (14, 2, 5, 2),
    "ministral3": (14, 2, 5, 2),
    "qwen2": (14, 2, 5, 2),
    "qwen3": (14, 2, 9, 2),
    "gemma3": (14, 2, 13, 2),
    "falcon": (8, 2, 0, 2),
    "falcon-new": (8, 2, 0, 2),
    "phi2": (12, 2, 0, 2),
}


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


@pytest.mark.parametrize(
    ("family", "unpacked"), [("llama", 2 * (7 + 6 + 7)), ("phi2", 2 * (6 + 5 + 6))]
)
def test_layers_run_again_stop_before_what_nothing_needs(
    family: str, unpacked: int, tiny_base: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last product of an MLP is not computed again: its packed weight is unpacked twice."""
    tuned = adapted(tiny_base(family), method="qlora", precision="float32")
    fuse.fuse(tuned, backends.FUSED)
    tuned.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    calls: list[Any] = []
    own = linear.weight
    monkeypatch.setattr(linear, "weight", lambda *given: calls.append(given) or own(*given))

    step(tuned, "float32")

    assert len(calls) == unpacked


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    tokens=st.integers(1, 12),
    width=st.integers(1, 24),
    inner=st.integers(1, 24),
    ranks=st.tuples(*[st.integers(1, 5)] * 3),
    scales=st.tuples(*[st.sampled_from([0.5, 1.7, 2.0])] * 3),
    activation=st.sampled_from(sorted(linear.ACTIVATIONS)),
    shape=st.sampled_from(["two", "one", "plain"]),
    biased=st.booleans(),
    input_needs=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
def test_any_mlp_is_what_its_formula_gives(
    tokens: int,
    width: int,
    inner: int,
    ranks: tuple[int, int, int],
    scales: tuple[float, float, float],
    activation: str,
    shape: str,
    biased: bool,
    input_needs: bool,
    seed: int,
) -> None:
    """In float32, of any sizes, ranks and scales: output and every gradient."""
    draw = torch.Generator().manual_seed(seed)

    def projection(number: int, inputs: int, outputs: int) -> linear.Projection:
        base = torch.nn.Linear(inputs, outputs, bias=biased).requires_grad_(False)
        for own in base.parameters():
            own.normal_(std=0.5, generator=draw)
        a, b = (
            torch.randn(size, generator=draw).requires_grad_()
            for size in ((ranks[number], inputs), (outputs, ranks[number]))
        )
        return linear.Projection(base, a, b, scales[number])

    def plain(x: torch.Tensor, part: linear.Projection) -> torch.Tensor:
        return part.base(x) + part.scale * (x @ part.a.t()) @ part.b.t()

    outs = {"two": (inner, inner), "one": (2 * inner,), "plain": (inner,)}[shape]
    wide = tuple(projection(n, width, size) for n, size in enumerate(outs))
    kernel = linear.ACTIVATIONS[activation]
    parts = linear.Mlp(wide, projection(2, inner, width), kernel, shape != "plain")
    x = torch.randn(tokens, width, generator=draw).requires_grad_(input_needs)
    made = [plain(x, part) for part in wide]
    gate, up = (made[0].chunk(2, dim=-1) if shape == "one" else made) if parts.gated else made * 2
    active = kernel.forward(gate)
    expected = plain(active * up if parts.gated else active, parts.down)

    found = linear.mlp(x, parts, dtype=torch.float32)

    grad = torch.randn(expected.shape, generator=draw)
    trained = [t for part in (*wide, parts.down) for t in (part.a, part.b)] + [x] * input_needs
    theirs, ours = (torch.autograd.grad(out, trained, grad) for out in (expected, found))
    for one, other in zip([found, *ours], [expected, *theirs], strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-5


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

    assert (0, 0, 5, 2) == tuple(fuse.fuse(tuned, backends.FUSED).counts.values())


def test_fewer_targets_fuse_what_there_is(tiny_base: Build) -> None:
    """A lone query projection is fused by itself; an MLP without all its adapters is not."""
    changes = {"targets": ("q_proj", "up_proj")}
    tuned = adapted(tiny_base("llama"), method="lora", precision="float32", **changes)
    expected = step(tuned, "float32")

    assert (4, 0, 5, 2) == tuple(fuse.fuse(tuned, backends.FUSED).counts.values())
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
