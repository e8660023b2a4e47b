"""Calls to the Hugging Face hub, and its errors as ours.

huggingface_hub is imported late: it is slow, and `plan` does not need it.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tuning import files
from tuning.errors import RefusedError, SpecError, TransientError, TuningError
from tuning.network.policy import hush
from tuning.network.retry import Again, Patience, is_retryable, persist

log = logging.getLogger(__name__)

T = TypeVar("T")
# What the library raises for bad JSON, headers and URLs of the hub: it checks none of them.
_NOT_A_HUB = (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError)
PATIENCE = Patience(first=3.0, tries=4)


def endpoint() -> str:
    """The hub's URL: HF_ENDPOINT as it is now, not as it was when the library was imported."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def read_token(path: Path | None) -> str | None:
    """The hub token in the file at `path`. Raises SpecError if it cannot be read."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        what = f"cannot be read ({type(error).__name__})"
        raise SpecError.at(
            "HUB-104", str(path), what, "name a file with --hub-token-file"
        ) from None


def quietly() -> None:
    """Silence the library's progress bars and warnings, which show signed URLs."""
    from huggingface_hub import utils

    utils.disable_progress_bars()
    utils.logging.set_verbosity_error()
    hush()


def ask(
    work: Callable[[], T],
    hub_id: str,
    revision: str | None,
    *,
    patience: Patience | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> T:
    """What `work` returns; transient failures are tried again. Raises TuningError."""
    quietly()

    def attempt() -> T:
        try:
            return work()
        except TuningError:
            raise
        except Exception as error:
            meaning = explain(error, hub_id, revision)
            if meaning is None:
                raise
            offline = any(problem.code == "HUB-111" for problem in meaning.problems)
            if isinstance(meaning, TransientError) and not offline:
                raise Again(meaning.problems[0]) from None
            raise meaning from None

    return persist(attempt, patience or PATIENCE, unless=stop)


def explain(error: BaseException, hub_id: str, revision: str | None) -> TuningError | None:
    """The TuningError of an error of the hub's library; None if it is not about the hub.

    `hub_id` is that of a model, or datasets/ORG/NAME.
    """
    from huggingface_hub import errors

    page = f"{endpoint()}/{hub_id}"
    kind = "dataset" if hub_id.startswith("datasets/") else "model"
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return explain(error.__cause__, hub_id, revision)
    if isinstance(error, errors.GatedRepoError):
        what = "is gated, and this access token (or none) is not on its list"
        change = (
            f"accept its licence at {page}, then give a token of the same account: "
            "--hub-token-file FILE, in a cluster presetOptions.modelAccessSecret"
        )
        return RefusedError.at("HUB-101", hub_id, what, change)
    if isinstance(error, errors.RepositoryNotFoundError):
        what = f"there is no such {kind} at {endpoint()}, or it is private"
        change = f"check the name; a private {kind} needs --hub-token-file FILE (modelAccessSecret)"
        return RefusedError.at("HUB-102", hub_id, what, change)
    if isinstance(error, errors.RevisionNotFoundError):
        what = f"has no revision {revision or 'main'}"
        change = f"choose a branch, tag or commit of {page}/commits/main"
        return RefusedError.at("HUB-103", hub_id, what, change)
    if isinstance(error, errors.DisabledRepoError):
        return RefusedError.at("HUB-105", hub_id, "the hub disabled it", f"use another {kind}")
    if isinstance(error, errors.HfHubHTTPError):
        return _status(error, hub_id, page)
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        what = "is not in the cache, and HF_HUB_OFFLINE forbids downloading it"
        change = f"unset HF_HUB_OFFLINE, or fetch the {kind} first"
        return TransientError.at("HUB-111", hub_id, what, change)
    if isinstance(error, errors.FileMetadataError):
        what = f"{endpoint()} does not answer like a hub"
        return RefusedError.at("HUB-113", hub_id, what, "check HF_ENDPOINT, proxies and firewall")
    if isinstance(error, errors.HFValidationError):
        change = "write org/model as on the hub, a preset's name, or a folder"
        if kind == "dataset":
            change = "write hf://datasets/ORG/NAME as on the hub, or name a file"
        return SpecError.at("HUB-100", hub_id, f"is not a {kind} name", change)
    if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests", "urllib3"):
        what = f"cannot reach {endpoint()} ({type(error).__name__})"
        change = "check the network and HF_ENDPOINT, then run it again; it goes on"
        return TransientError.at("HUB-112", hub_id, what, change)
    if isinstance(error, OSError):
        full = files.disk_full(error)
        code, what = "HUB-114", f"cannot be stored: {error.strerror or error}"
        if "onsistency" in str(error):
            code, what = "HUB-115", "a file came incomplete"
        change = "run the same command again; it goes on"
        return full or TransientError.at(code, hub_id, what, change)
    if isinstance(error, _NOT_A_HUB):
        log.info("%s", "".join(traceback.format_exception(error)))
        what = f"{endpoint()} answers what is not a hub's protocol ({type(error).__name__})"
        change = "check HF_ENDPOINT, proxies and firewall, then run the same command again"
        return TransientError.at("HUB-116", hub_id, what, change)
    return None


def _status(error: Any, hub_id: str, page: str) -> TuningError:
    status = error.response.status_code
    if status == 401:
        what = "the hub does not accept the access token"
        change = "make a new one at https://huggingface.co/settings/tokens (read is enough)"
        return RefusedError.at("HUB-106", hub_id, what, change)
    if status == 403:
        what = "the access token may not read it"
        change = f"give the token read access to {page} (fine-grained tokens list repositories)"
        return RefusedError.at("HUB-107", hub_id, what, change)
    if is_retryable(status) or status > 500:
        change = "run the same command again later; it goes on"
        return TransientError.at("HUB-110", hub_id, f"the hub answers {status}", change)
    change = f"look at {page}"
    return RefusedError.at("HUB-108", hub_id, f"the hub answers {status}", change)
