"""Exactly one right digest under the tag, whatever happened before or happens in between.

Look at the tag, decide; HEAD each blob and upload what is missing; PUT the manifest by digest, then
the tag; read everything back. A crash between any two steps is repaired by doing it again from the
first, because each step is idempotent and blobs are named by their content.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import urllib3.exceptions

from tuning import files
from tuning.errors import RefusedError
from tuning.oci import layout as image
from tuning.oci.layout import Blob
from tuning.oci.registry import answers, upload
from tuning.oci.registry.answers import Again
from tuning.oci.registry.wire import Remote
from tuning.spec.reference import Reference

ACCEPT = ", ".join((image.MANIFEST, image.DOCKER_MANIFEST, image.INDEX, image.DOCKER_INDEX))
Progress = Callable[[float, float | None, str], None]
OnTagExists = Literal["refuse", "overwrite"]


@dataclass(frozen=True)
class Found:
    """What a tag points at."""

    digest: str
    run_id: str | None  # of the run that made it, if it is one of ours


@dataclass(frozen=True)
class Pushed:
    """What a push did."""

    digest: str
    bytes_sent: int  # of blobs
    reused: int  # blobs that were there already


def is_named(name: str, data: bytes) -> bool:
    """Whether the bytes of a manifest are those of its digest; a tag says nothing of them."""
    kind, colon, digest = name.partition(":")
    if not colon:
        return True
    return hashlib.new(kind, data, usedforsecurity=True).hexdigest() == digest


def manifest(remote: Remote, name: str) -> bytes | None:
    """The manifest `name` (tag or digest), not yet checked; None where there is none."""
    answer = remote.request(
        "GET", f"/manifests/{name}", expect=(200, 404), headers={"Accept": ACCEPT}, stream=True
    )
    with answer:
        if answer.status_code == 404:
            return None
        try:
            data: bytes = answer.raw.read(image.LARGEST_JSON + 1)
        except urllib3.exceptions.HTTPError as error:
            raise remote.judge.unreachable(error) from None
    if len(data) > image.LARGEST_JSON:
        raise image.refused(str(remote.reference), "has a manifest of impossible size")
    return data


def digest_of(data: bytes) -> str:
    """The digest of a manifest."""
    return f"sha256:{files.digest(data)}"


def tag_of(reference: Reference) -> str:
    """What the reference names in its repository."""
    return reference.digest or reference.tag or "latest"


def look(remote: Remote) -> Found | None:
    """What the tag of the remote's reference points at now."""

    def work() -> Found | None:
        data = manifest(remote, tag_of(remote.reference))
        if data is None:
            return None
        digest = digest_of(data)
        try:
            record = image.parse_json(data, where=digest)
            if image.is_index(record):
                chosen = image.choose(record, where=digest)
                data = manifest(remote, chosen.digest) or b""
            return Found(digest, image.parse_manifest(data, where=digest).run_id)
        except RefusedError:  # an artifact of another kind: somebody else's
            return Found(digest, None)

    return remote.persist(work)


def claim(
    remote: Remote, *, run_id: str | None, own: Collection[str], on_tag_exists: OnTagExists
) -> Found | None:
    """Whether the tag may be written: what this very run left there, or None for a free way.

    `own` holds digests that this run directory or Workspace put out before: they are replaced.
    `run_id` None means not known yet; then an image of any run passes for now. Raises RefusedError
    for an image of somebody else, unless it is to be overwritten.
    """
    return _judge(remote, look(remote), run_id=run_id, own=own, on_tag_exists=on_tag_exists)


def _judge(
    remote: Remote,
    found: Found | None,
    *,
    run_id: str | None,
    own: Collection[str],
    on_tag_exists: OnTagExists,
) -> Found | None:
    if found is None or found.digest in own:
        return None
    if found.run_id is not None and run_id in (None, found.run_id):
        return found if run_id else None
    if on_tag_exists == "overwrite":
        return None
    raise _taken(remote, found.digest, None)


def _taken(remote: Remote, theirs: str, ours: str | None) -> RefusedError:
    instead = f", this one is {ours}" if ours else ""
    return remote.refusal(
        "REG-140",
        f"the tag already holds {theirs}, which this run did not make{instead}",
        "choose another tag, or set the annotation tuning.kaito.sh/on-tag-exists: overwrite",
    )


def check_push(remote: Remote) -> None:
    """Whether the login may push: an upload is begun and given up. Raises RefusedError."""
    url = remote.persist(lambda: upload.begin(remote))
    with contextlib.suppress(Again, RefusedError):  # registries forget uploads that nobody ends
        remote.request("DELETE", url, expect=range(200, 500))


def push(
    remote: Remote,
    layout: Path,
    *,
    run_id: str,
    own: Collection[str] = (),
    on_tag_exists: OnTagExists = "refuse",
    progress: Progress = lambda done, total, note: None,
) -> Pushed:
    """Put the image of `layout` under the tag of the remote's reference, verified.

    Done again after any crash it ends the same way, and sends nothing that is there already. Raises
    RefusedError for a final no, TransientError when the registry stays away.
    """
    found = image.documents(layout)
    top, blobs = found[-1], image.blobs_of(found, where=f"oci:{layout}")
    digest = top.blob.digest
    terms: dict[str, Any] = {
        "run_id": run_id,
        "own": {*own, digest},
        "on_tag_exists": on_tag_exists,
    }
    claim(remote, **terms)

    def publish() -> tuple[int, int]:
        counts = upload.blobs(remote, layout, blobs, progress=progress)
        for document in found:
            put(remote, document.blob.digest, document.data, document.blob.media_type)
        return counts

    def point() -> None:
        held = look(remote)
        if held is None or held.digest != digest:
            _judge(remote, held, **terms)  # somebody may have come in between
            put(remote, tag_of(remote.reference), top.data, top.blob.media_type)

    sent, reused = remote.persist(publish)
    remote.persist(point)
    remote.persist(lambda: verify(remote, digest, blobs))
    return Pushed(digest, sent, reused)


_MAYBE_THERE = (400, 403, 404, 405, 409, 412, 422)  # how an immutable tag says that it is one


def put(remote: Remote, name: str, data: bytes, media_type: str) -> None:
    """PUT a manifest under a tag or its digest; where it is there already, no is no matter."""
    answer = remote.request(
        "PUT",
        f"/manifests/{name}",
        expect=(200, 201, 202, *_MAYBE_THERE),
        body=lambda: data,
        headers={"Content-Type": media_type},
    )
    if answer.status_code not in _MAYBE_THERE or manifest(remote, name) == data:
        return
    code = answers.code(answer)
    if code == "MANIFEST_BLOB_UNKNOWN":
        what = "does not know a blob that it had taken"
        raise remote.judge.again("REG-134", what, "run the same command again", tries=3)
    if answer.status_code in (403, 404, 405):
        raise remote.judge.status("PUT", answer)
    said = f"{answer.status_code}{f' {code}' if code else ''}"
    what = f"answered {said} to the manifest under {name}"
    raise remote.refusal("REG-141", what, "choose another tag: this one may be immutable")


def verify(remote: Remote, ours: str, blobs: Iterable[Blob]) -> None:
    """Read the tag back and look for every blob. Raises RefusedError if anything differs."""
    data = manifest(remote, tag_of(remote.reference))
    change = "run the same command again"
    if data is None:
        raise remote.judge.again("REG-134", "does not show the tag", change, tries=5)
    if digest_of(data) != ours:
        found = look(remote)
        held = found.digest if found else digest_of(data)
        if held == digest_of(data):
            raise _taken(remote, held, ours)
        what = f"shows the tag as {digest_of(data)}, not as {ours}"
        raise remote.refusal("REG-143", what, "look after the registry's storage")
    for blob in blobs:
        if not upload.has(remote, blob):
            what = f"does not show the blob {blob.digest}, which it took"
            raise remote.judge.again("REG-134", what, change, tries=3)
