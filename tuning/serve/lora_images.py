"""Adapter images that vLLM may load by reference at run time, in a cache by digest. No torch.

`vllm_plugin` asks for the folder of an image when a request names one. The settings are environment
variables, since vLLM's plugins get no others:

    TUNING_LORA_IMAGES   comma-separated prefixes of images, e.g. registry.example.com/team/
    TUNING_LORA_CACHE    cache folder; by default `tuning/lora-images` in the user's cache
    TUNING_LORA_BASE     hub id or preset of the base, where vLLM's --model is another name of it
    TUNING_POLICY        the administrator's policy file: signatures, registries
"""

from __future__ import annotations

import fcntl
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tuning import adapter as adapters
from tuning import files, presets
from tuning.console import Console
from tuning.errors import Problem, SpecError
from tuning.oci import delivery, registry
from tuning.oci.access import Access
from tuning.oci.policy import Trust
from tuning.sources.base import weights_of
from tuning.spec import reference

log = logging.getLogger(__name__)

IMAGES = "TUNING_LORA_IMAGES"
BASE = "TUNING_LORA_BASE"
_ADAPTER, _DIGESTS = "adapter", "digests.json"  # in the folder of a digest


@dataclass(frozen=True)
class LoraImages:
    """The adapter images that may be served, and where they are kept."""

    prefixes: tuple[str, ...]  # registry/repository, without a slash at the end
    cache: Path
    access: Access
    base: str | None = None  # hub id that adapters must be for; None: the model that vLLM serves

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> LoraImages | None:
        """The settings in `environment`; None if no image may be served. Raises SpecError."""
        prefixes = _prefixes(environment.get(IMAGES, ""))
        if not prefixes:
            return None
        cache, policy = environment.get("TUNING_LORA_CACHE"), environment.get("TUNING_POLICY")
        base = environment.get(BASE) or None
        preset = presets.find(base) if base else None
        return cls(
            prefixes,
            Path(cache).expanduser() if cache else files.cache_folder() / "lora-images",
            Access(trust=Trust.load(Path(policy)) if policy else Trust(), patience=delivery.BRIEF),
            preset.hub_id if preset else base,
        )

    def allows(self, name: str) -> bool:
        """Whether `name` is an image under one of the prefixes, which end between path parts."""
        try:
            image = _repository(name).lower()
        except ValueError:
            return False
        return any(f"{image}/".startswith(f"{prefix.lower()}/") for prefix in self.prefixes)

    def fetch(self, name: str, base: str) -> tuple[str, Path]:
        """The digest and the folder of the adapter image `name`, which vLLM can load onto `base`.

        `base` is vLLM's --model. The registry is asked for the digest each time, so that it decides
        who may read the image; bytes in the cache are hashed before they are used again. Raises
        SpecError, RefusedError, TransientError or OSError.
        """
        remote = self.access.remote(name, secret=self.access.pull_secret)
        digest, _ = remote.persist(lambda: registry.resolve(remote))
        self.access.approve(remote)(digest)
        target = self.cache / digest.replace(":", "-")
        with _locked(target.with_suffix(".lock")):
            if not _is_whole(target):
                self._pull(f"{_repository(name)}@{digest}", target)
        adapter = adapters.inspect(target / _ADAPTER, where=name)
        if problems := [*_unsupported(adapter, name), *self._other_base(adapter, name, base)]:
            raise SpecError(problems)
        return digest, adapter.folder

    def _pull(self, name: str, target: Path) -> None:
        """Make `target` the cache folder of the image `name`, and record its files' hashes."""
        if target.exists():
            log.warning("%s is damaged; it is pulled again.", target)
            shutil.rmtree(target)
        with files.making(target) as folder:
            adapter, quiet = folder / _ADAPTER, Console(quiet=True)
            delivery.pull(name, adapter, access=self.access, console=quiet)
            files.write_json(folder / _DIGESTS, _digests(adapter))

    def _other_base(self, adapter: adapters.Adapter, name: str, served: str) -> list[Problem]:
        """Problems of an adapter for another base: by name, or of a folder by its weights."""
        folder, base = Path(served), self.base
        if base is None and folder.is_dir():
            problems = adapters.other_weights(adapter, lambda: weights_of(folder))
            change = "serve the base that it was trained on"
        else:
            problems = adapters.other_base(adapter, base or served)
            change = f"serve {adapter.base_model}, or if both are the same set {BASE} to that"
        return [replace(problem, where=name, change=change) for problem in problems]


def _prefixes(text: str) -> tuple[str, ...]:
    """The prefixes in the comma-separated `text`. Raises SpecError with all that are invalid."""
    prefixes, problems = [], []
    for written in filter(None, map(str.strip, text.split(","))):
        host = written.partition("/")[0]
        try:
            if not ("." in host or ":" in host or host == "localhost"):
                raise ValueError("it does not begin with a registry's host")
            # Two parts more: of one, Docker Hub's names would get "library/" in front.
            prefixes.append(_repository(f"{written.rstrip('/')}/x/x").removesuffix("/x/x"))
        except ValueError as error:
            what = f"{written[:200]!r} is not a prefix of images: {error}"
            problems.append(Problem("SERVE-138", IMAGES, what, "write HOST/PATH/"))
    if problems:
        raise SpecError(problems)
    return tuple(prefixes)


def _repository(name: str) -> str:
    """`registry/repository` of an image reference. Raises ValueError."""
    image = reference.parse(name)
    return f"{image.registry}/{image.repository}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock `path` while the block runs, against other threads and other processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _digests(folder: Path) -> dict[str, str]:
    """sha256 of each file in `folder`."""
    return {path.name: files.digest_file(path) for path in sorted(folder.iterdir())}


def _is_whole(target: Path) -> bool:
    """Whether the cached adapter has the files that were pulled, byte for byte."""
    try:
        return bool(files.read_json(target / _DIGESTS) == _digests(target / _ADAPTER))
    except (OSError, ValueError):
        return False


def _unsupported(adapter: adapters.Adapter, name: str) -> list[Problem]:
    """What of the adapter vLLM refuses, or would leave out in silence.

    The rank is vLLM's to refuse: its message names --max-lora-rank.
    """
    reasons = {
        "DoRA adapters": adapter.config.get("use_dora"),
        "adapters with rows for new tokens": adapter.token_ids,
        "adapters of fused experts (target_parameters)": adapter.config.get("target_parameters"),
    }
    change = "merge it (tuning merge) and serve the model"
    return [
        Problem("SERVE-139", name, f"vLLM serves no {kind}", change)
        for kind, has in reasons.items()
        if has
    ]
