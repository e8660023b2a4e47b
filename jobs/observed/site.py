"""Facts about the cluster, cached for a minute: its nodes' GPUs, and whether a claim is bound.

Both need rights on cluster-scoped objects, which a namespaced installation does not have: then the
nodes' GPU is unknown (the Job decides), and the options decide about claims.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jobs.api.client import ApiError, Cluster
from jobs.api.kinds import NODE, STORAGE_CLASS, Object
from jobs.api.options import Options
from tuning import presets
from tuning.errors import SpecError
from tuning.plan.device import Device

CACHE_SECONDS = 60.0
_DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"
_MIB = 1 << 20


class Site:
    """Facts about the cluster, each at most a minute old. Thread-safe."""

    def __init__(
        self, cluster: Cluster, options: Options, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cluster, self._options, self._clock = cluster, options, clock
        self._cache: dict[str, tuple[float, Any]] = {}  # key -> when it was read, value
        self._lock = threading.Lock()

    def device(self, labels: dict[str, str]) -> Device | None:
        """The GPU of the largest node with these labels; None if no node says."""
        selector = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
        device: Device | None = self._cached(
            f"nodes {selector}",
            lambda: device_of_nodes(self._cluster.find(NODE, labels=selector)),
            forbidden=None,
        )
        return device

    def storage(self, nodes: int = 1) -> bool:
        """Whether a claim for the run directory would be bound."""
        storage = self._options.storage.for_nodes(nodes)
        if storage.run_volume != "auto" or storage.storage_class:
            return storage.run_volume != "ephemeral"

        def has_default_class() -> bool:
            classes = self._cluster.find(STORAGE_CLASS)
            annotations = [each["metadata"].get("annotations") or {} for each in classes]
            return any(each.get(_DEFAULT_CLASS) == "true" for each in annotations)

        return bool(self._cached("storage", has_default_class, forbidden=False))

    def _cached(self, key: str, read: Callable[[], Any], *, forbidden: Any) -> Any:
        """The value of `read`, at most a minute old; `forbidden` without the rights to read it."""
        with self._lock:
            cached = self._cache.get(key)
        if cached and self._clock() - cached[0] < CACHE_SECONDS:
            return cached[1]
        try:
            value = read()
        except ApiError as error:
            if error.status not in (400, 403):  # 400: invalid labels, which no node has
                raise
            value = forbidden
        with self._lock:
            now = self._clock()
            if len(self._cache) > 1000:  # tenants choose the labels
                self._cache = {
                    k: kept for k, kept in self._cache.items() if now - kept[0] < CACHE_SECONDS
                }
            self._cache[key] = (now, value)
        return value


def device_of_nodes(nodes: list[Object]) -> Device | None:
    """The largest GPU that the nodes report by NVIDIA's labels.

    A pod may get any of the nodes: the device has all kinds of GPUs and the oldest driver, unless
    no build of torch runs on all of them.
    """
    devices = [device for node in nodes if (device := _device_of_node(node)) is not None]
    if not devices:
        return None
    largest = max(devices, key=lambda d: (d.memory_bytes, d.count))
    kinds = tuple(sorted({kind for device in devices for kind in device.capabilities}))
    drivers = [device for device in devices if device.cuda]
    oldest = min(drivers, key=lambda d: d.cuda or (0, 0), default=largest)
    together = replace(largest, kinds=kinds, cuda=oldest.cuda, driver=oldest.driver)
    return together if together.engine else largest


def _device_of_node(node: Object) -> Device | None:
    labels = node["metadata"].get("labels") or {}
    product, memory = labels.get("nvidia.com/gpu.product"), labels.get("nvidia.com/gpu.memory")
    if product is None:
        return None
    try:
        gpu = presets.gpu(product)
    except SpecError:
        gpu = None
    size = int(memory) * _MIB if memory and memory.isdigit() else gpu.memory_bytes if gpu else None
    capability = _capability(labels) or (gpu.capability if gpu else None)
    if size is None or capability is None:
        return None
    count = labels.get("nvidia.com/gpu.count", "1")
    return Device(
        kind="cuda",
        name=gpu.name if gpu else product,
        count=int(count) if count.isdigit() else 1,
        memory_bytes=size,
        bf16=capability >= (8, 0),
        capability=capability,
        origin=f"node {node['metadata']['name']}",
        gpu=gpu,
        cuda=_pair(labels, "cuda.runtime-version") or _pair(labels, "cuda.runtime"),
        driver=labels.get("nvidia.com/cuda.driver-version.full", ""),
    )


def _capability(labels: dict[str, str]) -> tuple[int, int] | None:
    return _pair(labels, "gpu.compute") or _pair(labels, "cuda.compute")


def _pair(labels: dict[str, str], name: str) -> tuple[int, int] | None:
    """The labels of a version's two parts; GPU feature discovery has renamed some of them."""
    pair = [labels.get(f"nvidia.com/{name}.{part}", "") for part in ("major", "minor")]
    return (int(pair[0]), int(pair[1])) if all(part.isdecimal() for part in pair) else None
