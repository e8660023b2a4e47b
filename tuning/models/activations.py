"""What a training step keeps of the decoder layers' activations, and where.

Everything; the input of a layer, from which its activations are computed again (checkpointing); or
that input in pinned host memory (offload). An MLP can be computed a share of the tokens at a time,
and the input embeddings can be looked up in host memory.

Checkpointing is torch's, set up by transformers. Its own `offload` copies on the stream that
computes, which then waits; trl's `OffloadActivations` takes all that is saved, and empties the
allocator's cache and waits for the device at each micro-batch where bitsandbytes is imported. Here
the inputs are copied on a stream of their own: in the forward while the layer computes, in the
backward while the layer above it does. On a CPU the same code copies from host to host.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch.autograd.graph import saved_tensors_hooks
from transformers.modeling_layers import GradientCheckpointingLayer

from tuning.models.kernels.fuse import WIDE
from tuning.models.kernels.linear import KEEPS
from tuning.models.survey import REPEATED, TOWER
from tuning.plan.activations import TILES, Activations


def arrange(model: torch.nn.Module, kept: Activations, *, host: Host | None = None) -> None:
    """Let `model`, whose checkpointing transformers has enabled or not, keep no more than `kept`.

    `host` makes the tensor in host memory for one on the device; pinned if not given.
    """
    layers = decoder_layers(model)
    if kept.host_embeddings:
        _look_up_on_host(model)
    if kept.tiled:
        for layer in layers:
            _tile(layer)
    if not kept.checkpointing:
        return
    again = len(layers) if kept.recomputed is None else kept.recomputed
    for layer in layers[again:]:
        layer.gradient_checkpointing = False
    for layer in layers[:again]:
        for module in layer.modules():
            if isinstance(module, Linear4bit):
                setattr(module, KEEPS, kept.unpacked)
    if kept.offload:
        offload = Offload(host or pinned)
        for number, layer in enumerate(layers):
            layer._gradient_checkpointing_func = offload.around(
                layer._gradient_checkpointing_func, first=number == 0
            )


def decoder_layers(model: torch.nn.Module) -> list[Any]:
    """The repeated layers of the text model, in the order they run; none within another."""
    found: dict[str, torch.nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, GradientCheckpointingLayer) or TOWER.search(name):
            continue
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if REPEATED.search(f"{name}.") and not inside:
            found[name] = module
    return list(found.values())


# Input embeddings in host memory.


def _look_up_on_host(model: Any) -> None:
    """Take the input embeddings off the device, unless they are trained or the output layer's, too.

    The host waits for the tokens of each micro-batch, which it has copied to the device before.
    """
    embedding: Any = model.get_input_embeddings()
    head = model.get_output_embeddings()
    kind = type(embedding)
    if kind is not torch.nn.Embedding or embedding.weight.requires_grad:
        return
    if head is None or getattr(head, "weight", None) is embedding.weight:
        return
    table = embedding.weight.detach().cpu()
    del embedding.weight  # a parameter: models take the device of their first for their own
    embedding.weight = table

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(ids.cpu(), table).to(ids.device)

    embedding.forward = forward


# Layer inputs in host memory.

Host = Callable[[torch.Tensor], torch.Tensor]


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """Host memory for `tensor` that a GPU can copy to and from while it computes."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)


class Held:
    """A layer's input: in host memory, and on the device while it is copied or used."""

    def __init__(self, tensor: torch.Tensor, host: torch.Tensor, below: Held | None) -> None:
        self.device, self.host, self.below = tensor.device, host, below
        self.here: torch.Tensor | None = tensor
        self.copied: Any = None  # event: the copy to `here`, or from it, has ended


class Offload:
    """The inputs of checkpointed layers between forward and backward.

    A copy's source is let go once the stream that computes waits for that copy, so that memory is
    used again in the order of that stream, however far the host is ahead of the device.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._above: Held | None = None  # the last input of this forward
        self._stream: Any = None

    def around(self, checkpoint: Callable[..., Any], *, first: bool) -> Callable[..., Any]:
        """`checkpoint` of a layer, the input of which is held in host memory."""

        @functools.wraps(checkpoint)
        def run(function: Any, hidden: torch.Tensor, *rest: Any, **options: Any) -> Any:
            if first:
                self._above = None
            if hidden.is_leaf and hidden.requires_grad:  # autograd holds it in any case
                return checkpoint(function, hidden, *rest, **options)
            # by storage: torch may pack another tensor object of the same memory
            storage = hidden.untyped_storage()._cdata

            def pack(tensor: torch.Tensor) -> Any:
                same = tensor.untyped_storage()._cdata == storage
                return self._pack(tensor) if same else tensor

            with saved_tensors_hooks(pack, self._unpack):
                return checkpoint(function, hidden, *rest, **options)

        return run

    def _pack(self, tensor: torch.Tensor) -> Held:
        held = Held(tensor, self._host(tensor), self._above)
        held.copied = self._copy(held.host, tensor)
        if self._above is not None:
            self._release(self._above)
        self._above = held
        return held

    def _unpack(self, saved: Any) -> torch.Tensor:
        if not isinstance(saved, Held):
            return saved  # type: ignore[no-any-return]
        self._above = None
        if saved.here is None:  # the last layer's never left
            self._fetch(saved)
        if saved.copied is not None:
            torch.cuda.current_stream(saved.device).wait_event(saved.copied)
        tensor, saved.here, saved.copied = saved.here, None, None
        below, saved.below = saved.below, None  # or the host memory of all would live as long
        if below is not None and below.here is None:
            self._fetch(below)
        assert tensor is not None
        return tensor

    def _release(self, held: Held) -> None:
        if held.copied is not None:
            torch.cuda.current_stream(held.device).wait_event(held.copied)
        held.here = held.copied = None

    def _fetch(self, held: Held) -> None:
        held.here = torch.empty_like(held.host, device=held.device)
        held.copied = self._copy(held.here, held.host)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        """Copy after all that is queued to compute; returns the event of its end on a GPU."""
        device = target if target.is_cuda else source
        if not device.is_cuda:
            target.copy_(source)
            return None
        computing = torch.cuda.current_stream(device.device)
        self._stream = self._stream or torch.cuda.Stream(device.device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(computing)
        with torch.cuda.stream(self._stream), torch.no_grad():
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()


# MLPs, a share of the tokens at a time.


def _tile(layer: torch.nn.Module) -> None:
    """Let the dense MLP of `layer`, if it has one, compute its tokens in TILES parts."""
    for module in layer.children():
        names = {name for name, _ in module.named_children()}
        if any(isinstance(m, torch.nn.Dropout) and m.p for m in module.modules()):
            continue  # the second time it would drop others
        if len(inspect.signature(type(module).forward).parameters) != 2:
            continue  # it takes more than the hidden states
        if any({*wide, last} <= names for wide, (last, _) in WIDE.items()):
            module.forward = functools.partial(_tiled, module, module.forward)


def _tiled(module: torch.nn.Module, forward: Callable[..., Any], x: torch.Tensor) -> Any:
    """`forward` of `module` on x [rows, length, hidden], with the activations of one tile."""
    if not torch.is_grad_enabled() or not x.requires_grad:
        return _in_tiles(forward, x)
    kept = _Keep.apply(x)  # type: ignore[no-untyped-call]
    weights = [p for p in module.parameters() if p.requires_grad]
    return _Tiled.apply(kept, forward, kept.grad_fn, *weights)  # type: ignore[no-untyped-call]


def _in_tiles(forward: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor | None = None
    for tokens in _tokens(x):
        part = forward(x.flatten(0, -2)[None, tokens])[0]
        out = x.new_empty(*x.shape[:-1], part.shape[-1], dtype=part.dtype) if out is None else out
        out.flatten(0, -2)[tokens] = part
        del part  # before the next one is computed
    assert out is not None
    return out


def _tokens(x: torch.Tensor) -> Iterator[slice]:
    count = x.numel() // x.shape[-1]
    size = max(1, -(-count // TILES))
    return (slice(start, start + size) for start in range(0, count, size))


class _Keep(torch.autograd.Function):
    """x itself, saved here: recomputation of a layer ends when all that it saved is there again.

    A function's own inputs are saved after its forward has run, for nothing.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad


class _Tiled(torch.autograd.Function):
    """An MLP whose tiles are computed again in the backward, one by one (ALST's TiledMLP).

    The gradients of its weights are added up here, so that DDP and FSDP see them once.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, forward: Any, keep: Any, *weights: torch.Tensor
    ) -> torch.Tensor:
        kind = x.device.type
        ctx.forward, ctx.keep, ctx.weights = forward, keep, weights
        ctx.cast = functools.partial(
            torch.autocast, kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        )
        return _in_tiles(forward, x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (x,) = ctx.keep.saved_tensors
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        sums: list[torch.Tensor | None] = [None] * len(ctx.weights)
        for tokens in _tokens(x):
            tile = x.flatten(0, -2)[None, tokens].detach().requires_grad_()
            with torch.enable_grad(), ctx.cast():
                out = ctx.forward(tile)
            parts = torch.autograd.grad(
                out, (tile, *ctx.weights), grad.flatten(0, -2)[None, tokens], allow_unused=True
            )
            del out
            grad_x.flatten(0, -2)[tokens] = parts[0][0]
            for number, part in enumerate(parts[1:]):
                before = sums[number]
                sums[number] = part if before is None or part is None else before.add_(part)
            del parts, tile
        return grad_x, None, None, *sums
