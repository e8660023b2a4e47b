"""Names, types and shapes of a base model's tensors, from the headers of its files alone."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path

from tuning import safetensors
from tuning.errors import SpecError
from tuning.safetensors import Tensor
from tuning.sources import hub, verify
from tuning.sources.base import Base, companion, complete_folder
from tuning.threads import side_by_side

AT_ONCE = 8


def read(base: Base, *, token: str | None, cache: Path | None = None) -> dict[str, Tensor]:
    """The tensors of `base` by name, those that its index leads to if it has one.

    Of a model of the hub by ranges of its files.

    `token` None falls back to the user's saved login. Raises SpecError, RefusedError or
    TransientError.
    """
    folder = complete_folder(base, cache)
    names = [entry.name for entry in base.files if entry.name.endswith(".safetensors")]
    found: dict[str, Tensor] = {}
    jobs = [partial(_one, base, name, folder, token) for name in names]
    for header in side_by_side(jobs, at_once=AT_ONCE):
        if isinstance(header, BaseException):
            raise header
        found |= header
    if names != [verify.SINGLE] and (
        index := companion(base, verify.INDEX, token=token, cache=cache)
    ):
        with suppress(ValueError):  # whoever verifies the files says more
            named = verify.json_object(index).get("weight_map")
            found = {n: each for n, each in found.items() if n in (named or found)}
    return found


def _one(base: Base, name: str, folder: Path | None, token: str | None) -> dict[str, Tensor]:
    """The tensors of the file `name`. Raises as `read` does."""
    if folder is not None:
        return safetensors.read_header(folder / name)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    hub_id = str(base.hub_id)
    api = HfApi(endpoint=hub.endpoint(), token=token)

    def work() -> dict[str, Tensor]:
        try:
            parsed = api.parse_safetensors_file_metadata(hub_id, name, revision=base.revision)
        except SafetensorsParsingError as error:
            change = "tell the model's authors, or use another revision"
            raise SpecError.at("BASE-105", f"{hub_id} {name}", str(error)[:200], change) from None
        return {key: Tensor(i.dtype, tuple(i.shape)) for key, i in parsed.tensors.items()}

    return hub.ask(work, hub_id, base.revision)
