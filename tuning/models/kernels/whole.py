"""Puts kernels and attention into a loaded model, and compares the whole with the library's own.

Each kernel is compared with its module where it is put in (`parity`), and packed documents are kept
apart (`apart`). Here the model as it will train is asked once, before the first step: its loss and
the gradients of its LoRA weights are those of peft and transformers without any of it, on random
tokens. What fails is taken out again.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from tuning.errors import SpecError, Stopped
from tuning.models import shards
from tuning.models.kernels import apart, attention, fuse, head, parity
from tuning.plan.backends import BY_OFFSETS, HEAD

logger = logging.getLogger(__name__)

LENGTH = 16  # tokens of each of two documents
SIZE = 0.05  # of LoRA's B
ROUNDING = {torch.float32: 2.0**-20, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-8}
# Relative, of the loss and of all gradients together. Roundings of 16 bits grow through the layers
# to some hundredths; another computation differs by tenths. Where a rounding turns a choice (of an
# expert, of a token), more is allowed: three times what a change of B by a rounding makes.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 0.1, torch.bfloat16: 0.15}

Results = list[torch.Tensor]


def replace(
    tuned: Any,
    kernels: Collection[str],
    name: str,
    *,
    precision: torch.dtype,
    packing: bool,
) -> None:
    """Put `kernels` and the attention `name` into the peft model `tuned`, where they are right.

    `tuned.get_base_model().one_pass` says afterwards whether the one-pass head may score it. Raises
    SpecError for packing in a model whose documents cannot be kept apart, or if the loss without
    our kernels still is another one.
    """
    base = tuned.get_base_model()
    plain = apart.plain(base)
    base.one_pass = False
    expected: Results = []
    allowed: list[float] = []
    if kernels or name != plain:
        apart.attend(base, plain)
        expected = _results(tuned, precision, packed=False)
        nearly = _results(tuned, precision, packed=False, size=SIZE * (1 + ROUNDING[precision]))
        allowed = [
            TOLERANCE[precision] + 3 * _apart(*pair) for pair in zip(expected, nearly, strict=True)
        ]
    logger.info("fused kernels: %s", fuse.fuse(tuned, kernels) or "none")
    one_pass = HEAD in kernels and head.suits(base)
    less = [(True, one_pass), (True, False), (False, False)]
    ways = [(way, *which) for which in less for way in apart.ways(name)]
    for way, fused, scores in dict.fromkeys([*ways, (plain, False, False)]):
        base.one_pass = scores
        if not fused:
            fuse.undo(tuned)
        if packing or way in BY_OFFSETS:
            apart.settle(tuned, way, precision=precision, packing=packing)
        else:
            apart.attend(base, way)
        if not expected or _agrees(tuned, precision, expected, allowed, packing=packing):
            return
        parts = [f"{way} attention", "fused kernels" * fused, "the one-pass head" * scores]
        text = ", ".join(filter(None, parts))
        logger.warning("another loss or gradient with %s: trying less", text)
    raise SpecError.at(
        "MODEL-118",
        base.config.model_type,
        "computes another loss or gradient with our kernels or attention than without them",
        "set fused_kernels: false and packing: false",
    )


def _agrees(
    tuned: Any,
    precision: torch.dtype,
    expected: Results,
    allowed: list[float],
    *,
    packing: bool,
) -> bool:
    try:
        found = _results(tuned, precision, packed=packing)
    except Stopped:
        raise
    except Exception as error:
        if apart.is_of_card(error):
            raise
        logger.warning("%s: %s", type(error).__name__, error)
        return False
    return _same(expected, allowed, found)


def _same(expected: Results, allowed: list[float], found: Results) -> bool:
    return all(
        not theirs.isfinite().all() or _apart(theirs, ours) <= most  # or out of range of this type
        for theirs, ours, most in zip(expected, found, allowed, strict=True)
    )


def _apart(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """The difference, relative."""
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


def documents(tuned: Any) -> torch.Tensor:
    """Two documents of random tokens, the same ones each time."""
    vocabulary = tuned.get_base_model().config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (2, LENGTH), generator=generator).to(tuned.device)


def _results(tuned: Any, precision: torch.dtype, *, packed: bool, size: float = SIZE) -> Results:
    """The summed loss of two documents, and its gradients by the trained weights, as one vector.

    The documents are two rows, or one packed row. LoRA's B, zero before training, is random of
    that size meanwhile; nothing is drawn from the global random generators.
    """
    base, training = tuned.get_base_model(), tuned.training
    generator = torch.Generator().manual_seed(0)
    tokens = documents(tuned)
    weights = [w for w in tuned.parameters() if w.requires_grad]
    adapters = [m for m in tuned.modules() if isinstance(m, LoraLayer)]
    b = [part.weight for layer in adapters for part in layer.lora_B.values()]
    tuned.eval()
    try:
        with (
            parity.random_weights(b, generator, size),
            torch.autocast(tuned.device.type, precision, enabled=precision != torch.float32),
        ):
            loss = _loss(tuned, tokens, packed=packed, one_pass=base.one_pass)
            gradients = shards.gradients(loss, weights)
    finally:
        tuned.train(training)
    return [loss.detach().double(), torch.cat([g.double().flatten() for g in gradients])]


def _loss(tuned: Any, documents: torch.Tensor, *, packed: bool, one_pass: bool) -> torch.Tensor:
    """Summed loss of each token but the first of its document; by the one-pass head if asked."""
    labels = documents.clone()
    inputs: dict[str, Any] = {"input_ids": documents}
    if packed:
        name = tuned.get_base_model().config._attn_implementation
        inputs = attention.packed(list(documents), device=documents.device, name=name)
        labels[:, 0] = head.IGNORED
        labels = labels.reshape(1, -1)
    if one_pass:
        with head.installed(tuned.get_base_model()):
            scored: torch.Tensor = tuned(**inputs, scored=labels)
        return scored
    logits = tuned(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(
        logits, labels[:, 1:].flatten(), reduction="sum", ignore_index=head.IGNORED
    )
