"""How much memory a model class needs to train, found by running it on no memory.

The real model class is built on torch's meta device with adapters on it, its weights are swapped
for fake tensors, and real forward and backward passes run over them while a dispatch mode counts
the bytes of live storages. `standins` allocate what kernels that cannot run here would. Two layers
and three foretell the rest.

    coefficients(config, variants=...)    what `tuning.plan.memory.predict` needs, for any model
    Stage(config, variant=..., rank=...)  one model at its full depth; `.run(Point(...)).peak`

`python -m tuning.training.simulate --write` makes `configs/memory/`, one file for each preset.
"""

from tuning.training.simulate.fit import coefficients, moments
from tuning.training.simulate.step import Point, Stage, Trace

__all__ = ["Point", "Stage", "Trace", "coefficients", "moments"]
