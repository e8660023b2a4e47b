"""`tuning check`: everything that can be refused before a byte of weights moves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from tuning import plan
from tuning.console import Console
from tuning.data import formats
from tuning.data.first_rows import FirstRows, check_file, check_head
from tuning.data.problems import mixed_shapes
from tuning.errors import DataError
from tuning.network.policy import load_headers
from tuning.oci import delivery, model_image
from tuning.pipeline import sizing
from tuning.pipeline.endings import together
from tuning.pipeline.options import Options, base_reference, read_token
from tuning.plan import device
from tuning.sources import base, fetch, stores
from tuning.sources.local import File
from tuning.spec import Spec


def check(spec: Spec, options: Options, console: Console) -> Iterator[str]:
    """Everything that can be refused before a byte of weights moves; a line for each good thing."""
    here = plan.device_of(spec.instance) if spec.instance else device.detect()
    name, revision = base_reference(spec)
    token = read_token(options.hub_token_file)
    access = replace(options.access, patience=delivery.QUICK)
    good: list[str] = []
    shapes: list[tuple[str, formats.Shape]] = []

    def model() -> None:
        if model_image.is_image(name):
            shape = model_image.config(name, access=access)
            judged(plan.base_from_config(plan.declared_name(spec, shape), name, shape), name)
            return
        found = base.resolve(name, revision=revision, token=token)
        config = base.check(found, token=token)
        known = plan.base_from_config(plan.declared_name(spec, config), found.revision, config)
        judged(known, f"{name} at {found.revision[:19]}")

    def judged(known: plan.Base, shown: str) -> None:
        plan.refuse_unsupported(spec, known, here)
        known = sizing.sized(spec, known, here, console=console)
        decided = plan.draft(spec, here=here, base=known)
        good.extend((f"model: {shown}", f"plan: {fit(decided)}"))

    def data() -> None:
        if spec.source.urls:
            secrets = options.data_secrets
            headers = load_headers(secrets) if secrets else None
            found = fetch.check(
                spec.source,
                policy=options.policy,
                credentials=headers,
                keys=stores.load_keys(secrets, options.policy),
            )
            firsts = [(seen.shown, seen.size, seen.head) for seen in found]
            together(*(partial(first_rows, *first) for first in firsts))
        elif image := spec.source.image:
            size = sum(blob.size for blob in access.look(image).layers)
            good.append(f"data: {image}, {size:,} bytes as sent, its rows judged when it is pulled")
        else:
            local = fetch.fetch(spec.source, Path(), policy=options.policy)
            together(*(partial(first_rows_here, file) for file in local))
        odd = [
            mixed_shapes(shown, shape, *shapes[0])
            for shown, shape in shapes[1:]
            if shape.name != shapes[0][1].name
        ]
        if odd:
            raise DataError(odd)

    s = spec.settings
    columns = formats.Columns(s.messages_column, s.context_column, s.response_column)

    def first_rows(shown: str, size: int | None, head: bytes) -> None:
        whole, extension = size == len(head), s.dataset_extension
        judged_rows(
            shown, size, check_head(head, shown, whole=whole, columns=columns, extension=extension)
        )

    def first_rows_here(file: File) -> None:
        found = check_file(file.path, file.shown, columns=columns, extension=s.dataset_extension)
        judged_rows(file.shown, file.size, found)

    def judged_rows(shown: str, size: int | None, what: FirstRows) -> None:
        bytes_ = f"{size:,} bytes" if size is not None else "size unknown"
        good.append(f"data: {shown}, {bytes_}, {what}")
        if what.shape:
            shapes.append((shown, what.shape))

    def destination() -> None:
        delivery.check(spec.destination, access)
        delivery.claim(spec.destination, access, run_id=None, own=())
        good.append(f"destination: {spec.destination.image or 'local'}")

    together(model, data, destination)
    yield from good


def fit(decided: plan.Plan) -> str:
    """Whether the plan fits its device, in a few words."""
    placed, found = decided.placement, decided.fit
    batch = f"{placed.micro_batch} x {decided.recipe.max_length} tokens at once"
    if found is None:
        return f"{batch} on {decided.device}, which nobody has sized"
    return f"{batch} take {found.memory.total / 2**30:.1f} GiB on {decided.device}"
