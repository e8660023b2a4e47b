"""Where a run's trackers are, with which login, and what is refused before the run."""

from __future__ import annotations

import importlib.util
import netrc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tuning.errors import Problem, SpecError
from tuning.network import policy as network_policy
from tuning.network.policy import Policy
from tuning.spec import Spec
from tuning.spec.coercion import Invalid, server_address

KEY = "TrainingArguments.report_to"
PACKAGES = ("wandb", "trackio")  # the other trackers need none
OFFLINE = ("offline", "dryrun", "disabled")
ADDRESS = {"mlflow": "MLFLOW_TRACKING_URI", "wandb": "WANDB_BASE_URL"}
LOGINS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "WANDB_API_KEY")
CONFIG = {"mlflow": "mlflow_tracking_uri", "wandb": "wandb_base_url"}


@dataclass(frozen=True)
class Place:
    """The address of a tracker; `trusted` if the environment names it, not a document or Secret."""

    address: str | None
    trusted: bool = False


def value(name: str, secrets: Path | None) -> str | None:
    """The value of a tracker's variable: of the mounted Secret, else of the environment."""
    path = secrets / name if secrets else None
    if path is None or not path.is_file():
        return os.environ.get(name) or None
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError) as error:
        what = f"cannot be read ({type(error).__name__})"
        change = "mount the Secret that tracker-secret names, or name its folder with --secrets"
        raise SpecError.at("TRACK-105", str(path), what, change) from None


def place(spec: Spec, name: str, secrets: Path | None) -> Place:
    """Where the tracker `name` is. Raises SpecError for what is no address."""
    set_ = {"mlflow": spec.settings.mlflow_uri, "wandb": spec.settings.wandb_url}.get(name)
    if set_ is not None or name not in ADDRESS:
        return Place(set_)
    found = value(ADDRESS[name], secrets)
    if found is None:
        return Place(None)
    try:
        address = server_address(found)
    except Invalid as error:
        raise SpecError.at("TRACK-102", ADDRESS[name], error.what, error.change) from None
    mounted = secrets is not None and (secrets / ADDRESS[name]).is_file()
    return Place(address, trusted=not mounted)


def refuse(spec: Spec, policy: Policy | None, secrets: Path | None, *, here: bool = True) -> None:
    """Raise SpecError with all that keeps the trackers of `spec` from being fed.

    Without `here` the run may be elsewhere, with the Secret that the Workspace names; without a
    policy, too, no address is judged.
    """
    problems = [
        problem
        for name in spec.settings.report_to or ()
        for problem in _problems(spec, name, policy, secrets, here or not spec.tracker_secret)
    ]
    if problems:
        raise SpecError(problems)


def _problems(
    spec: Spec, name: str, policy: Policy | None, secrets: Path | None, complete: bool
) -> Iterator[Problem]:
    if name in PACKAGES and importlib.util.find_spec(name) is None:
        what = f"names {name}, whose package is not installed"
        yield Problem("TRACK-101", KEY, what, f"pip install 'tuning-jobs[{name}]', or remove it")
    try:
        where = place(spec, name, secrets)
    except SpecError as error:
        yield from error.problems
        return
    if name == "mlflow" and where.address is None and complete:
        what = "names mlflow, and nothing says where its server is"
        change = "set TrainingArguments.mlflow_tracking_uri or MLFLOW_TRACKING_URI"
        yield Problem("TRACK-102", KEY, what, change)
    if (
        where.address
        and not where.trusted
        and policy
        and (fact := _fact(where.address, policy, secrets))
    ):
        host = urlsplit(where.address).netloc
        what = f"is {where.address}, which {fact}"
        change = f"give --allow-host {host}, or list it in the policy's allowHosts"
        yield Problem("TRACK-103", f"TrainingArguments.{CONFIG[name]}", what, change)
    if name == "wandb" and complete and not _has_key(where.address, secrets):
        what = "names wandb, and nothing holds an API key"
        change = "set WANDB_API_KEY, or WANDB_MODE=offline, or remove it"
        yield Problem("TRACK-104", KEY, what, change)


def _fact(address: str, policy: Policy, secrets: Path | None) -> str | None:
    """What keeps a run from connecting to `address`, or None. Names are resolved later."""
    if policy.refusal(address):
        return "is not a public address"
    _, host, port = network_policy.place(address)
    if not address.startswith("http:") or policy.allows_name(host, port):
        return None
    if any(value(name, secrets) for name in LOGINS):
        return "is plain http, and the login would cross the network in clear text"
    return None if policy.plain_http else "is plain http"


def _has_key(address: str | None, secrets: Path | None) -> bool:
    """Whether W&B finds a login: a key, the file that `wandb login` writes, or none is needed."""
    if os.environ.get("WANDB_MODE", "").lower() in OFFLINE or value("WANDB_API_KEY", secrets):
        return True
    host = urlsplit(address or "https://api.wandb.ai").hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def environment(name: str) -> dict[str, str]:
    """The variables of this process that the tracker's child gets."""
    own = (f"{name.upper()}_", *(("HF_TOKEN",) if name == "trackio" else ()))
    return {key: text for key, text in os.environ.items() if key.startswith(own)}
