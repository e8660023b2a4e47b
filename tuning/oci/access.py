"""How registries are reached from this machine, and which of their images may be used."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tuning.errors import Problem, RefusedError, SpecError
from tuning.network import docker_config, session
from tuning.oci import registry, signature
from tuning.oci.layout import Image
from tuning.oci.policy import Trust
from tuning.oci.registry import Patience, Remote
from tuning.spec import reference

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Access:
    """How registries are reached from this machine."""

    push_secret: Path | None = None  # dockerconfigjson; docker's own configuration if None
    pull_secret: Path | None = None
    ca: Path | None = None
    insecure: bool = False
    trust: Trust = field(default_factory=Trust)  # the administrator's word
    patience: Patience = field(default_factory=Patience)  # where nothing else is said

    def remote(self, name: str, *, secret: Path | None, patience: Patience | None = None) -> Remote:
        """The repository that `name` names, with the login for it. Raises SpecError."""
        try:
            parsed = reference.parse(name)
        except ValueError as error:
            change = "write REGISTRY/REPOSITORY:TAG"
            raise SpecError.at("REG-101", name, f"is no image reference: {error}", change) from None
        host, registry_ = self.trust.host(parsed.registry), parsed.registry
        identity, login = None, None
        if host.identity and secret is None:
            ask = session.session(host.ca or self.ca, host.client).request
            identity = partial(host.identity.login, registry_, ask)
        else:
            login = docker_config.login(registry_, secret=secret, repository=parsed.repository)
        return Remote(
            parsed,
            login,
            ca=host.ca or self.ca,
            client=host.client,
            identity=identity,
            insecure=self.insecure,
            patience=patience or self.patience,
        )

    def pull_data(self, name: str, folder: Path) -> None:
        """Lay the files under /data of a data image down in the empty `folder`."""
        remote = self.remote(name, secret=self.pull_secret)
        approve = self.approve(remote)
        registry.pull(remote, folder, wanted=lambda _: True, approve=approve)

    def look(self, name: str) -> Image:
        """What a data image is, from its manifest. Raises as a pull does."""
        remote = self.remote(name, secret=self.pull_secret)
        digest, found = remote.persist(lambda: registry.resolve(remote))
        self.approve(remote)(digest)
        return found

    def approve_folder(self, name: str) -> None:
        """Raises RefusedError for a layout folder where signatures are required: it has none."""
        if self.trust.signatures == "require":
            what = "is a folder, which holds no signatures, and they are required"
            raise RefusedError.at("SIGN-110", name, what, "pull it from its registry")

    def approve(
        self, remote: Remote, say: Callable[[str], None] = log.warning
    ) -> Callable[[str], None]:
        """What refuses the digest of an image that the administrator wants signed, and is not.

        Where signatures are only to be warned of, `say` is told.
        """

        def judge(digest: str) -> None:
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

        return judge
