"""What the memory that a placement leaves free is used for: fewer kernels, the same numbers.

Neither takes the place of rows or activations: it is given back first when memory runs out.
"""

from __future__ import annotations

from dataclasses import replace

from tuning.plan import memory
from tuning.plan.device import Device
from tuning.plan.sizing import Demand, Fit, Model, even


def with_constants(
    fit: Fit, model: Model, demand: Demand, device: Device, reasons: dict[str, str]
) -> tuple[Fit, bool]:
    """`fit` with the constants of 4-bit blocks in float32, if those fit too; and whether they do.

    Two kernels fewer each time that a weight is unpacked. Only where each rank has the whole model.
    """
    nested = demand.method == "qlora" and demand.double_quant
    if device.kind == "cpu" or not nested or fit.layout.shards > 1:
        return fit, False
    _, constants = memory.weight_bytes(
        model.coefficients, method=demand.method, precision=demand.precision, double_quant=False
    )
    wide = replace(fit, memory=replace(fit.memory, constants=constants))
    if not wide.fits(device.rank_bytes, device.host_bytes):
        return fit, False
    reasons["constants"] = "it fits; two kernels fewer for each weight that is unpacked"
    return wide, True


def with_unpacked(
    fit: Fit, model: Model, demand: Demand, device: Device, reasons: dict[str, str]
) -> Fit:
    """`fit` with 4-bit weights of a recomputed layer kept for its backward, if they fit.

    Of dense layers that are alike, on ranks that have the whole model, without tiles: those unpack
    for each tile.
    """
    kept, facts = fit.activations, model.facts
    again = demand.method == "qlora" and kept.checkpointing and not kept.tiled
    alike = facts is not None and not facts.experts and even(facts)
    if device.kind == "cpu" or not (again and alike) or fit.layout.shards > 1:
        return fit
    layer = memory.unpacked_bytes(model.coefficients, demand.precision)
    more = replace(fit.memory, dequantisation=fit.memory.dequantisation + layer)
    longer = replace(fit, memory=more, activations=replace(kept, unpacked=True))
    if not longer.fits(device.rank_bytes, device.host_bytes):
        return fit
    reasons["unpacked_layer"] = "it fits; each is unpacked twice a step, not three times"
    return longer
