"""Attention by document: packed rows give what separate rows give, and no mask of all pairs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tuning.errors import SpecError
from tuning.models.kernels import apart, attention, whole
from tuning.models.load import load_base
from tuning.plan.backends import VARLEN
from tuning.training.batches import NOTED, Numbered

Build = Callable[..., Path]
PACKED = sorted(set(tiny_models.FAMILIES) - {"falcon", "falcon-new", "gptoss"})
LENGTHS = (37, 91, 5)


def load(folder: Path, name: str) -> Any:
    return load_base(
        folder, precision="float32", quantisation=None, device="cpu", attention=name
    ).eval()


def documents() -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(10, 250, (n,), generator=draw).tolist() for n in LENGTHS]


def collated(rows: list[list[int]]) -> dict[str, Any]:
    """The rows as one packed row, as the trainer hands it to the model."""
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    whole = {
        "input_ids": [token for row in rows for token in row],
        "seq_lengths": [len(row) for row in rows],
    }
    inputs = collate([whole])
    inputs.pop("labels")
    return attention.without_mask(inputs)


def gradients(model: Any, *losses: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    torch.stack(losses).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", PACKED)
def test_packed_documents_are_as_separate_ones(family: str, tiny_base: Build) -> None:
    """Logits and gradients of a packed row are those of its documents run one by one by eager."""
    ours, plain = load(tiny_base(family), VARLEN), load(tiny_base(family), "eager")
    rows = documents()

    together = ours(**collated(rows), use_cache=False).logits[0]
    alone = [plain(input_ids=torch.tensor([row])).logits[0] for row in rows]

    torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=0)
    weights = torch.linspace(-1, 1, together.numel()).view_as(together)
    slope = gradients(ours, (together * weights).sum())
    expected = gradients(
        plain, *((a * w).sum() for a, w in zip(alone, weights.split(LENGTHS), strict=True))
    )
    assert ((slope - expected).norm() / expected.norm()).item() < 1e-4


def test_no_mask_of_all_pairs_is_made(tiny_base: Build) -> None:
    """The largest tensor of a packed row grows with its tokens, not with their square."""
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    largest = max(largest, leaf.untyped_storage().nbytes() // leaf.element_size())
            return out

    rows = [list(range(10, 42))] * 64
    ours = load(tiny_base("llama"), VARLEN).model
    with Sizes(), torch.no_grad():
        ours(**collated(rows), use_cache=False)

    assert largest < (32 * 64) ** 2 / 8


def test_answers_are_those_of_eager(tiny_base: Build) -> None:
    """The same model generates, with a cache, and reads padded rows: by sdpa."""
    ours, plain = load(tiny_base("mistral"), VARLEN), load(tiny_base("mistral"), "eager")
    ids = torch.arange(10, 90)[None]
    mask = torch.ones(2, 80, dtype=torch.long)
    mask[0, 60:] = 0

    answer = ours.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    padded = ours(input_ids=ids.repeat(2, 1), attention_mask=mask).logits

    assert torch.equal(
        plain.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0), answer
    )
    expected = plain(input_ids=ids.repeat(2, 1), attention_mask=mask).logits
    torch.testing.assert_close(padded[0, :60], expected[0, :60], atol=2e-5, rtol=0)


def test_what_the_kernel_lacks_is_refused(tiny_base: Build) -> None:
    """Sinks are named; a family without an attention interface fails rather than being wrong."""
    with pytest.raises(NotImplementedError, match="torch_varlen attention has no attention sinks"):
        load(tiny_base("gptoss"), VARLEN)(input_ids=torch.arange(5, 15)[None])
    q = torch.zeros(1, 2, 6, 8)
    for options, lacking in (({"softcap": 50.0}, "softcap"), ({"dropout": 0.1}, "dropout")):
        offsets = torch.tensor([0, 6], dtype=torch.int32)
        with pytest.raises(NotImplementedError, match=f"has no {lacking}"):
            attention.attention(torch.nn.Module(), q, q, q, None, cu_seq_lens_q=offsets, **options)
    with pytest.raises(SpecError, match="MODEL-107 falcon: has no torch_varlen attention"):
        load(tiny_base("falcon"), VARLEN)(input_ids=torch.arange(5, 15)[None])


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("grouped", [True, False])
def test_the_kernel_is_called_as_it_wants(grouped: bool, window: int | None) -> None:
    """torch 2.13 gets fewer key heads as they are, torch 2.11 repeated; both the window left."""

    def new(
        q: Any, k: Any, v: Any, at: Any, at_k: Any, most: int, most_k: int, *,
        scale: Any, window_size: tuple[int, int], enable_gqa: bool,
    ) -> torch.Tensor:  # fmt: skip
        assert enable_gqa and (most, window_size[1]) == (most_k, 0)
        seen = None if window_size[0] < 0 else window_size[0] + 1
        return attention.by_document(q, k, v, at, scale=scale, window=seen)

    def old(
        q: Any, k: Any, v: Any, at: Any, at_k: Any, most: int, most_k: int, *,
        scale: Any, window_size: tuple[int, int],
    ) -> torch.Tensor:  # fmt: skip
        assert q.shape == k.shape == v.shape
        seen = None if window_size[0] < 0 else window_size[0] + 1
        return attention.by_document(q, k, v, at, scale=scale, window=seen)

    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(30, heads, 16, generator=draw) for heads in (4, 2, 2))
    offsets = torch.tensor([0, 9, 30], dtype=torch.int32)

    out = attention.by_kernel(
        q, k, v, offsets, longest=21, scale=0.3, window=window, kernel=new if grouped else old
    )

    expected = attention.by_document(q, k, v, offsets, scale=0.3, window=window)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


def test_attention_that_leaks_is_left_for_one_that_does_not(tiny_base: Build) -> None:
    """The loaded model is asked; where its attention mixes documents, sdpa takes its place."""

    def leaky(module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
        options.pop("cu_seq_lens_q", None)
        return attention.attention(module, q, k, v, None, **options)

    ALL_ATTENTION_FUNCTIONS.register("leaky", leaky)
    base = load(tiny_base("llama"), "sdpa")
    tuned = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))

    assert apart.settle(tuned, "leaky", precision=torch.float32) == "sdpa"
    assert base.config._attn_implementation == "sdpa"
    assert apart.settle(tuned, VARLEN, precision=torch.float32) == VARLEN
    assert apart.settle(tuned, "leaky", precision=torch.float32, packing=False) == "sdpa"


class DslError(Exception):
    """Not an error that torch raises, as a package's compiler has them."""


@pytest.mark.parametrize("missing", [True, False])
def test_after_a_package_comes_torchs_own_kernel(
    missing: bool, tiny_base: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flash-attn that is not there, or whose kernels fail, leaves packed rows by document."""

    def failing(*arguments: Any, **options: Any) -> Any:
        raise DslError

    base = load(tiny_base("llama"), "sdpa")
    tuned = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    if not missing:
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_4", failing)
        monkeypatch.setattr(
            base,
            "set_attn_implementation",
            lambda name: setattr(base.config, "_attn_implementation", name),
        )

    whole.replace(tuned, (), "flash_attention_4", precision=torch.float32, packing=True)

    assert base.config._attn_implementation == VARLEN


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: no kernel image is available for execution on the device"),
        RuntimeError("CUDA driver error: unknown error"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx"),
        torch.AcceleratorError("an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
    ids=str,
)
def test_what_fails_on_the_card_is_no_fault_of_packing(error: Exception, tiny_base: Build) -> None:
    """The card's own error comes through: another attention would fail on it as well."""

    def failing(*arguments: Any, **options: Any) -> Any:
        raise error

    ALL_ATTENTION_FUNCTIONS.register("failing", failing)
    base = load(tiny_base("llama"), "sdpa")
    tuned = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))

    with pytest.raises(type(error), match=str(error)):
        apart.settle(tuned, "failing", precision=torch.float32)


@pytest.mark.parametrize(
    ("capability", "grouped"), [((7, 0), False), ((7, 5), False), ((8, 0), True)]
)
def test_older_cards_get_as_many_key_heads_as_queries(
    capability: tuple[int, int], grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below Ampere grouped heads without a mask would write out all scores."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    key = SimpleNamespace(device=torch.device("cuda"), shape=(1, 2, 8, 64))

    assert grouped is sdpa_attention.use_gqa_in_sdpa(None, key, key)
    assert not sdpa_attention.use_gqa_in_sdpa(torch.ones(1), key, key)
    on_cpu = torch.empty(1, 2, 8, 64)
    assert sdpa_attention.use_gqa_in_sdpa(None, on_cpu, on_cpu)


@pytest.mark.parametrize("name", ["torch_varlen", "sdpa", "flash_attention_2"])
def test_a_model_is_asked_with_what_training_gives_it(name: str) -> None:
    """Offsets and numbers of documents included: recurrent layers read them."""
    documents = [torch.arange(3), torch.arange(5, 12)]
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    numbered = Numbered(collate, by_document=name == "torch_varlen")
    rows = [{"input_ids": ids.numpy(), "labels": ids.numpy()} for ids in documents]
    given = {key: value for key, value in numbered(rows).items() if key not in (*NOTED, "labels")}

    asked = attention.packed(documents, device=torch.device("cpu"), name=name)

    assert given.keys() == asked.keys()
    for key, value in given.items():
        if key != "attention_mask":  # the shape alone counts
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(asked[key])), key
            assert getattr(value, "dtype", None) == getattr(asked[key], "dtype", None), key
