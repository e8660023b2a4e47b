"""Describe an adapter from manifests, configs and its first kilobytes, without its weights.

Small layers are read whole and checked against their digests. Of a layer with weights only the
beginning is read, which no digest covers: only `pull` verifies it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tuning import adapter as adapters
from tuning import files, safetensors
from tuning.errors import SpecError, TuningError
from tuning.oci import provenance, registry, signature
from tuning.oci.delivery import Access, adapter_folder, named_folder
from tuning.oci.layout.layer import peek_layer
from tuning.oci.layout.manifest import (
    MODEL_NAME,
    RUN_ID,
    Blob,
    Image,
    blob_path,
    is_index,
    layout_of,
    parse_json,
    read_documents,
    read_layout,
    refused,
)
from tuning.oci.registry import Remote

PART = 4 << 20  # bytes of a layer that are read at most
EVALUATIONS = 5  # attached ones that are read, the last ones
WANTED = (adapters.CONFIG, adapters.WEIGHTS, adapters.PICKLE, "tuning.json")
Value = dict[str, Any]


@dataclass(frozen=True)
class Inspection:
    """What is known of an adapter; unknown values are None or empty."""

    name: str
    digest: str | None = None
    platforms: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()  # bytes of each
    size: int = 0  # bytes of all
    annotations: Mapping[str, str] = field(default_factory=dict)
    config: Value | None = None  # adapter_config.json, if it can be loaded
    problems: tuple[str, ...] = ()  # why it cannot be loaded here
    tensors: Mapping[str, safetensors.Tensor] = field(default_factory=dict)
    recipe: Value = field(default_factory=dict)  # tuning.json
    attached: tuple[registry.Attached, ...] = ()
    evaluation: tuple[Value, ...] = ()  # tasks of attached evaluations: untrusted
    signatures: tuple[str, ...] = ()  # the result of verifying each

    def to_json(self) -> Value:
        """For `inspect --json`: flat, with plain values."""
        config = self.config or {}
        return {
            "name": self.name,
            "digest": self.digest,
            "platforms": list(self.platforms),
            "size": self.size,
            "layers": list(self.layers),
            "base_model": self._base_model(config),
            "base_revision": self._recipe("base_revision") or self._note("base-revision"),
            "method": self._recipe("method") or self._note("method"),
            "rank": config.get("r"),
            "alpha": config.get("lora_alpha"),
            "targets": sorted({m.rpartition(".")[2] for m in adapters.modules(self.tensors)})
            or config.get("target_modules"),
            "parameters": sum(tensor.count for tensor in self.tensors.values()) or None,
            "dtypes": sorted({tensor.dtype for tensor in self.tensors.values()}),
            "new_tokens": self.new_tokens,
            "start_adapter": self._recipe("start_adapter"),
            "preset": self.annotations.get(MODEL_NAME) or self.recipe.get("preset"),
            "run_id": self.annotations.get(RUN_ID) or self.recipe.get("run_id"),
            "data": self._recipe("data"),
            "steps": steps if isinstance(steps := self._recipe("steps"), int) else None,
            "final_loss": self._final_loss(),
            "licence": self.annotations.get("org.opencontainers.image.licenses"),
            "attached": [
                {
                    "digest": each.digest,
                    "type": each.artifact_type,
                    "annotations": dict(each.annotations),
                }
                for each in self.attached
            ],
            "evaluation": list(self.evaluation),
            "signatures": list(self.signatures),
            "problems": list(self.problems),
            "annotations": dict(self.annotations),
        }

    @property
    def new_tokens(self) -> list[str]:
        """The tokens that its training added to the base's."""
        listed = self._recipe("new_tokens")
        return [str(token) for token in listed] if isinstance(listed, list) else []

    def _base_model(self, config: Value) -> Any:
        """The base that the config names; of a path, the name that the recipe has for it."""
        named = config.get("base_model_name_or_path") or self._note("base-model")
        is_path = named is not None and Path(str(named)).is_absolute()
        return (self._recipe("base_model") if is_path else None) or named

    def _final_loss(self) -> float | None:
        """The loss of the last step, if the untrusted file has it."""
        match self.recipe.get("loss_by_step"):
            case [*_, [_, int() | float() as loss]]:
                return float(loss)
        return None

    def _recipe(self, name: str) -> Any:
        recipe = self.recipe.get("recipe")
        return recipe.get(name) if isinstance(recipe, dict) else None

    def _note(self, name: str) -> str | None:
        return self.annotations.get(f"tuning.kaito.sh/{name}")


def inspect(name: str, *, access: Access) -> Inspection:
    """Describe the image, layout (`oci:DIR`) or folder `name`.

    Raises SpecError, RefusedError or TransientError if it cannot be read at all.
    """
    if folder := named_folder(name):
        return _folder(name, adapter_folder(folder))
    if name.startswith("oci:"):
        return _layout(name)
    remote = access.remote(name, secret=access.pull_secret)
    return _remote(name, remote, signature.read_keys(access.trust.keys))


def _remote(name: str, remote: Remote, keys: tuple[signature.Key, ...]) -> Inspection:
    digest, image = remote.persist(lambda: registry.resolve(remote))
    top = remote.persist(lambda: registry.manifest(remote, digest)) or b""

    def part(blob: Blob) -> bytes:
        if blob.size <= PART:
            return remote.persist(lambda: registry.document(remote, blob))
        return registry.beginning(remote, blob, PART)

    verdicts = []
    for each in registry.signed(remote, digest):
        wrong = each.wrong(digest=digest, keys=keys)
        verdicts.append("not checked: no key given" if not keys else wrong or "good")
    attached = remote.persist(lambda: registry.attached(remote, digest))
    return _image(
        name,
        digest,
        image,
        part,
        platforms=_platforms(top, image, part),
        attached=attached,
        evaluation=tuple(_evaluations(remote, attached)),
        signatures=tuple(verdicts),
    )


def _evaluations(remote: Remote, attached: Iterable[registry.Attached]) -> Iterator[Value]:
    """The tasks of the evaluations among what is attached."""
    kind = provenance.PREDICATE_KEY, provenance.EVALUATION
    statements = [each for each in attached if kind in each.annotations.items()]
    for each in statements[-EVALUATIONS:]:
        read = partial(registry.parts, remote, each.digest, provenance.MEDIA_TYPE)
        for part in remote.persist(read):
            yield from provenance.measured(part.content)


def _layout(name: str) -> Inspection:
    layout, title = layout_of(name)
    image = read_layout(layout, title)
    top = read_documents(layout, title)[-1]

    def part(blob: Blob) -> bytes:
        path = blob_path(layout, blob)
        if not path.is_file():
            raise refused(name, f"lacks the blob {blob.digest}")
        with path.open("rb") as file:
            data = file.read(PART)
        if blob.size <= PART and f"sha256:{files.digest(data)}" != blob.digest:
            raise refused(name, f"has a damaged blob {blob.digest}")
        return data

    platforms = _platforms(top.data, image, part)
    return _image(name, top.blob.digest, image, part, platforms=platforms)


def _image(
    name: str, digest: str, image: Image, part: Callable[[Blob], bytes], **more: Any
) -> Inspection:
    held: dict[str, bytes] = {}
    for blob in image.layers:
        if "tar" in blob.media_type:
            held |= peek_layer(io.BytesIO(part(blob)), blob, name, WANTED)
    return Inspection(
        name=name,
        digest=digest,
        layers=tuple(blob.size for blob in image.layers),
        size=sum(blob.size for blob in image.blobs),
        annotations=image.annotations,
        **_adapter(held, name),
        **more,
    )


def _platforms(top: bytes, image: Image, part: Callable[[Blob], bytes]) -> tuple[str, ...]:
    """The platforms of an index's entries, or that in the image's config."""
    record = parse_json(top, where=image.where)
    if is_index(record):
        rows = [entry.get("platform") or {} for entry in record["manifests"]]
        kinds = [str(entry.get("artifactType") or "") for entry in record["manifests"]]
    else:
        rows, kinds = [parse_json(part(image.config), where=image.where)], [""]
    return tuple(
        kind or f"{row.get('os', '?')}/{row.get('architecture', '?')}"
        for row, kind in zip(rows, kinds, strict=True)
    )


def _folder(name: str, folder: Path) -> Inspection:
    held = {}
    for wanted in WANTED:
        path = folder / wanted
        if path.is_file():
            with path.open("rb") as file:
                held[wanted] = b"" if wanted == adapters.PICKLE else file.read(PART)
    sizes = tuple(path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file())
    return Inspection(name=name, size=sum(sizes), layers=(), **_adapter(held, name))


def _adapter(held: Mapping[str, bytes], name: str) -> Value:
    """Config, tensors and recipe from the files' beginnings, and their problems."""
    problems: list[str] = []
    config, tensors, recipe = None, {}, {}
    if adapters.CONFIG not in held:
        problems.append(f"no {adapters.CONFIG} was found")
    else:
        try:
            config = adapters.parse(held[adapters.CONFIG])
        except SpecError as error:
            problems += map(str, error.problems)
    if adapters.PICKLE in held and adapters.WEIGHTS not in held:
        problems.append(str(adapters.pickled(name, adapters.PICKLE)))
    if adapters.WEIGHTS in held:
        try:
            start = held[adapters.WEIGHTS]
            length = safetensors.header_length(start, limit=len(start) - 8)
            tensors = safetensors.parse_header(start[8 : 8 + length])
        except ValueError as error:
            problems.append(f"{adapters.WEIGHTS} {error}")
    if config and tensors:
        problems += map(str, adapters.mismatches(config, tensors, adapters.WEIGHTS))
    if "tuning.json" in held:
        try:
            recipe = parse_json(held["tuning.json"], where=name)
        except TuningError as error:
            problems += map(str, error.problems)
    return {
        "config": config,
        "tensors": tensors,
        "recipe": recipe,
        "problems": tuple(problems),
    }
