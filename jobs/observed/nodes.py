"""The provisioned nodes that a Workspace holds: since when, for what, and their cost. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from jobs.api.kinds import Object
from jobs.api.options import Options
from jobs.desired import names
from jobs.observed import objects
from jobs.observed.phases import Observed, Phase, row_of

_COUNT_SECONDS = 60  # between two updates of the cost: each is a write


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


def cost_of(observed: Observed, phase: Phase, options: Options) -> Object:
    """The status field `cost`: what provisioned nodes have cost since their launch, added up over
    all runs of the Workspace. Empty without a price.

    Counted once a minute, from the time that the stored field names, so that a replayed reconcile
    counts nothing twice and one that comes late counts all.
    """
    stored: Object = observed.recorded.get("cost") or {}
    prices, nodes = options.prices, nodes_of(observed, phase)
    if not prices.per_hour:
        return {}
    price = prices.of(nodes.instance_type) if nodes else None
    if nodes is None or price is None:
        return stored
    if stored.get("currency") != prices.currency:
        stored = {}
    since = objects.parse_time(stored["countedUntil"]) if stored else None
    waits = since and (nodes.now - since).total_seconds() < _COUNT_SECONDS
    if waits and row_of(phase).node != "released":
        return stored
    hours = nodes.seconds(since) / 3600
    total = stored.get("nodeHours", 0.0) + hours
    amount = stored.get("amount", 0.0) + hours * price
    return {
        "text": f"{amount:,.2f} {prices.currency} for {total:,.2f} node-hours",
        "amount": round(amount, 6),
        "currency": prices.currency,
        "nodeHours": round(total, 6),
        "countedUntil": objects.format_time(nodes.now),
    }
