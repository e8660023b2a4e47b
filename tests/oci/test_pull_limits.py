"""What an image declares is compared with the disk before a byte of it is fetched."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuning.errors import TransientError
from tuning.oci.layout.manifest import LAYER, Blob
from tuning.oci.registry import download
from tuning.oci.registry.wire import Remote
from tuning.spec import reference

SPACE = r"REG-137 127.0.0.1:9/team/rows:1: needs [\d,]+ bytes in .* are free. Change: free some"


@pytest.mark.parametrize("sizes", [(1 << 60,), (1 << 59, 1 << 59), (1, 1 << 60)])
def test_layers_that_do_not_fit_the_disk_are_not_fetched(
    tmp_path: Path, sizes: tuple[int, ...]
) -> None:
    """No connection is made: nobody listens there."""
    remote = Remote(reference.parse("127.0.0.1:9/team/rows:1"))
    blobs = [Blob(LAYER, f"sha256:{n:064x}", size) for n, size in enumerate(sizes)]

    with pytest.raises(TransientError, match=SPACE):
        download(remote, blobs, tmp_path / "layout")

    assert not list(tmp_path.rglob("sha256/*"))
