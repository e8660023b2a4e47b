"""Image references are read as registries read them."""

from __future__ import annotations

import pytest

from tuning.spec import reference
from tuning.spec.reference import Reference

SHA = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("busybox", Reference("docker.io", "library/busybox")),
        ("me/adapter:1", Reference("docker.io", "me/adapter", "1")),
        ("index.docker.io/busybox", Reference("docker.io", "library/busybox")),
        ("docker.io/me/adapter", Reference("docker.io", "me/adapter")),
        ("127.0.0.1:5000/a/b/c:v1.2", Reference("127.0.0.1:5000", "a/b/c", "v1.2")),
        ("localhost/a", Reference("localhost", "a")),
        ("localhost:5000/a", Reference("localhost:5000", "a")),
        ("[::1]:5000/a:x", Reference("[::1]:5000", "a", "x")),
        ("Reg.example.com/a_b/c__d/e-f.g", Reference("Reg.example.com", "a_b/c__d/e-f.g")),
        (f"r.io/a@{SHA}", Reference("r.io", "a", None, SHA)),
        (f"r.io/a:t@{SHA}", Reference("r.io", "a", "t", SHA)),
    ],
)
def test_reads_what_a_kubelet_reads(text: str, expected: Reference) -> None:
    """Registry, repository, tag and digest, with Docker Hub's short names written out."""
    actual = reference.parse(text)

    assert expected == actual
    assert expected == reference.parse(str(actual))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "empty"),
        ("a b", "space"),
        ("a\nb", "space"),
        ("https://r.io/a", "URL scheme"),
        ("ACR_REPO_HERE.azurecr.io/phi:1", '"ACR_REPO_HERE.azurecr.io" is not a registry host'),
        ("r.io/IMAGE_NAME_HERE:1", "lower case"),
        ("r.io/a:", "nothing follows"),
        ("r.io/a:" + "t" * 129, "is not a valid tag"),
        ("r.io/a:-x", "is not a valid tag"),
        ("r.io/", "missing"),
        ("r.io//a", "empty part"),
        ("r.io/a-", "is not a valid part"),
        ("r.io/ä", "is not a valid part"),
        ("r.io:99999/a", "is not a valid port"),
        ("r.io/a@sha256:12", "digest"),
        ("r.io/a@", "digest"),
        ("r.io/" + "a" * 300, "longer than"),
        ("-r.io/a", "registry host"),
    ],
)
def test_says_what_is_wrong_with_a_reference(text: str, sentence: str) -> None:
    """A bad reference is refused with a sentence that names the part."""
    with pytest.raises(ValueError, match=sentence):
        reference.parse(text)
