"""Every command that talks to a registry, at every make of registry: a digest, or its own words."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adapters
import pytest
import typer
from commands import dockerconfig
from fake_hub import MODEL
from quirks import PASSWORD, QUIRKS, USER, Quirk, front, options_in
from registries import Registry

from tuning.cli.app import app
from tuning.console import Console
from tuning.errors import RefusedError, TransientError
from tuning.oci import delivery, inspection, model_image, registry
from tuning.oci.delivery import Access
from tuning.oci.layout.manifest import read_documents, read_layout
from tuning.spec import Destination, reference

pytestmark = pytest.mark.registry
BRISK = registry.Patience(total=0.5, first=0.01)
QUIET = Console(quiet=True)
THERE, MODELS = "team/there", "team/models"


@dataclass(frozen=True)
class Place:
    """A registry with a quirk, and what is to be pulled from it or pushed."""

    host: str
    built: Path  # a folder with an adapter and its layout
    scratch: Path
    model: Path
    secret: Path

    @property
    def access(self) -> Access:
        return Access(push_secret=self.secret, pull_secret=self.secret, patience=BRISK)

    @property
    def image(self) -> str:
        return f"{self.host}/{THERE}:1"

    @property
    def digest(self) -> str:
        return read_layout(self.built / "image").digest

    def free(self, name: str) -> str:
        """A tag that holds nothing yet."""
        return f"{self.host}/team/{name}-{self.scratch.name.lower().strip('_')}:1"


def check(place: Place) -> str:
    destination = Destination(image=place.free("check"))
    delivery.check(destination, place.access)
    delivery.claim(destination, place.access, run_id=None, own=())
    return place.digest


def run(place: Place, **more: Any) -> str:
    """As a run's last step pushes."""
    name = place.free("run")
    destination = Destination(image=name)
    terms = {"run_id": "run-1", "own": ()}
    delivery.claim(destination, place.access, **terms)
    layout, said = place.built / "image", lambda *_: None
    where = {"layout": layout, "adapter": place.built / "adapter"}
    delivery.deliver(destination, place.access, **where, **terms, progress=said)
    return pushed(place, name)


def in_pieces(place: Place) -> str:
    """A push whose blobs are larger than a piece; and a statement is attached."""
    name = place.free("pieces")
    remote = place.access.remote(name, secret=place.secret, push=True)
    remote.chunk = 1 << 10
    registry.push(remote, place.built / "image", run_id="run-1")
    top = read_documents(place.built / "image")[-1].blob
    registry.attach(remote, top, b"{}", media_type="application/x", annotations={})
    return pushed(place, name)


def pushed(place: Place, name: str) -> str:
    """What the registry itself holds, which has no quirk."""
    direct = registry.Remote(reference.parse(name.replace(place.host, QUIRKLESS["host"])))
    found = registry.look(direct)
    assert found
    return found.digest


QUIRKLESS: dict[str, str] = {}  # the address without the quirk


def package_model(place: Place) -> str:
    name = place.free("model")
    where, more = Destination(image=name), {"access": place.access, "console": QUIET}
    made = model_image.package(place.model, where, identity="m", annotations={}, **more)
    assert pushed(place, name) == made
    return place.digest


def pull(place: Place) -> str:
    return delivery.pull(place.image, place.scratch / "out", access=place.access, console=QUIET)


def inspect(place: Place) -> str:
    """The image with its signatures and statements."""
    return str(inspection.inspect(place.image, access=place.access).digest)


def use(place: Place) -> str:
    """As chat, merge and serve fetch an adapter."""
    with delivery.at_hand(place.image, access=place.access, console=QUIET) as folder:
        assert folder and (folder / "adapter_config.json").is_file()
    return place.digest


def base(place: Place) -> str:
    """A base model: its config, then its files."""
    name = f"oci://{place.host}/{MODELS}:1"
    assert "model_type" in model_image.config(name, access=place.access)
    more = {"console": QUIET, "cache": place.scratch / "cache"}
    assert Path(model_image.local(name, access=place.access, **more)).is_dir()
    return place.digest


def data(place: Place) -> str:
    """A data image, as check looks at it and a run fetches it."""
    found = place.access.look(place.image)
    place.access.pull_data(place.image, place.scratch / "data")
    return found.digest


# what is done -> whether it writes, and the commands of the command line that do it
COMMANDS: dict[Callable[..., str], tuple[bool, tuple[str, ...]]] = {
    check: (True, ("check",)),
    run: (True, ("run",)),
    in_pieces: (True, ("run",)),
    package_model: (True, ("package-model", "merge")),
    pull: (False, ("pull",)),
    inspect: (False, ("inspect",)),
    use: (False, ("chat", "merge", "serve")),
    base: (False, ("run", "check", "chat", "merge", "serve", "plan")),
    data: (False, ("run", "check", "preview")),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small adapter and its image."""
    folder = tmp_path_factory.mktemp("built")
    adapters.build(folder, size=4096)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a few bytes."""
    folder = tmp_path_factory.mktemp("model")
    for name, content in MODEL.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def filled(started: Registry, built: Path, model: Path) -> Registry:
    """The registry with both images."""
    QUIRKLESS["host"] = started.host
    remote = registry.Remote(reference.parse(f"{started.host}/{THERE}:1"))
    registry.push(remote, built / "image", run_id="run-1")
    where = Destination(image=f"{started.host}/{MODELS}:1")
    more = {"access": Access(), "console": QUIET}
    model_image.package(model, where, identity="m", annotations={}, **more)
    return started


def options_of(command: str) -> set[str]:
    known = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    return {text for each in known.params for text in (*each.opts, *each.secondary_opts)}


def expected(quirk: Quirk, command: Callable[..., str]) -> str:
    """The words that the command shows; nothing if it succeeds."""
    if command is check and quirk.late:
        return ""
    return quirk.writes if COMMANDS[command][0] else quirk.reads


def pairs() -> Iterator[Any]:
    """Each command with each quirk; by default one in three, so that each of both is met."""
    for row, name in enumerate(QUIRKS):
        for column, command in enumerate(COMMANDS):
            marks = [pytest.mark.slow] if (row + column) % 3 else []
            yield pytest.param(name, command, marks=marks, id=f"{name}-{command.__name__}")


@pytest.mark.parametrize(("name", "command"), pairs())
def test_a_command_ends_well_or_in_the_registrys_words(
    filled, built, model, tmp_path, name, command
):
    """The right digest; or one line with the words, the reference, and a remedy at hand."""
    quirk = QUIRKS[name]
    words = expected(quirk, command)
    with front(quirk, filled) as near:
        secret = tmp_path / "login.json"
        secret.write_text(json.dumps(dockerconfig(near.host, USER, PASSWORD)))
        place = Place(near.host, built, tmp_path, model, secret)
        try:
            shown, digest = "", command(place)
        except (RefusedError, TransientError) as error:
            shown, digest = str(error), ""

    assert words in shown, shown
    assert (digest == place.digest) if not words else near.host in shown
    assert PASSWORD not in shown and "<html" not in shown
    for real in COMMANDS[command][1] if shown else ():
        assert options_in(shown) <= options_of(real), (real, shown)
