"""The story of a run, and the torch-free parent process that lives it.

Every phase is remembered in the journal under a key of what it depends on, so the same command
again goes on where it stopped, and a changed spec redoes what it changes. Signals only set a flag:
a phase that can stop stops at its next safe point and the run ends with exit code 75.
"""

from tuning.pipeline.check import check
from tuning.pipeline.finishing import Summary
from tuning.pipeline.options import Options, gather, read_token
from tuning.pipeline.preparing import base_folder
from tuning.pipeline.sizing import draft
from tuning.pipeline.story import Prepared, live, prepare

__all__ = [
    "Options",
    "Prepared",
    "Summary",
    "base_folder",
    "check",
    "draft",
    "gather",
    "live",
    "prepare",
    "read_token",
]
