"""The provisioned nodes that a Workspace holds: since when, and whether a run uses them. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from jobs.desired import names
from jobs.observed import objects
from jobs.observed.phases import Observed, Phase, row_of


@dataclass(frozen=True)
class Nodes:
    """Launched nodes of one Workspace that are not being given back, seen at `now`."""

    instance_type: str
    use: Literal["works", "waits", "kept"]  # kept: by the annotation keep-node
    launched: tuple[datetime, ...]
    now: datetime

    def seconds(self, since: datetime | None = None) -> float:
        """Node-seconds from `since`, or from their launch, until now."""
        starts = (max(each, since) if since else each for each in self.launched)
        return sum(max(0.0, (self.now - start).total_seconds()) for start in starts)


def nodes_of(observed: Observed, phase: Phase) -> Nodes | None:
    """The nodes that are paid for now; None if there are none."""
    launched = tuple(
        objects.changed_at(each, "Launched")
        for each in observed.node_claims
        if objects.is_true(each, "Launched") and not each["metadata"].get("deletionTimestamp")
    )
    if not launched:
        return None
    instance = (observed.workspace.get("resource") or {}).get("instanceType") or "unknown"
    use: Literal["works", "waits", "kept"] = "waits"
    if row_of(phase).node == "works":
        use = "works"
    elif phase.name == "finished" and names.annotation(observed.workspace, "keep-node") == "true":
        use = "kept"
    return Nodes(str(instance), use, launched, observed.now)
