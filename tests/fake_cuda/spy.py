"""What a GPU would be asked to do: every operator of a step, and each wait and each crossing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that launch nothing: they make another view of the same memory, or only take memory.
FREE = frozenset(
    {"_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like"}
    | {"empty_strided", "expand", "lift_fresh", "new_empty", "permute", "select", "slice"}
    | {"split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze"}
    | {"view", "new_empty_strided", "is_pinned"}
)
# The answer is a number or a shape, so the host waits for the device.
WAITING = frozenset(
    {"_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "unique"}
)


class Spy(TorchDispatchMode):
    """Counts kernels and waits on cuda, by phase."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: dict[str, Counter[str]] = {}
        self.waits: dict[str, Counter[str]] = {}
        self.ahead: dict[str, Counter[str]] = {}  # copies to the device that nothing waits for
        self.strays: dict[str, Counter[str]] = {}  # operators that made a tensor on the CPU
        self.phase, self.backward = "loop", False

    def enter(self, phase: str, *, backward: bool = False) -> None:
        """Count for `phase` from now on."""
        self.phase, self.backward = phase, backward

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.device.type for t in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::").removeprefix("torch_attn::")
        after = {t.device.type for t in _tensors(out)}
        if "cuda" in before | after and name not in FREE:
            self._note(self.kernels, name)
        if "cuda" in before and name in WAITING:
            self._note(self.waits, name)
        if name in ("_to_copy", "copy_") and "cpu" in before | after and "cuda" in before | after:
            ahead = (kwargs or {}).get("non_blocking") or (name == "copy_" and True in args[2:])
            way = "host to device" if "cuda" in after else "device to host"
            # what the host need not wait for, since the source is pinned
            self._note(self.ahead if ahead and "cuda" in after else self.waits, way)
        if any(t.device.type == "cpu" and t.dim() for t in _tensors(out)):
            self._note(self.strays, name)
        return out

    def _note(self, table: dict[str, Counter[str]], name: str) -> None:
        table.setdefault(self.phase, Counter())[name] += 1


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors in an operator's arguments or results; faster than torch's own walk."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for part in tree:
            yield from _tensors(part)
    elif isinstance(tree, dict):
        yield from _tensors(tuple(tree.values()))
