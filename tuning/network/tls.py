"""TLS contexts: which authorities are trusted, and our own certificate for mutual TLS."""

from __future__ import annotations

import functools
import ssl
from pathlib import Path

import certifi

from tuning.errors import SpecError


@functools.lru_cache(maxsize=8)
def tls(ca_bundle: Path | None, client: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    """TLS 1.2 or newer, verified with the system's certificates, certifi's and `ca_bundle`.

    `client`: PEM files of the certificate and key for mutual TLS.
    """
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(certifi.where())  # slim images have no system certificates
    if ca_bundle:
        try:
            context.load_verify_locations(ca_bundle)
        except OSError as error:  # ssl.SSLError is one
            what = "cannot be read" if not isinstance(error, ssl.SSLError) else "contains no PEM"
            change = "name a file of PEM certificates"
            raise SpecError.at("FETCH-127", f"caBundle {ca_bundle}", what, change) from None
    if client:
        try:
            context.load_cert_chain(*client, password="")  # never asks a person
        except OSError as error:
            what = "cannot be read" if not isinstance(error, ssl.SSLError) else "is no PEM pair"
            change = "name a certificate and its key, as PEM files without a password"
            raise SpecError.at("FETCH-127", f"{client[0]}, {client[1]}", what, change) from None
    return context
