"""Attachments of an image (signatures, statements), listed by referrers API and by fallback tag.

A registry with the referrers API lists the manifests that name a digest as their `subject`. Without
it an index under the tag `sha256-<digest>` does; it is always written, for clients that read only
one of the two.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuning import files
from tuning.errors import RefusedError
from tuning.oci.layout.manifest import (
    INDEX,
    LARGEST_JSON,
    MANIFEST,
    Blob,
    blob_path,
    index_entries,
    parse_json,
)
from tuning.oci.registry import upload
from tuning.oci.registry.push import damaged, digest_of, manifest, put
from tuning.oci.registry.wire import Remote

EMPTY = b"{}"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
LARGEST = LARGEST_JSON  # bytes of an attached document
MOST = 200  # attachments that are read
MOST_PAGES = 50  # of the API's list
_NEXT = re.compile(r'<([^<>]*)>[^<>]*;[ \t]*rel="?next\b', re.IGNORECASE)
Value = dict[str, Any]


@dataclass(frozen=True)
class Attached:
    """A manifest that names an image as its subject."""

    digest: str  # of its manifest
    artifact_type: str
    annotations: Mapping[str, str]


@dataclass(frozen=True)
class Part:
    """A layer of an attached manifest, its content verified."""

    media_type: str
    annotations: Mapping[str, str]
    content: bytes


def fallback_tag(digest: str) -> str:
    """The tag whose index lists what is attached to `digest`."""
    return digest.replace(":", "-")


def attached(
    remote: Remote, subject: str, kinds: Collection[str] | None = None
) -> tuple[Attached, ...]:
    """The attachments of the image with the digest `subject`, of all artifact types or `kinds`.

    They are untrusted: anyone with push access may attach anything.
    """
    unique: dict[str, Attached] = {}
    for entry in (*_by_api(remote, subject), *_by_tag(remote, subject)):
        each = _attached(entry)
        wanted = each and (kinds is None or each.artifact_type in kinds)
        if each and wanted and len(unique) < MOST:
            unique.setdefault(each.digest, each)
    return tuple(unique.values())


def _by_api(remote: Remote, subject: str) -> list[Value]:
    no = (400, 403, 404, 405, 406, 415, 501)  # from registries without it
    url, entries = f"/referrers/{subject}", list[Value]()
    for _ in range(MOST_PAGES):
        answer = remote.request("GET", url, expect=(200, *no), stream=True)
        with closing(answer):
            if answer.status != 200:
                break
            entries += _entries(remote.errors.body(answer, LARGEST))
        following = _NEXT.search(answer.headers.get("Link", ""))
        if following is None or len(entries) >= MOST:
            break
        url = remote.absolute(following[1], answer.url or "")
    return entries


def _by_tag(remote: Remote, subject: str) -> list[Value]:
    return _entries(manifest(remote, fallback_tag(subject)))


def _entries(data: bytes | None) -> list[Value]:
    """The manifests of an index; none if it is not an index."""
    if data is None:
        return []
    try:
        listed = parse_json(data, where="").get("manifests")
    except RefusedError:
        return []
    return [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []


def _attached(entry: Value) -> Attached | None:
    try:
        (blob,) = index_entries({"manifests": [entry]}, where="")
    except RefusedError:
        return None
    return Attached(blob.digest, str(entry.get("artifactType") or ""), _notes(entry))


def _notes(entry: Value) -> dict[str, str]:
    notes = entry.get("annotations")
    return {str(k): str(v) for k, v in notes.items()} if isinstance(notes, dict) else {}


def parts(remote: Remote, name: str, media_type: str) -> tuple[Part, ...]:
    """The layers of this type of the manifest `name` (a digest or a tag); none if it is absent.

    Raises RefusedError for content that does not have its digest.
    """
    data = manifest(remote, name)
    if data is None:
        return ()
    layers = parse_json(data, where=str(remote.reference)).get("layers")
    matching = []
    for layer in layers if isinstance(layers, list) else ():
        if isinstance(layer, dict) and layer.get("mediaType") == media_type:
            (blob,) = index_entries({"manifests": [layer]}, where=str(remote.reference))
            matching.append(Part(media_type, _notes(layer), document(remote, blob)))
        if len(matching) == MOST:
            break
    return tuple(matching)


def document(remote: Remote, blob: Blob) -> bytes:
    """The content of a small blob. Raises RefusedError if it does not have its digest."""
    if blob.size > LARGEST:
        what = f"has a document of more than {LARGEST:,} bytes, {blob.digest}"
        raise remote.errors.refusal("REG-144", what, "attach a smaller one")
    answer = remote.request("GET", f"/blobs/{blob.digest}", expect=(200,), stream=True)
    with closing(answer):
        data = remote.errors.body(answer, LARGEST)
    if f"sha256:{hashlib.sha256(data).hexdigest()}" != blob.digest:
        raise damaged(remote, f"sends bytes that are not {blob.digest}")
    return data


def attach(
    remote: Remote,
    subject: Blob,
    content: bytes,
    *,
    media_type: str,
    annotations: Mapping[str, str],
) -> str:
    """Attach a document to an image; returns the digest of its manifest. Idempotent.

    Raises RefusedError or TransientError.
    """
    notes = dict(annotations)
    config = Blob(EMPTY_TYPE, f"sha256:{files.digest(EMPTY)}", len(EMPTY))
    layer = Blob(media_type, f"sha256:{files.digest(content)}", len(content))
    value = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": media_type,
        "config": config.to_json(),
        "layers": [layer.to_json()],
        "subject": subject.to_json(),
        "annotations": notes,
    }
    data = files.canonical(value)
    digest = digest_of(data)
    entry = Blob(MANIFEST, digest, len(data)).to_json()
    entry |= {"artifactType": media_type, "annotations": notes}

    def publish() -> None:
        with tempfile.TemporaryDirectory(prefix="tuning-") as scratch:
            layout = Path(scratch)
            for blob, piece in ((config, EMPTY), (layer, content)):
                path = blob_path(layout, blob)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(piece)
            upload.blobs(remote, layout, (config, layer), progress=lambda done, total, note: None)
        put(remote, digest, data, MANIFEST)

    remote.persist(publish)
    try:
        remote.persist(lambda: _list(remote, subject.digest, entry))
    except RefusedError:  # a registry whose tags are immutable, say
        known = remote.persist(lambda: _by_api(remote, subject.digest))
        if not any(each.get("digest") == digest for each in known):
            raise
    return digest


def _list(remote: Remote, subject: str, entry: Value) -> None:
    """Add `entry` to the index under the fallback tag."""
    tag = fallback_tag(subject)
    data = manifest(remote, tag)
    if data is not None:
        remote.check_json(data)  # else the list would be written anew, without the others
    listed = _entries(data)
    if any(each.get("digest") == entry["digest"] for each in listed):
        return
    value = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [*listed, entry]}
    put(remote, tag, files.canonical(value), INDEX)
    if not any(each.get("digest") == entry["digest"] for each in _by_tag(remote, subject)):
        what = "lost the attachment to a concurrent write"  # the next try keeps both
        raise remote.errors.again("REG-134", what, "run the same command again", tries=10)
