"""Starts this machine's ranks of one training by torch's elastic agent, as `torchrun` does.

    python -m tuning.process training.launch REQUEST ROOM OPTIONS

The agent lets all machines meet (c10d rendezvous), gives each rank its place and ends all when one
fails. It does not start them again: the parent decides with what placement. How each rank ended is
written beside the request, since the agent's own exit status does not tell.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tuning import files
from tuning.process import Group, statuses_path

logger = logging.getLogger(__name__)


def main() -> int:
    """Run the ranks of `sys.argv`; returns the exit status."""
    request, room, options = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    group = Group(**options)
    signal.signal(signal.SIGUSR1, _pass_on)
    statuses: dict[str, int] = {}
    try:
        command = ["-m", "tuning.process", room, str(request)]
        elastic_launch(_config(group, request.parent), sys.executable)(*command)
    except ChildFailedError as error:
        statuses = {str(rank): failed.exitcode for rank, failed in error.failures.items()}
    except SignalException:
        logger.info("stopped")
    except (RendezvousError, OSError) as error:  # a name that does not resolve yet, too
        logger.warning("the machines did not meet: %s", error)
        files.write_json(statuses_path(request), {"apart": str(error)})
        return 1
    files.write_json(statuses_path(request), {"ranks": statuses})
    return 1 if statuses else 0


def _config(group: Group, logs: Path) -> LaunchConfig:
    several = group.nodes > 1
    rendezvous: dict[str, Any] = {"join_timeout": round(group.patience)}
    if several:
        rendezvous["is_host"] = group.node == 0
    return LaunchConfig(
        min_nodes=group.nodes,
        max_nodes=group.nodes,
        nproc_per_node=group.ranks,
        run_id=group.name,
        rdzv_backend="c10d",
        rdzv_endpoint=group.meet or "localhost:0",
        rdzv_configs=rendezvous,
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs / "elastic")),
        local_addr=_own_address(group) if several else "localhost",
        shutdown_timeout=max(1, round(group.grace)),
    )


def _own_address(group: Group) -> str:
    """How other machines reach this one: machine 0 as they do, others by the way to it.

    torch would name the host, which need not resolve elsewhere.
    """
    host, _, port = group.meet.rpartition(":")
    if group.node == 0:
        return host
    for kind, kin, _, _, address in socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM):
        with socket.socket(kind, kin) as way, contextlib.suppress(OSError):
            way.connect(address)  # sends nothing
            return str(way.getsockname()[0])
    return host


def _pass_on(number: int, _: Any) -> None:
    """Hand the signal to the ranks, which dump their stacks."""
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), number)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    sys.exit(main())
