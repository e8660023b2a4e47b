"""The signatures of an image, where cosign leaves them: found here, judged in `signature`."""

from __future__ import annotations

from tuning import signature
from tuning.registry.referrers import attached, fallback_tag, parts
from tuning.registry.wire import Remote

REFERRER = "application/vnd.dev.cosign.artifact.sig.v1+json"  # cosign 2, in its referrers mode


def signed(remote: Remote, digest: str) -> tuple[signature.Signature, ...]:
    """Everything that claims to be a signature of the image with this digest. Nothing is judged."""

    def work() -> tuple[signature.Signature, ...]:
        found = list(parts(remote, f"{fallback_tag(digest)}.sig", signature.SIMPLE))
        for each in attached(remote, digest):
            if each.artifact_type == REFERRER:
                found += parts(remote, each.digest, signature.SIMPLE)
            elif each.artifact_type == signature.BUNDLE:
                found += parts(remote, each.digest, signature.BUNDLE)
        return tuple(
            signature.Signature(
                part.media_type, part.content, part.annotations.get(signature.ANNOTATION, "")
            )
            for part in found
        )

    return remote.persist(work)
