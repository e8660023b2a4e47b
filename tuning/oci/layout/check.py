"""Read a layout back: every blob is what its name says, and the whole image is there."""

from __future__ import annotations

from pathlib import Path

from tuning import files
from tuning.errors import RefusedError
from tuning.oci.layout.manifest import blob_path, blobs_of, read_documents


def check_layout(layout: Path, digest: str) -> Path | None:
    """The first file of `layout` that is not what the image `digest` says, or None.

    It is read from the disk, as far as the kernel lets us.
    """
    index, where = layout / "index.json", f"oci:{layout}"
    for path in (layout / "oci-layout", index):
        if not path.is_file():
            return path
    try:
        documents = read_documents(layout)
        if documents[-1].blob.digest != digest:
            return index
        blobs = [*(document.blob for document in documents), *blobs_of(documents, where=where)]
    except RefusedError:
        return index
    for blob in blobs:
        path = blob_path(layout, blob)
        sound = path.is_file() and path.stat().st_size == blob.size
        if not sound or f"sha256:{files.digest_file(path, cold=True)}" != blob.digest:
            return path
    return None
