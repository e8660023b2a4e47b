"""The pods and nodes of one run, together: on one machine or on several. Pure."""

from __future__ import annotations

from jobs.api.kinds import Object
from jobs.observed import objects


def first(pods: tuple[Object, ...]) -> tuple[Object, ...]:
    """The pods of index 0, which alone report progress and result."""
    return tuple(pod for pod in pods if objects.completion_index(pod) == 0)


def decisive(pods: tuple[Object, ...], nodes: int) -> Object | None:
    """The newest pod of the first index that does not train, else of index 0. None: it has no pod.

    A run on several machines stands still while one pod is missing.
    """
    last = {objects.completion_index(pod): pod for pod in objects.newest_each(pods)}
    for index in range(nodes):
        pod = last.get(index)
        if pod is None or not (objects.is_running(pod) or objects.exit_code(pod) == 0):
            return pod
    return last[0]


def lost(pods: tuple[Object, ...]) -> Object | None:
    """The newest pod of an index if its node does not respond."""
    return next((pod for pod in objects.newest_each(pods) if objects.node_loss(pod)), None)


def is_left_alone(pods: tuple[Object, ...]) -> bool:
    """Whether index 0 began again after another pod had ended well, which a Job never starts again:
    without what index 0 had stored, it would wait for that pod in vain."""
    leader = objects.newest(first(pods))
    if leader is None or objects.has_ended(leader):
        return False
    began = objects.parse_time(leader["metadata"]["creationTimestamp"])
    others = (pod for pod in pods if objects.completion_index(pod) and objects.exit_code(pod) == 0)
    return any(objects.ended_at(pod) < began for pod in others)


def waiting(pods: tuple[Object, ...], nodes: int) -> str:
    """How many pods run, while a run on several machines waits for all of them."""
    running = sum(objects.is_running(pod) for pod in objects.newest_each(pods))
    return f"{running} of {nodes} pods run; " if nodes > 1 else ""
