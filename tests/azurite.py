"""Azurite, Microsoft's own emulator of Azure Blob Storage, on loopback.

    with Azurite(folder) as store:
        store.put("rows", "a.jsonl", b"...")          # with Microsoft's own client
        store.keys()                                  # what a user would put into the Secret

It is installed once with npm, without the install scripts of packages, into ~/.cache
(0.4 GB).
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Self

import pytest
from azure.core.exceptions import ResourceExistsError
from azure.storage import blob
from registries import Certificate

VERSION = "3.37.0"
ACCOUNT, KEY = "wilmas", "d2lsbWEtc3Rhci1jYW5hcnktMDEyMzQ1Njc4OWFiY2RlZg=="


def program() -> Path:
    """The emulator's start file. Skips aloud where there is no npm."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = cache / f"tuning-azurite-{VERSION}"
    if not home.exists():
        if not shutil.which("npm"):
            pytest.skip("npm is not here, which installs Azurite: apt-get install npm")
        scratch = home.with_name(f"{home.name}.{os.getpid()}")
        wish = ["--ignore-scripts", "--no-audit", "--no-fund", f"azurite@{VERSION}"]
        subprocess.run(["npm", "install", "--prefix", str(scratch), *wish], check=True)
        with contextlib.suppress(OSError):  # another process was quicker
            scratch.rename(home)
        shutil.rmtree(scratch, ignore_errors=True)
    return home / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"


class Azurite:
    """A running emulator with one account."""

    def __init__(self, folder: Path, certificate: Certificate | None = None) -> None:
        """With a certificate it speaks https, and lets identities of Entra in as well."""
        self.folder, self.certificate = folder, certificate

    def __enter__(self) -> Self:
        command = ["node", str(program()), "--blobPort", "0", "--location", str(self.folder)]
        if made := self.certificate:
            command += ["--oauth", "basic", "--cert", str(made.chain), "--key", str(made.key)]
        self._process = subprocess.Popen(
            [*command, "--disableTelemetry", "--skipApiVersionCheck"],  # of the newest client
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"},
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := re.search(r"listens on (https?://127\.0\.0\.1:\d+)", line):
                self.endpoint = f"{found[1]}/{ACCOUNT}"
                return self
        raise RuntimeError("Azurite ended")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(10)
        assert self._process.stdout is not None
        self._process.stdout.close()

    @property
    def connection(self) -> str:
        return f"AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={self.endpoint};"

    def put(self, container: str, name: str, body: bytes, *, public: str | None = None) -> None:
        """Store `body`; `public` is "blob" for a container that everybody may read."""
        trusted = {"connection_verify": str(self.certificate.ca)} if self.certificate else {}
        with blob.BlobServiceClient.from_connection_string(self.connection, **trusted) as client:
            with contextlib.suppress(ResourceExistsError):
                client.create_container(container, public_access=public)
            with client.get_blob_client(container, name) as place:
                place.upload_blob(body, overwrite=True)

    def sas(
        self,
        container: str,
        name: str,
        *,
        permission: str = "r",
        minutes: int = 10,
        start: int = -60,
    ) -> str:
        """A signature that Microsoft's library makes for one blob; minutes from now."""
        now = datetime.datetime.now(datetime.UTC)
        made: str = blob.generate_blob_sas(
            ACCOUNT,
            container,
            name,
            account_key=KEY,
            permission=permission,
            start=now + datetime.timedelta(minutes=start),
            expiry=now + datetime.timedelta(minutes=minutes),
        )
        return made

    def keys(self, **changes: str) -> dict[str, Any]:
        """The connection string without the account's key, and `changes`."""
        return {"AZURE_STORAGE_CONNECTION_STRING": f"BlobEndpoint={self.endpoint}",
                "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT} | changes  # fmt: skip
