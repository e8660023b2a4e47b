"""Workload identities -> a login for one registry.

Each kind is a value with one method, `login`. An administrator says which registry is reached with
which identity (`oci.policy`). `federation` exchanges the pod's token.
"""

from __future__ import annotations

import base64
import time
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from tuning.network import federation
from tuning.network.docker_config import Login
from tuning.network.federation import Ask
from tuning.network.sigv4 import sign

AZURE_USER = "00000000-0000-0000-0000-000000000000"
GOOGLE_USER = "oauth2accesstoken"
AZURE_SCOPE = "https://containerregistry.azure.net/.default"


class Identity(Protocol):
    """This pod's identity at a cloud's registry."""

    def login(self, registry: str, ask: Ask) -> Login:
        """A login for `registry`, with its expiry.

        Raises SpecError for a missing token, RefusedError for a refusal, TransientError for a
        failure.
        """
        ...


@dataclass(frozen=True)
class Azure(federation.Azure):
    """A federated credential of Microsoft Entra, for Azure's registries (*.azurecr.io)."""

    def login(self, registry: str, ask: Ask) -> Login:
        """Exchange the pod's token for Entra's, and that for the registry's refresh token."""
        entra = self.token(AZURE_SCOPE, ask)
        form = {
            "grant_type": "access_token",
            "service": registry,
            "tenant": self.tenant,
            "access_token": entra.text,
        }
        scheme = "http" if urlsplit(self.authority).scheme == "http" else "https"
        exchange = f"{scheme}://{registry}/oauth2/exchange"
        reply = federation.answer("the registry", ask, "POST", exchange, form=form)
        token = federation.text(reply, "refresh_token", "the registry")
        # The refresh token lives for hours; Entra's answer says when to ask both again.
        return Login(
            "workload identity (azure)", AZURE_USER, identity_token=token, until=entra.until
        )


@dataclass(frozen=True)
class Aws(federation.Aws):
    """A role of IAM that the pod's token may assume, for ECR (*.dkr.ecr.REGION.amazonaws.com)."""

    ecr: str = ""  # instead of the region's address

    def login(self, registry: str, ask: Ask) -> Login:
        """Exchange the pod's token for keys of the role, and those for a password of ECR."""
        keys = self.session(ask)
        url = self.ecr or f"https://api.ecr.{self.region}.{self.domain}/"
        headers = {
            "Content-Type": "application/x-amz-json-1.1",
            "X-Amz-Target": "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken",
            "X-Amz-Security-Token": keys.token,
        }
        signed = sign(
            "POST",
            url,
            headers,
            b"{}",
            key=keys.key,
            secret=keys.secret,
            region=self.region,
            service="ecr",
        )
        reply = federation.answer("ECR", ask, "POST", url, body=b"{}", headers=signed)
        try:
            data = reply["authorizationData"][0]
            pair = base64.b64decode(data["authorizationToken"], validate=True).decode()
            seconds = float(data.get("expiresAt", 0)) - time.time()
        except (KeyError, IndexError, TypeError, ValueError):
            raise federation.no_token("ECR") from None
        user, _, password = pair.partition(":")
        until = federation.until(seconds)
        return Login("workload identity (aws)", user, password, until=until)


@dataclass(frozen=True)
class Google(federation.Google):
    """A workload identity federation of Google Cloud, for Artifact Registry (*.pkg.dev)."""

    def login(self, registry: str, ask: Ask) -> Login:
        """Google's access token as a password."""
        token = self.token(ask)
        return Login("workload identity (google)", GOOGLE_USER, token.text, until=token.until)
