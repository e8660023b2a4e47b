"""Read the signatures that cosign attached to an image; `signature` verifies them."""

from __future__ import annotations

import logging

from tuning.errors import RefusedError
from tuning.oci import signature
from tuning.oci.registry.referrers import attached, fallback_tag, parts
from tuning.oci.registry.wire import Remote

log = logging.getLogger(__name__)

REFERRER = "application/vnd.dev.cosign.artifact.sig.v1+json"  # cosign 2, in its referrers mode


def signed(remote: Remote, digest: str) -> tuple[signature.Signature, ...]:
    """Everything that claims to sign the image with this digest, not yet verified."""

    def work() -> tuple[signature.Signature, ...]:
        candidates = list(parts(remote, f"{fallback_tag(digest)}.sig", signature.SIMPLE))
        kinds = {REFERRER: signature.SIMPLE, signature.BUNDLE: signature.BUNDLE}
        for each in attached(remote, digest, kinds):
            try:
                candidates += parts(remote, each.digest, kinds[each.artifact_type])
            except RefusedError as error:  # anyone may attach anything: the others still count
                log.warning("an attachment of %s cannot be read: %s", digest, error)
        return tuple(
            signature.Signature(
                part.media_type, part.content, part.annotations.get(signature.ANNOTATION, "")
            )
            for part in candidates
        )

    return remote.persist(work)
