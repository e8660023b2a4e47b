"""Base models, GPUs and cloud machines, read from the tables in `configs/`.

Imports neither torch nor pydantic, for planning and the cluster side. Tables are read on first use.
"""

from tuning.presets.architecture import Facts, Matrix
from tuning.presets.classes import Class
from tuning.presets.classes import of as class_of
from tuning.presets.config import facts
from tuning.presets.hardware import (
    Engine,
    Gpu,
    Instance,
    engine_build,
    engine_builds,
    engines,
    gpu,
    gpus,
    instance,
    instances,
    kernels,
    runs,
)
from tuning.presets.load import CONFIGS
from tuning.presets.models import Preset, all, find
from tuning.presets.support import Support, gpu_support, support

__all__ = [
    "CONFIGS",
    "Class",
    "Engine",
    "Facts",
    "Gpu",
    "Instance",
    "Matrix",
    "Preset",
    "Support",
    "all",
    "class_of",
    "engine_build",
    "engine_builds",
    "engines",
    "facts",
    "find",
    "gpu",
    "gpu_support",
    "gpus",
    "instance",
    "instances",
    "kernels",
    "runs",
    "support",
]
