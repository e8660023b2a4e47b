"""MLflow, by the few requests of its REST interface that a run needs.

Its client would bring forty packages, retries of minutes and settings in global variables. The
server says which steps it has, so that nothing is sent twice whatever became of an answer.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tuning import files
from tuning.errors import printable, redact
from tuning.network.policy import NotAllowed
from tuning.network.session import Session, Unreachable
from tuning.trackers import place
from tuning.trackers.values import BEFORE, Ending, Failed, Identity, Key, Point

TAG = "tuning.run"  # of the run: Identity.identity
TIMEOUT = (5.0, 10.0)  # seconds to connect, and of silence
AT_ONCE = 1000  # metrics of a request; MLflow takes no more
LONGEST = 500  # characters of a parameter's value
STATUS: dict[Ending, str] = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


def opened(
    session: Session, address: str, secrets: Path | None, run: Identity, known: str | None
) -> Mlflow:
    """The run at the server, with the login that MLflow's variables hold."""
    token, user, password = (
        place.value(f"MLFLOW_TRACKING_{name}", secrets)
        for name in ("TOKEN", "USERNAME", "PASSWORD")
    )
    headers = {}
    if user:
        login = base64.b64encode(f"{user}:{password or ''}".encode()).decode()
        headers["Authorization"] = f"Basic {login}"
    elif token:
        headers["Authorization"] = f"Bearer {token}"
    project = run.project or place.value("MLFLOW_EXPERIMENT_NAME", secrets) or "tuning"
    return Mlflow(session, address, headers, replace(run, project=project), known)


class Mlflow:
    """One run of an experiment, found again or created."""

    def __init__(
        self,
        session: Session,
        address: str,
        headers: dict[str, str],
        run: Identity,
        known: str | None,
    ) -> None:
        """`known` is the id that MLflow gave the run at an earlier start."""
        self._session, self._headers = session, headers
        self._api = f"{address}/api/2.0/mlflow"
        self.sent: Key | int | None = BEFORE
        self.id: str | None
        experiment = self._experiment(run.project or "tuning")
        found = self._found(experiment, run.identity, known)
        if found is None:
            self.id = self._created(experiment, run)
        else:
            self.id, self.sent = found["info"]["run_id"], _last(found)
            self._ask("runs/update", {"run_id": self.id, "status": "RUNNING"})
        self.link: str | None = f"{address}/#/experiments/{experiment}/runs/{self.id}"

    def send(self, points: Sequence[Point]) -> None:
        """Add the points in as few requests as MLflow allows."""
        now = int(time.time() * 1000)
        metrics = [
            {"key": name, "value": value, "timestamp": now, "step": point.step}
            for point in points
            for name, value in point.values.items()
        ]
        for start in range(0, len(metrics), AT_ONCE):
            batch = {"run_id": self.id, "metrics": metrics[start : start + AT_ONCE]}
            self._ask("runs/log-batch", batch)

    def close(self, ending: Ending, facts: dict[str, Any]) -> None:
        """Set the run's tags and how it ended."""
        if facts:
            self._ask("runs/log-batch", {"run_id": self.id, "tags": _pairs(facts)})
        now = int(time.time() * 1000)
        end = {"run_id": self.id, "status": STATUS[ending], "end_time": now}
        self._ask("runs/update", end)

    def _experiment(self, name: str) -> str:
        """The id of the experiment called `name`, which is created if there is none."""
        by_name = f"experiments/get-by-name?experiment_name={quote(name, safe='')}"
        found = self._ask(by_name, absent=True)
        if found is None:
            found = self._ask("experiments/create", {"name": name}, absent=True)
            if found is not None:
                return str(_at(found, "experiment_id"))
            found = self._ask(by_name)  # another run was faster
        if _at(found, "experiment", "lifecycle_stage") == "deleted":
            raise Failed(f'the experiment "{name}" is deleted: restore it, or name another project')
        return str(_at(found, "experiment", "experiment_id"))

    def _found(self, experiment: str, identity: str, known: str | None) -> Any:
        """The run as MLflow has it, by its id or its tag; None if it has none, or deleted it."""
        if known:
            got = self._ask(f"runs/get?run_id={quote(known, safe='')}", absent=True)
            if got is not None and _at(got, "run", "info", "lifecycle_stage") != "deleted":
                return _at(got, "run")
        wanted = {
            "experiment_ids": [experiment],
            "filter": f"tags.`{TAG}` = '{identity}'",
            "run_view_type": "ACTIVE_ONLY",
            "max_results": 1,
        }
        runs = (self._ask("runs/search", wanted) or {}).get("runs") or []
        return runs[0] if runs else None

    def _created(self, experiment: str, run: Identity) -> str:
        made = self._ask(
            "runs/create",
            {
                "experiment_id": experiment,
                "run_name": run.name,
                "start_time": int(time.time() * 1000),
                "tags": [{"key": TAG, "value": run.identity}],
            },
        )
        number = str(_at(made, "run", "info", "run_id"))
        self._ask("runs/log-batch", {"run_id": number, "params": _pairs(run.facts)[:100]})
        return number

    def _ask(self, path: str, body: Any = None, *, absent: bool = False) -> Any:
        """The answer to a request; with `absent` None for what does not exist, or does already."""
        method = "GET" if body is None else "POST"
        try:
            answer = self._session.request(
                method,
                f"{self._api}/{path}",
                json=body,
                headers=self._headers,
                timeout=TIMEOUT,
            )
        except Unreachable as error:
            why = ": ".join(filter(None, (error.kind, error.reason)))
            raise Failed(f"cannot be reached ({why})") from None
        except NotAllowed as error:
            change = "allow the host with --allow-host, or in the policy's allowHosts"
            raise Failed(f"{error}, a private address: {change}") from None
        try:
            document = files.parse_json(answer.data)
        except (ValueError, RecursionError):
            document = None
        if answer.status == 200 and isinstance(document, dict):
            return document
        told = document if isinstance(document, dict) else {}
        code, message = str(told.get("error_code", "")), str(told.get("message", ""))
        if absent and code in ("RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"):
            return None
        said = redact(printable(" ".join(filter(None, (code, message[:200])))))
        name = path.partition("?")[0]
        raise Failed(f"answered {name} with status {answer.status}" + (f": {said}" if said else ""))


def _last(run: Any) -> Key:
    """The last step, and evaluation, that a run holds."""
    steps = {each.get("key"): each.get("step") for each in _at(run, "data").get("metrics") or []}
    known = ((steps.get("loss"), 0), (steps.get("eval_loss"), 1))
    return max(((int(step), nth) for step, nth in known if step is not None), default=BEFORE)


def _at(document: Any, *path: str) -> Any:
    """The value at `path` in an answer. Raises Failed: the answer is not MLflow's."""
    for name in path:
        document = document.get(name) if isinstance(document, dict) else None
    if document is None:
        raise Failed(f"its answer has no {'.'.join(path)}: is this an MLflow server?")
    return document


def _pairs(facts: dict[str, Any]) -> list[dict[str, str]]:
    return [{"key": key, "value": f"{value}"[:LONGEST]} for key, value in facts.items()]
