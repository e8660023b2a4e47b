"""Counts the bytes of live tensors while code runs, by what they are for."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COLUMNS = ("activations", "loss", "tile", "dequantisation", "gradients")
HOST = "host"  # memory of the machine, not of the device
BLOCK = 512  # bytes; the CUDA allocator rounds every tensor up to a multiple of this
_kind: ContextVar[str] = ContextVar("kind", default="activations")


@contextlib.contextmanager
def kind(name: str) -> Iterator[None]:
    """Whatever is allocated inside counts as `name`: one of COLUMNS, or HOST."""
    token = _kind.set(name)
    try:
        yield
    finally:
        _kind.reset(token)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every storage from the operator that made it until it is freed.

    `history` has one row an operator: the live bytes after it, by COLUMNS, first of tensors without
    a dimension of `rank` and then of those with one, which are proportional to it. Storages that
    are there before (`ignored`) count nothing, and those in host memory only in `host`. Garbage
    collection is off inside, since a cycle collected at one run and not at the next would make two
    histories differ.
    """

    def __init__(self, ignored: Iterable[torch.Tensor], *, rank: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.history: list[tuple[int, ...]] = []
        self.operators: list[str] = []  # the name of each
        self.host: list[int] = []  # bytes of each storage of kind HOST
        self._rank = rank
        self._now = [0] * (2 * len(COLUMNS))
        self._ignored = {id(s): s for s in (t.untyped_storage() for t in ignored)}
        self._alive: dict[int, tuple[Any, int, int]] = {}

    def __enter__(self) -> Self:
        gc.disable()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)  # type: ignore[no-untyped-call]
        gc.enable()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        self.history.append(tuple(self._now))
        self.operators.append(str(func))
        return out

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._alive or key in self._ignored:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        if _kind.get() == HOST:
            self.host.append(storage.nbytes())
            self._ignored[key] = storage
            return
        index = COLUMNS.index(_kind.get()) + len(COLUMNS) * (self._rank in tensor.shape)

        def freed(_: Any) -> None:
            _, index, size = self._alive.pop(key)
            self._now[index] -= size

        self._alive[key] = weakref.ref(storage, freed), index, size
        self._now[index] += size

    def relabel(self, tensor: torch.Tensor, name: str) -> None:
        """From now on `tensor`, already counted, is of the kind `name`."""
        key = id(tensor.untyped_storage())
        if key in self._alive:
            reference, old, size = self._alive[key]
            new = COLUMNS.index(name) + len(COLUMNS) * (old >= len(COLUMNS))
            self._alive[key] = reference, new, size
            self._now[old] -= size
            self._now[new] += size
