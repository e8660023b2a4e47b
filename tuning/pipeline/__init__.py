"""The phases of a run, executed by a parent process without torch.

The journal records every phase under a hash of its inputs: the same command again resumes where it
stopped, and a changed spec repeats the phases that it changes. Signals only set a flag: the phase
stops at its next safe point and the run ends with exit code 75.
"""

from tuning.pipeline.check import check
from tuning.pipeline.finishing import Summary
from tuning.pipeline.follower import follow
from tuning.pipeline.options import Machines, Options, gather
from tuning.pipeline.preparing import base_folder
from tuning.pipeline.sizing import draft
from tuning.pipeline.story import Prepared, execute, prepare
from tuning.sources.hub import read_token

__all__ = [
    "Machines",
    "Options",
    "Prepared",
    "Summary",
    "base_folder",
    "check",
    "draft",
    "execute",
    "follow",
    "gather",
    "prepare",
    "read_token",
]
