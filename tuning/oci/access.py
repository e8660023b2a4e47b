"""How registries are reached from this machine, and which of their images may be used."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

from tuning.errors import Problem, RefusedError, SpecError
from tuning.network import docker_config
from tuning.network.session import Session
from tuning.oci import registry, signature
from tuning.oci.layout.manifest import Image
from tuning.oci.policy import Trust
from tuning.oci.registry import OVERWRITE, Patience, Remote
from tuning.spec import reference

log = logging.getLogger(__name__)


@cache
def _warn(text: str) -> None:
    """Log a warning once."""
    log.warning(text)


@dataclass(frozen=True)
class Access:
    """How registries are reached from this machine."""

    push_secret: Path | None = None  # dockerconfigjson; docker's own configuration if None
    pull_secret: Path | None = None
    ca: Path | None = None
    insecure: bool = False
    trust: Trust = field(default_factory=Trust)  # the administrator's policy
    patience: Patience = field(default_factory=Patience)  # by default
    hub_token_file: Path | None = None  # the user's saved login if None
    replace: str = OVERWRITE  # how this command replaces what a tag holds, if it can

    def remote(
        self,
        name: str,
        *,
        secret: Path | None,
        push: bool = False,
        patience: Patience | None = None,
    ) -> Remote:
        """The repository of the reference `name`, with its login. Raises SpecError.

        `push`: messages name the option for logins of a push.
        """
        try:
            parsed = reference.parse(name)
        except ValueError as error:
            what, change = f"is not an image reference: {error}", "write REGISTRY/REPOSITORY:TAG"
            raise SpecError.at("REG-101", name, what, change) from None
        host, registry_ = self.trust.host(parsed.registry), parsed.registry
        identity, login, no_login = None, None, ""
        if host.identity and secret is None:
            ask = Session(host.ca or self.ca, host.client).request
            identity = partial(host.identity.login, registry_, ask)
        else:
            try:
                login = docker_config.login(registry_, secret=secret, repository=parsed.repository)
            except docker_config.HelperFailed as error:  # many images need no login
                no_login = f"{error.problems[0].where} {error.problems[0].what}"
                _warn(f"{no_login}; there may be no login for {registry_}")
        return Remote(
            parsed,
            login,
            ca=host.ca or self.ca,
            client=host.client,
            identity=identity,
            insecure=self.insecure,
            option="--push-secret FILE" if push else "--pull-secret FILE",
            no_login=no_login,
            replace=self.replace,
            patience=patience or self.patience,
        )

    def pull_data(self, name: str, folder: Path) -> None:
        """Extract the files under /data of a data image into the empty `folder`."""
        remote = self.remote(name, secret=self.pull_secret)
        approve = self.approve(remote)
        registry.pull(remote, folder, wanted=lambda _: True, approve=approve)

    def look(self, name: str) -> Image:
        """A data image's manifest. Raises as a pull does."""
        remote = self.remote(name, secret=self.pull_secret)
        digest, image = remote.persist(lambda: registry.resolve(remote))
        self.approve(remote)(digest)
        return image

    def approve_folder(self, name: str) -> None:
        """Raise RefusedError for a layout folder, which is unsigned, if signatures are required."""
        if self.trust.signatures == "require":
            what = "is a folder, which has no signatures, and they are required"
            raise RefusedError.at("SIGN-110", name, what, "pull it from its registry")

    def approve(
        self, remote: Remote, say: Callable[[str], None] = log.warning
    ) -> Callable[[str], None]:
        """A check of an image's signatures by its digest, as the administrator's policy demands.

        It raises RefusedError, or calls `say` where the policy is to warn.
        """

        def check(digest: str) -> None:
            rule = self.trust.signatures
            if rule == "off":
                return
            keys = signature.read_keys(self.trust.keys)
            why = signature.refusal(registry.signed(remote, digest), digest=digest, keys=keys)
            if why is None:
                return
            where = f"{remote.reference}".partition("@")[0] + f"@{digest}"
            problem = Problem("SIGN-110", where, why, "sign it: cosign sign --key KEY IMAGE@DIGEST")
            if rule == "require":
                raise RefusedError([problem])
            say(str(problem))

        return check
