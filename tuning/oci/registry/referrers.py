"""What is attached to an image: signatures and statements, found by referrers API and by tag.

A registry that knows the referrers API lists what names a digest as its `subject`. For all others
an index under the tag `sha256-<digest>` does; it is written always, so that whoever reads only one
of the two finds what is there.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import urllib3.exceptions

from tuning import files
from tuning.errors import RefusedError
from tuning.oci import layout as image
from tuning.oci.layout import Blob
from tuning.oci.registry import upload
from tuning.oci.registry.push import digest_of, is_named, manifest, put
from tuning.oci.registry.wire import Remote

EMPTY = b"{}"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
LARGEST = image.LARGEST_JSON  # bytes of an attached document
MOST = 200  # that are looked at
Value = dict[str, Any]


@dataclass(frozen=True)
class Attached:
    """Something that names an image as its subject."""

    digest: str  # of its manifest
    artifact_type: str
    annotations: Mapping[str, str]


@dataclass(frozen=True)
class Part:
    """A layer of an attached manifest: what it says of itself, and its verified content."""

    media_type: str
    annotations: Mapping[str, str]
    content: bytes


def fallback_tag(digest: str) -> str:
    """The tag whose index lists what is attached to `digest`."""
    return digest.replace(":", "-")


def attached(
    remote: Remote, subject: str, kinds: Collection[str] | None = None
) -> tuple[Attached, ...]:
    """What is attached to the image with the digest `subject`, by API and by tag, each once; of
    these `kinds` (artifact types), if they are given.

    The registry's word, and anybody's who may push there: judge it by its content.
    """
    found: dict[str, Attached] = {}
    for entry in (*_by_api(remote, subject), *_by_tag(remote, subject)):
        each = _attached(entry)
        wanted = each and (kinds is None or each.artifact_type in kinds)
        if each and wanted and len(found) < MOST:
            found.setdefault(each.digest, each)
    return tuple(found.values())


def _by_api(remote: Remote, subject: str) -> list[Value]:
    no = (400, 403, 404, 405, 406, 415, 501)  # how registries without it answer
    answer = remote.request("GET", f"/referrers/{subject}", expect=(200, *no), stream=True)
    with answer:
        if answer.status_code != 200:
            return []
        return _entries(_body(remote, answer))


def _by_tag(remote: Remote, subject: str) -> list[Value]:
    return _entries(manifest(remote, fallback_tag(subject)))


def _entries(data: bytes | None) -> list[Value]:
    """The manifests of an index; none for what is no index."""
    if data is None:
        return []
    try:
        found = image.parse_json(data, where="")["manifests"]
    except (RefusedError, KeyError):
        return []
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def _attached(entry: Value) -> Attached | None:
    try:
        (blob,) = image.entries({"manifests": [entry]}, where="")
    except RefusedError:
        return None
    return Attached(blob.digest, str(entry.get("artifactType") or ""), _notes(entry))


def _notes(entry: Value) -> dict[str, str]:
    notes = entry.get("annotations")
    return {str(k): str(v) for k, v in notes.items()} if isinstance(notes, dict) else {}


def parts(remote: Remote, name: str, media_type: str) -> tuple[Part, ...]:
    """The layers of this type of the manifest `name` (a digest, or a tag); none if it is absent.

    Raises RefusedError for bytes that are not what their digest says.
    """
    data = manifest(remote, name)
    if data is None:
        return ()
    if not is_named(name, data):
        raise remote.refusal("REG-143", f"sent a manifest that is not {name}", "push it again")
    layers = image.parse_json(data, where=str(remote.reference)).get("layers")
    found = []
    for layer in layers if isinstance(layers, list) else ():
        if isinstance(layer, dict) and layer.get("mediaType") == media_type:
            (blob,) = image.entries({"manifests": [layer]}, where=str(remote.reference))
            found.append(Part(media_type, _notes(layer), document(remote, blob)))
        if len(found) == MOST:
            break
    return tuple(found)


def document(remote: Remote, blob: Blob) -> bytes:
    """The content of a small blob. Raises RefusedError if it is not what its digest says."""
    if blob.size > LARGEST:
        what = f"has a document of more than {LARGEST:,} bytes, {blob.digest}"
        raise remote.refusal("REG-144", what, "attach a smaller one")
    answer = remote.request("GET", f"/blobs/{blob.digest}", expect=(200,), stream=True)
    with answer:
        data = _body(remote, answer)
    if f"sha256:{hashlib.sha256(data).hexdigest()}" != blob.digest:
        what = f"sends bytes that are not {blob.digest}"
        raise remote.refusal("REG-143", what, "look after the registry's storage, push again")
    return data


def _body(remote: Remote, answer: Any) -> bytes:
    try:
        data: bytes = answer.raw.read(LARGEST + 1)
    except urllib3.exceptions.HTTPError as error:
        raise remote.judge.unreachable(error) from None
    return data


def attach(
    remote: Remote,
    subject: Blob,
    content: bytes,
    *,
    media_type: str,
    annotations: Mapping[str, str],
) -> str:
    """Attach a document to an image; gives the digest of the manifest that holds it.

    The same document again changes nothing. Raises RefusedError or TransientError.
    """
    notes = dict(annotations)
    config = Blob(EMPTY_TYPE, f"sha256:{files.digest(EMPTY)}", len(EMPTY))
    layer = Blob(media_type, f"sha256:{files.digest(content)}", len(content))
    value = {
        "schemaVersion": 2,
        "mediaType": image.MANIFEST,
        "artifactType": media_type,
        "config": config.to_json(),
        "layers": [layer.to_json()],
        "subject": subject.to_json(),
        "annotations": notes,
    }
    data = files.canonical(value)
    digest = digest_of(data)
    entry = Blob(image.MANIFEST, digest, len(data)).to_json()
    entry |= {"artifactType": media_type, "annotations": notes}

    def publish() -> None:
        with tempfile.TemporaryDirectory(prefix="tuning-") as scratch:
            layout = Path(scratch)
            for blob, piece in ((config, EMPTY), (layer, content)):
                path = image.blob_path(layout, blob)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(piece)
            upload.blobs(remote, layout, (config, layer), progress=lambda done, total, note: None)
        put(remote, digest, data, image.MANIFEST)

    remote.persist(publish)
    try:
        remote.persist(lambda: _list(remote, subject.digest, entry))
    except RefusedError:  # a registry whose tags are immutable, say
        known = remote.persist(lambda: _by_api(remote, subject.digest))
        if not any(each.get("digest") == digest for each in known):
            raise
    return digest


def _list(remote: Remote, subject: str, entry: Value) -> None:
    """Put `entry` into the index under the fallback tag, beside what is there."""
    tag = fallback_tag(subject)
    listed = _by_tag(remote, subject)
    if any(each.get("digest") == entry["digest"] for each in listed):
        return
    value = {"schemaVersion": 2, "mediaType": image.INDEX, "manifests": [*listed, entry]}
    put(remote, tag, files.canonical(value), image.INDEX)
    if not any(each.get("digest") == entry["digest"] for each in _by_tag(remote, subject)):
        # Somebody wrote between our look and our word: theirs is kept, and ours added.
        what = "did not keep what was attached"
        raise remote.judge.again("REG-134", what, "run the same command again", tries=10)
