"""The loss of a frozen output head in one pass: logits in tiles, their gradient at once, none kept.

trl's head forms the logits twice, for the loss and again for the gradient: 6 V d operations a
token. Since the head is frozen, the gradient of the hidden states follows from the logits while
they are there, 4 V d, and only the tokens that have a label are scored, on every device. Rows of
new tokens, which are trained, take the place of the head's own in each tile, and their gradient is
summed over the tiles.
"""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Iterator
from typing import Any

import torch
from peft.utils.other import TrainableTokensWrapper
from torch.autograd.function import once_differentiable

from tuning import presets
from tuning.models import shards
from tuning.plan.coefficients import FUSED_TILE_ROWS

IGNORED = -100  # a label that is none
SHIFT = 1024.0  # lifts probabilities out of float16's thin end; a power of two, so exact

Tensor = torch.Tensor


class _Loss(torch.autograd.Function):
    """-sum(log p(target)) over the rows of `hidden`, with the gradient formed in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Any,
        targets: Tensor,
        size: int,
        ids: Any,
        rows: Any,
    ) -> Tensor:
        row_grad = None if rows is None else torch.zeros_like(rows, dtype=torch.float32)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = hidden.new_zeros((), dtype=torch.float32)
        shift = SHIFT if hidden.dtype == torch.float16 else 1.0
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), size):
                part = slice(start, start + size)
                logits = torch.nn.functional.linear(hidden[part], weight, bias)
                if rows is not None:
                    logits.index_copy_(1, ids, hidden[part] @ rows.T)
                loss, probabilities = _score(logits, targets[part])
                total += loss
                if grad is not None:
                    place = targets[part][:, None]
                    probabilities.scatter_add_(1, place, place.new_full(place.shape, -1).float())
                    logits.copy_(probabilities.mul_(shift))
                    own = None
                    if row_grad is not None:
                        own = logits[:, ids]
                        row_grad += own.float().T @ hidden[part].float()
                        logits.index_fill_(1, ids, 0)
                    torch.mm(logits, weight, out=grad[part])
                    if own is not None:
                        grad[part] += own @ rows
                del logits, probabilities
        ctx.save_for_backward(grad, row_grad)
        ctx.shift = shift
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad, row_grad = ctx.saved_tensors
        scale = grads[0] / ctx.shift
        return grad * scale, *(None,) * 5, None if row_grad is None else row_grad * scale


def _score(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss of the rows, and float32 probabilities.

    The normaliser comes from the likeliest token, whose probability never underflows.
    """
    top, place = logits.max(dim=-1, keepdim=True)
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    normaliser = top.float() - probabilities.gather(-1, place).log()
    return (normaliser - logits.gather(-1, targets[:, None]).float()).sum(), probabilities


def labelled(labels: Tensor) -> Tensor:
    """Where `labels` [rows, length], without each row's first and laid end to end, have one."""
    return (labels[:, 1:].reshape(-1) != IGNORED).nonzero()[:, 0]


def loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    places: Tensor | None = None,
    ids: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Summed loss of `labels` [rows, length] given the tokens before them.

    `hidden` is [rows, length, width], `weight` [vocabulary, width]. The trained `rows` [tokens,
    width] replace those of the tokens `ids` in the frozen weight. Labels of -100 do not count;
    `places` says where the others are, as the function of that name gives it, or the host waits to
    know. In the type of autocast where that is on, summed in float32.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    targets = labels[:, 1:].reshape(-1)
    if places is None:
        places = labelled(labels)
    width = hidden.shape[-1]
    total: Tensor = _Loss.apply(  # type: ignore[no-untyped-call]
        hidden[:, :-1].reshape(-1, width).index_select(0, places).to(dtype),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        targets.index_select(0, places),
        FUSED_TILE_ROWS.get(kind, FUSED_TILE_ROWS["cuda"]),
        ids,
        None if rows is None else rows.to(weight.dtype).to(dtype),
    )
    return total


def suits(base: Any) -> bool:
    """Whether the loss of this model is the plain one of a head that is frozen but for rows."""
    head = base.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        head = head.token_adapter.get_base_layer()
    kind = presets.class_of(base.config.to_dict())
    if kind is not None and kind.own_head:
        return False
    text = base.config.get_text_config()
    changed = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
    return (
        type(head) is torch.nn.Linear
        and not head.weight.requires_grad
        and not any(getattr(text, name, None) for name in (*changed, "output_multiplier"))
        and not getattr(text, "output_router_logits", False)
    )


@contextlib.contextmanager
def installed(base: Any) -> Iterator[None]:
    """`install` for a while."""
    before = vars(base).get("forward")
    install(base)
    try:
        yield
    finally:
        del base.forward
        if before is not None:
            base.forward = before


def install(base: Any) -> None:
    """Let `base(..., scored=labels, places=None)` return `loss`; other calls are what they were."""
    forward = base.forward

    def scoring(
        self: Any,
        *args: Any,
        scored: Tensor | None = None,
        places: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        if scored is None:
            return forward(*args, **inputs)
        inputs.pop("labels", None)  # peft hands None on
        hidden = self.base_model(*args, use_cache=False, **inputs).last_hidden_state
        head, trained = self.get_output_embeddings(), {}
        if isinstance(head, TrainableTokensWrapper):
            tokens = head.token_adapter
            (adapter,) = tokens.active_adapters
            ids = torch.tensor(tokens.token_indices[adapter], device=hidden.device)
            trained = {"ids": ids, "rows": tokens.trainable_tokens_delta[adapter]}
            head = tokens.get_base_layer()
        with shards.gathered(head):
            return loss(hidden, head.weight, head.bias, scored, places=places, **trained)

    # `generate` asks the signature which inputs the model takes
    scoring.__signature__ = inspect.signature(type(base).forward)  # type: ignore[attr-defined]
    base.forward = types.MethodType(scoring, base)
