"""Workload identities -> a login for one registry.

Each kind is a value with one verb, `login`; which registry may be reached with which identity, an
administrator says (`trust`). What the pod's token is exchanged for is in `federation`.
"""

from __future__ import annotations

import base64
import datetime
import time
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from tuning.network import federation
from tuning.network.docker_config import Login
from tuning.network.federation import Ask
from tuning.network.sigv4 import sign

NOBODY = "00000000-0000-0000-0000-000000000000"  # the user's name of an Azure registry token
GOOGLE_USER = "oauth2accesstoken"
AZURE_SCOPE = "https://containerregistry.azure.net/.default"


class Identity(Protocol):
    """A way to prove to a cloud's registry who this pod is."""

    def login(self, registry: str, ask: Ask) -> Login:
        """A login for `registry`, and until when it is good.

        Raises SpecError for what is not set up, RefusedError for a no, TransientError for trouble.
        """
        ...


@dataclass(frozen=True)
class Azure(federation.Azure):
    """A federated credential of Microsoft Entra, for Azure's registries (*.azurecr.io)."""

    def login(self, registry: str, ask: Ask) -> Login:
        """The pod's token for one of Entra, that for a refresh token of the registry."""
        entra = self.token(AZURE_SCOPE, ask)
        form = {
            "grant_type": "access_token",
            "service": registry,
            "tenant": self.tenant,
            "access_token": entra.text,
        }
        scheme = "http" if urlsplit(self.authority).scheme == "http" else "https"
        exchange = f"{scheme}://{registry}/oauth2/exchange"
        found = federation.answer("the registry", ask, "POST", exchange, data=form)
        token = federation.text(found, "refresh_token", "the registry")
        # The refresh token lives for hours; Entra's answer says when to ask both again.
        return Login("workload identity (azure)", NOBODY, identity_token=token, until=entra.until)


@dataclass(frozen=True)
class Aws(federation.Aws):
    """A role of IAM that the pod's token may assume, for ECR (*.dkr.ecr.REGION.amazonaws.com)."""

    ecr: str = ""  # another address than the region's

    def login(self, registry: str, ask: Ask) -> Login:
        """The pod's token for credentials of the role, those for a password of ECR."""
        keys = self.session(ask)
        url = self.ecr or f"https://api.ecr.{self.region}.{self.domain}/"
        headers = {
            "Content-Type": "application/x-amz-json-1.1",
            "X-Amz-Target": "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken",
            "X-Amz-Security-Token": keys.token,
        }
        now = datetime.datetime.now(datetime.UTC)
        signed = sign(
            "POST",
            url,
            headers,
            b"{}",
            key=keys.key,
            secret=keys.secret,
            region=self.region,
            service="ecr",
            now=now,
        )
        found = federation.answer("ECR", ask, "POST", url, data=b"{}", headers=signed)
        try:
            data = found["authorizationData"][0]
            pair = base64.b64decode(data["authorizationToken"], validate=True).decode()
            left = float(data.get("expiresAt", 0)) - time.time()
        except (KeyError, IndexError, TypeError, ValueError):
            raise federation.odd("ECR") from None
        user, _, password = pair.partition(":")
        until = federation.until(left)
        return Login("workload identity (aws)", user, password, until=until)


@dataclass(frozen=True)
class Google(federation.Google):
    """A workload identity federation of Google Cloud, for Artifact Registry (*.pkg.dev)."""

    def login(self, registry: str, ask: Ask) -> Login:
        """A token of Google's as a password."""
        found = self.token(ask)
        who = "workload identity (google)"
        return Login(who, GOOGLE_USER, found.text, until=found.until)
