"""An administrator's policy on registries: how they are reached, and which images are trusted.

The section `registry` of the policy file:

    registry:
      signatures: require          # of images that are pulled: require, warn or off
      keys: [cosign.pub]           # beside the policy file; one good signature is enough
      provenance: warn             # of images that are pushed: require, warn or off
      hosts:
        registry.corp:5000: {ca: corp.pem, clientCert: tuning.pem, clientKey: tuning-key.pem}
        "*.azurecr.io": {identity: {kind: azure}}
        123456789012.dkr.ecr.eu-west-1.amazonaws.com: {identity: {kind: aws, region: eu-west-1}}
        europe-docker.pkg.dev: {identity: {kind: google, audience: //iam.googleapis.com/...}}

Missing values of an identity come from the environment, where the clouds' webhooks put them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from tuning.errors import Problem, SpecError
from tuning.network import workload_identity
from tuning.network.docker_config import matches
from tuning.spec import policy_file

Rule = Literal["require", "warn", "off"]


@dataclass(frozen=True)
class Host:
    """How one registry is reached."""

    ca: Path | None = None
    client: tuple[Path, Path] | None = None  # certificate and key, PEM
    identity: workload_identity.Identity | None = None


@dataclass(frozen=True)
class Trust:
    """The whole section."""

    signatures: Rule = "off"
    keys: tuple[Path, ...] = ()
    provenance: Rule = "warn"
    hosts: Mapping[str, Host] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Trust:
        """The section `registry` of the policy file at `path`. Raises SpecError."""
        return policy_file.section(path, "registry", _Section).trust(path)

    @classmethod
    def of(cls, path: Path | None, keys: Sequence[Path] = ()) -> Trust:
        """That of the policy file at `path`, if any; each of `keys` is a required signature."""
        trust = cls.load(path) if path else cls()
        return replace(trust, signatures="require", keys=tuple(keys)) if keys else trust

    def host(self, registry: str) -> Host:
        """How `registry` is reached; a name counts before a pattern."""
        fitting = [name for name in self.hosts if matches(name.lower(), registry.lower())]
        best = min(fitting, key=lambda name: ("*" in name, -len(name)), default=None)
        return self.hosts[best] if best is not None else Host()


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class _Azure(_Part):
    kind: Literal["azure"]
    tenant_id: str = ""
    client_id: str = ""
    token_file: str = ""
    authority: str = ""

    def build(self, where: str) -> workload_identity.Identity:
        tenant, client, token = _filled(
            self,
            where,
            tenant_id="AZURE_TENANT_ID",
            client_id="AZURE_CLIENT_ID",
            token_file="AZURE_FEDERATED_TOKEN_FILE",  # noqa: S106 (a variable's name)
        )
        authority = self.authority or os.environ.get("AZURE_AUTHORITY_HOST", "")
        more = {"authority": authority} if authority else {}
        return workload_identity.Azure(tenant, client, Path(token), **more)


class _Aws(_Part):
    kind: Literal["aws"]
    role_arn: str = ""
    region: str = ""
    token_file: str = ""
    sts: str = ""
    ecr: str = ""

    def build(self, where: str) -> workload_identity.Identity:
        role, region, token = _filled(
            self,
            where,
            role_arn="AWS_ROLE_ARN",
            region="AWS_REGION",
            token_file="AWS_WEB_IDENTITY_TOKEN_FILE",  # noqa: S106 (a variable's name)
        )
        return workload_identity.Aws(role, region, Path(token), self.sts, self.ecr)


class _Google(_Part):
    kind: Literal["google"]
    audience: str = ""
    token_file: str = ""
    service_account: str = ""
    sts: str = ""
    iam: str = ""

    def build(self, where: str) -> workload_identity.Identity:
        audience, token = _filled(self, where, audience="", token_file="")
        more = {name: url for name, url in (("sts", self.sts), ("iam", self.iam)) if url}
        return workload_identity.Google(audience, Path(token), self.service_account, **more)


def _filled(part: _Part, where: str, **variables: str) -> list[str]:
    """Each field as it is written, else from its environment variable. Raises SpecError."""
    values, problems = [], []
    for name, variable in variables.items():
        value = getattr(part, name) or (os.environ.get(variable, "") if variable else "")
        values.append(value)
        if not value:
            key = to_camel(name)
            what = f"has no {key}" + (f", and {variable} is not set" if variable else "")
            problems.append(Problem("FETCH-109", where, what, f"add {key}"))
    if problems:
        raise SpecError(problems)
    return values


class _Host(_Part):
    ca: str | None = None
    client_cert: str | None = None
    client_key: str | None = None
    identity: Annotated[_Azure | _Aws | _Google, Field(discriminator="kind")] | None = None


class _Section(_Part):
    signatures: Rule = "off"
    keys: list[str] = Field(default_factory=list)
    provenance: Rule = "warn"
    hosts: dict[str, _Host] = Field(default_factory=dict)

    def trust(self, path: Path) -> Trust:
        """The section with its paths beside the policy file."""
        folder, problems, hosts = path.parent, [], {}
        if self.signatures != "off" and not self.keys:
            what = f"has signatures: {self.signatures}, but no keys"
            problems.append(Problem("FETCH-109", f"{path} registry", what, "add keys"))
        for name, host in self.hosts.items():
            where = f"{path} registry.hosts.{name}"
            if bool(host.client_cert) != bool(host.client_key):
                what = "has one of clientCert and clientKey"
                problems.append(Problem("FETCH-109", where, what, "give both"))
                continue
            client = (
                (folder / host.client_cert, folder / host.client_key)
                if host.client_cert and host.client_key
                else None
            )
            ca = folder / host.ca if host.ca else None
            known = host.identity.build(f"{where}.identity") if host.identity else None
            hosts[name] = Host(ca, client, known)
        if problems:
            raise SpecError(problems)
        keys = tuple(folder / name for name in self.keys)
        return Trust(self.signatures, keys, self.provenance, hosts)
