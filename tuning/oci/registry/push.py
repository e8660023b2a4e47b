"""Push an image so that exactly the right digest ends up under the tag.

Read the tag and decide; HEAD each blob and upload the missing ones; PUT the manifest by digest; ask
for each blob again; PUT the tag and read it back. Each step is idempotent, so a crash between any
two is repaired by starting again, and a tag never names what is not there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tuning import files
from tuning.console import Report
from tuning.errors import RefusedError
from tuning.network.retry import Again
from tuning.oci.layout.manifest import (
    DOCKER_INDEX,
    DOCKER_MANIFEST,
    INDEX,
    LARGEST_JSON,
    MANIFEST,
    blobs_of,
    choose_manifest,
    is_index,
    parse_json,
    parse_manifest,
    read_documents,
    refused,
)
from tuning.oci.registry import upload
from tuning.oci.registry.answers import Reply
from tuning.oci.registry.wire import Remote
from tuning.spec.reference import Reference

ACCEPT = ", ".join((MANIFEST, DOCKER_MANIFEST, INDEX, DOCKER_INDEX))
OnTagExists = Literal["refuse", "overwrite"]


@dataclass(frozen=True)
class Found:
    """The image under a tag."""

    digest: str
    run_id: str | None  # of the run that made it, if any of ours did


@dataclass(frozen=True)
class Pushed:
    """A pushed image."""

    digest: str
    bytes_sent: int  # of blobs that were not there already


def manifest(remote: Remote, name: str) -> bytes | None:
    """The manifest `name` (a tag or a digest), or None where there is none.

    Raises RefusedError for bytes that do not have the digest `name`; a tag is not checked.
    """
    answer = remote.request(
        "GET", f"/manifests/{name}", expect=(200, 404), headers={"Accept": ACCEPT}, stream=True
    )
    with closing(answer):
        if answer.status == 404:
            return None
        data = remote.errors.body(answer, LARGEST_JSON)
    if len(data) > LARGEST_JSON:
        raise refused(str(remote.reference), "has a manifest of impossible size")
    kind, colon, digest = name.partition(":")
    if colon and hashlib.new(kind, data, usedforsecurity=True).hexdigest() != digest:
        raise damaged(remote, f"sent a manifest that is not {name}")
    return data


def damaged(remote: Remote, what: str) -> RefusedError:
    """The error of a registry with damaged storage."""
    change = "check the registry's storage, then push the image again"
    return remote.errors.refusal("REG-143", what, change)


def digest_of(data: bytes) -> str:
    """The digest of a manifest."""
    return f"sha256:{files.digest(data)}"


def tag_of(reference: Reference) -> str:
    """The digest or tag of the reference."""
    return reference.digest or reference.tag or "latest"


def look(remote: Remote) -> Found | None:
    """The image under the tag of the remote's reference, if any."""

    def work() -> Found | None:
        data = manifest(remote, tag_of(remote.reference))
        if data is None:
            return None
        digest = digest_of(data)
        try:
            record = parse_json(data, where=digest)
            if is_index(record):
                chosen = choose_manifest(record, where=digest)
                data = manifest(remote, chosen.digest) or b""
            return Found(digest, parse_manifest(data, where=digest).run_id)
        except RefusedError:  # an artifact of another kind, not ours
            return Found(digest, None)

    return remote.persist(work)


def claim(
    remote: Remote, *, run_id: str | None, own: Collection[str], on_tag_exists: OnTagExists
) -> Found | None:
    """Check that the tag may be written; returns the image if this very run pushed it already.

    `own`: digests that this run directory or Workspace pushed before, which may be replaced.
    `run_id` None: not known yet; then an image of any run passes for now. Raises RefusedError for
    any other image, unless it is to be overwritten.
    """
    return _decide(remote, look(remote), run_id=run_id, own=own, on_tag_exists=on_tag_exists)


def _decide(
    remote: Remote,
    held: Found | None,
    *,
    run_id: str | None,
    own: Collection[str],
    on_tag_exists: OnTagExists,
) -> Found | None:
    if held is None or held.digest in own:
        return None
    if held.run_id is not None and run_id in (None, held.run_id):
        return held if run_id else None
    if on_tag_exists == "overwrite":
        return None
    raise _taken(remote, held.digest, None)


def _taken(remote: Remote, theirs: str, ours: str | None) -> RefusedError:
    instead = f", this one is {ours}" if ours else ""
    what = f"the tag already holds {theirs}, which this run did not make{instead}"
    change = f"choose another tag{remote.replace and f', or {remote.replace}'}"
    return remote.errors.refusal("REG-140", what, change)


def check_push(remote: Remote) -> None:
    """Check push access by starting and cancelling an upload. Raises RefusedError."""
    url = remote.persist(lambda: upload.begin(remote))
    with suppress(Again, RefusedError):  # registries expire unfinished uploads
        remote.request("DELETE", url, expect=range(200, 500))


def push(
    remote: Remote,
    layout: Path,
    *,
    run_id: str,
    own: Collection[str] = (),
    on_tag_exists: OnTagExists = "refuse",
    progress: Report = lambda done, total, note: None,
) -> Pushed:
    """Put the image of `layout` under the tag of the remote's reference, verified.

    Idempotent; sends only what is missing. Raises RefusedError for a final refusal, TransientError
    for an unreachable registry.
    """
    documents = read_documents(layout)
    top, blobs = documents[-1], blobs_of(documents, where=f"oci:{layout}")
    digest = top.blob.digest
    terms: dict[str, Any] = {
        "run_id": run_id,
        "own": {*own, digest},
        "on_tag_exists": on_tag_exists,
    }
    claim(remote, **terms)

    def publish() -> int:
        sent = upload.blobs(remote, layout, blobs, progress=progress)
        for document in documents:
            put(remote, document.blob.digest, document.data, document.blob.media_type)
        for blob in blobs:
            if upload.has(remote, blob) is False:
                what = f"does not show the blob {blob.digest}, which it accepted"
                change = "run the same command again"
                raise remote.errors.again("REG-134", what, change, tries=3)
        return sent

    def point() -> None:
        held = look(remote)
        if held is None or held.digest != digest:
            _decide(remote, held, **terms)  # a concurrent push may have written it
            put(remote, tag_of(remote.reference), top.data, top.blob.media_type)

    bytes_sent = remote.persist(publish)
    remote.persist(point)
    remote.persist(lambda: verify(remote, digest))
    return Pushed(digest, bytes_sent)


_MAYBE_THERE = (400, 403, 404, 405, 409, 412, 422)  # answers for an immutable tag


def put(remote: Remote, name: str, data: bytes, media_type: str) -> None:
    """PUT a manifest under a tag or its digest; a refusal is ignored if it is there already."""
    answer = remote.request(
        "PUT",
        f"/manifests/{name}",
        expect=(200, 201, 202, *_MAYBE_THERE),
        body=lambda: data,
        headers={"Content-Type": media_type},
    )
    if answer.status not in _MAYBE_THERE or manifest(remote, name) == data:
        return
    reply = Reply.of(answer)
    if reply.code == "MANIFEST_BLOB_UNKNOWN":
        what = "does not know a blob that it accepted"
        raise remote.errors.again("REG-134", what, "run the same command again", tries=3)
    if reply.status in (403, 404, 405):
        raise remote.errors.status("PUT", reply)
    what = f"answered {reply.status} to the manifest {name}{reply.quoted}"
    raise remote.errors.refusal("REG-141", what, "choose another tag: this one may be immutable")


def verify(remote: Remote, ours: str) -> None:
    """Read back the tag. Raises RefusedError if it holds anything else."""
    data = manifest(remote, tag_of(remote.reference))
    if data is None:
        change = "run the same command again"
        raise remote.errors.again("REG-134", "does not show the tag", change, tries=5)
    if digest_of(data) != ours:
        held_now = look(remote)
        held = held_now.digest if held_now else digest_of(data)
        if held == digest_of(data):
            raise _taken(remote, held, ours)
        raise damaged(remote, f"shows the tag as {digest_of(data)}, not as {ours}")
