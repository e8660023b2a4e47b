"""A local server answers to its own names, not to a web page's."""

import socket

import pytest

from tuning.network import own_host

OWN = [
    "127.0.0.1:8000",
    "localhost",
    "localhost:8000",
    "[::1]:8000",
    "10.2.3.4",
    "tuning-server:80",
    "tuning-server.team.svc.cluster.local:80",
    "server.team.svc",
    "gpu-box.local:8000",
    "LOCALHOST.",
    socket.gethostname(),
    None,
]
OTHERS = [
    "rebind.example:8000",
    "127.0.0.1.rebind.example",
    "localhost.rebind.example.",
    "rebind.example.",
    "[rebind.example]",
    "127.0.0.1@rebind.example",
    "svc.example",
    "",
]


@pytest.mark.parametrize("host", OWN)
def test_an_address_or_a_private_name_is_its_own(host: str | None) -> None:
    """What no public name server can point elsewhere, with or without a port."""
    assert own_host.is_own(host)


@pytest.mark.parametrize("host", OTHERS)
def test_a_public_name_is_a_strangers(host: str) -> None:
    """Whatever private name it contains."""
    assert not own_host.is_own(host)
