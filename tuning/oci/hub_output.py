"""An adapter as a model of the Hugging Face hub: looked at, claimed, committed, read back.

What is committed are the files of the image, in one commit on top of the one that was looked at, so
that two runs never mix; what a run measures afterwards is one more commit, of the model card. Who
owns a repository is told as a tag's owner is: by the run id in its `tuning.json`.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tuning import files
from tuning.adapter import WEIGHTS
from tuning.errors import RefusedError, TransientError
from tuning.network.retry import Patience
from tuning.sources import hub

RECORD = "tuning.json"
_OWN = {".gitattributes", "README.md"}  # what a new repository may hold already
_MOST = 1 << 20  # bytes of a record


@dataclass(frozen=True)
class Repository:
    """A model's repository and branch, with a token that may write there."""

    name: str  # ORG/NAME
    branch: str = "main"
    token: str | None = None  # None: the user's saved login

    def __str__(self) -> str:
        return f"hf://{self.name}" + (f"@{self.branch}" if self.branch != "main" else "")

    @property
    def api(self) -> Any:
        """The hub's client."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=hub.endpoint(), token=self.token)

    def ask(self, work: Callable[[], Any], patience: Patience | None = None) -> Any:
        """What `work` returns. Raises TuningError, in the words of somebody who writes."""
        from huggingface_hub.errors import HfHubHTTPError

        def attempt() -> Any:
            try:
                return work()
            except HfHubHTTPError as error:
                status = error.response.status_code
                if status in (401, 403):
                    what = f"cannot be written with this access token: the hub answers {status}"
                    raise RefusedError.at("HUB-130", str(self), what, _LOGIN) from None
                if status in (409, 412):
                    what = "was changed by somebody else meanwhile"
                    change = "run the same command again; it looks at what is there now"
                    raise TransientError.at("HUB-134", str(self), what, change) from None
                raise

        return hub.ask(attempt, self.name, self.branch, patience=patience)


@dataclass(frozen=True)
class Held:
    """What a branch holds: its commit, its files' hashes, and the run that made them, if known."""

    commit: str | None
    digests: Mapping[str, str]
    run_id: str | None = None


def check(repository: Repository, patience: Patience | None = None) -> None:
    """Refuse a token that cannot write; leaves nothing behind. Raises RefusedError."""
    from huggingface_hub import get_token

    if not (repository.token or get_token()):
        what = "needs an access token, and there is none"
        raise RefusedError.at("HUB-130", str(repository), what, _LOGIN)
    found = repository.ask(lambda: repository.api.whoami(), patience)
    role = ((found.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        what = f"cannot be written: the access token of {found.get('name')} may only read"
        raise RefusedError.at("HUB-130", str(repository), what, _LOGIN)


_LOGIN = "give one with the right to write: --hub-token-file FILE, or `hf auth login`"


def held(repository: Repository, patience: Patience | None = None) -> Held:
    """What the branch holds; nothing if there is no such repository or branch."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api = repository.api

    def look() -> Held:
        try:
            info = api.model_info(repository.name, revision=repository.branch, files_metadata=True)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return Held(None, {})
        digests = {}
        for each in info.siblings or []:
            lfs = each.lfs
            digests[each.rfilename] = f"sha256:{lfs.sha256}" if lfs else f"git:{each.blob_id}"
        record = next((e for e in info.siblings or [] if e.rfilename == RECORD), None)
        run_id = None
        if record is not None and (record.size or 0) <= _MOST:
            run_id = _run_id(repository, info.sha)
        return Held(info.sha, digests, run_id)

    found: Held = repository.ask(look, patience)
    return found


def _run_id(repository: Repository, commit: str) -> str | None:
    """The run id in the record of a commit."""
    from huggingface_hub import hf_hub_download

    with tempfile.TemporaryDirectory() as folder:
        path = hf_hub_download(
            repository.name,
            RECORD,
            revision=commit,
            token=repository.token,
            endpoint=hub.endpoint(),
            local_dir=folder,
        )
        try:
            run_id = files.read_json(Path(path)).get("run_id")
        except (ValueError, AttributeError):
            return None
    return run_id if isinstance(run_id, str) else None


def claim(
    repository: Repository,
    *,
    run_id: str | None,
    own: Collection[str],
    on_exists: Literal["refuse", "overwrite"],
    patience: Patience | None = None,
) -> Held:
    """What the branch holds, if this run may write there. Raises RefusedError.

    `own`: digests of weights that this run directory made, which may be replaced. `run_id` None:
    not known yet, so the work of any run passes for now.
    """
    found = held(repository, patience)
    mine = found.run_id is not None and run_id in (None, found.run_id)
    mine |= found.digests.get(WEIGHTS, "").removeprefix("sha256:") in own
    if not mine and set(found.digests) - _OWN and on_exists == "refuse":
        made_by = f"the run {found.run_id}" if found.run_id else "something else"
        what = f"holds {made_by} at commit {str(found.commit)[:12]}"
        change = "name another repository or branch, or set on-tag-exists: overwrite"
        raise RefusedError.at("HUB-131", str(repository), what, change)
    return found


def push(
    repository: Repository,
    folder: Path,
    *,
    run_id: str,
    own: Collection[str],
    on_exists: Literal["refuse", "overwrite"],
) -> str:
    """Commit the files in `folder`, and read the listing back; returns hf://ORG/NAME@COMMIT.

    A new repository is private. What is there already is not committed again. Raises RefusedError
    or TransientError.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    before = claim(repository, run_id=run_id, own=own, on_exists=on_exists)
    wanted = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    changed = {n: p for n, p in wanted.items() if not _same(p, before.digests.get(n))}
    gone = sorted(set(before.digests) - set(wanted) - {".gitattributes"})
    api = repository.api
    commit = before.commit
    if changed or gone:
        if before.commit is None:
            repository.ask(lambda: api.create_repo(repository.name, private=True, exist_ok=True))
            if repository.branch != "main":
                repository.ask(
                    lambda: api.create_branch(
                        repository.name, branch=repository.branch, exist_ok=True
                    )
                )
            before = claim(repository, run_id=run_id, own=own, on_exists=on_exists)
        operations = [CommitOperationAdd(name, str(path)) for name, path in changed.items()]
        operations += [CommitOperationDelete(name) for name in gone]
        made = repository.ask(
            lambda: api.create_commit(
                repository.name,
                operations,
                commit_message=f"Adapter of run {run_id}",
                revision=repository.branch,
                parent_commit=before.commit,
            )
        )
        commit = made.oid
    _read_back(repository, wanted)
    return f"hf://{repository.name}@{commit}"


def add_results(
    repository: Repository, card: str, tasks: Sequence[Mapping[str, Any]], *, run_id: str
) -> None:
    """Commit the model card `card` with what was measured afterwards, as `model-index`.

    `tasks` as `evaluation.json` has them. Raises RefusedError or TransientError; what another run
    has put there meanwhile is left alone.
    """
    from huggingface_hub import CommitOperationAdd, EvalResult, ModelCard

    made = ModelCard(card)
    made.data.model_name = repository.name
    made.data.eval_results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=task["task"],
            dataset_name=task["task"],
            metric_type=task["metric"],
            metric_value=score["value"],
            metric_name=f"{task['metric']} ({model})",
        )
        for task in tasks
        for model, score in task["models"].items()
    ]
    before = claim(repository, run_id=run_id, own=(), on_exists="refuse")
    repository.ask(
        lambda: repository.api.create_commit(
            repository.name,
            [CommitOperationAdd("README.md", str(made).encode())],
            commit_message=f"Evaluation of run {run_id}",
            revision=repository.branch,
            parent_commit=before.commit,
        )
    )


def _read_back(repository: Repository, wanted: Mapping[str, Path]) -> None:
    """Raise TransientError unless the branch lists every file as it is here."""
    listed = held(repository).digests
    if wrong := sorted(name for name, path in wanted.items() if not _same(path, listed.get(name))):
        what = f"lists other contents than were sent: {', '.join(wrong[:6])}"
        change = "run the same command again; it sends what differs"
        raise TransientError.at("HUB-132", str(repository), what, change)


def _same(path: Path, digest: str | None) -> bool:
    """Whether a file is as the hub lists it: by sha256 if it is large, else by git's own id."""
    kind, _, value = (digest or "").partition(":")
    if kind == "sha256":
        return files.digest_file(path) == value
    if kind != "git":
        return False
    data = path.read_bytes()
    made = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
    return made.hexdigest() == value
