"""Who counts as one client, and the networks of a setting."""

from __future__ import annotations

import pytest

from powermail.base.errors import OperatorError
from powermail.base.settings import load
from powermail.door.clients import Clients, Networks


def test_connections_are_capped_by_client_and_given_back() -> None:
    clients = Clients(2)
    assert clients.come("192.0.2.1")
    assert clients.come("192.0.2.1")
    assert not clients.come("192.0.2.1")
    assert clients.come("192.0.2.2")
    clients.go("192.0.2.1")
    assert clients.come("192.0.2.1")


def test_one_host_has_a_whole_64_and_no_more() -> None:
    clients = Clients(2)
    assert clients.come("2001:db8::1")
    assert clients.come("2001:db8::ffff:1")
    assert not clients.come("2001:db8::2")
    assert clients.come("2001:db8:0:1::1")
    clients.go("2001:db8::3")
    assert clients.come("2001:db8::4")


def test_networks_of_both_families() -> None:
    networks = Networks(["192.0.2.0/24", "2001:db8::/32", "::1"])
    for client, listed in (
        ("192.0.2.77", True),
        ("192.0.3.1", False),
        ("2001:db8:5::1", True),
        ("::1", True),
        ("::2", False),
        ("local", False),
    ):
        assert (client in networks) is listed, client
    assert "192.0.2.1" not in Networks([])


@pytest.mark.parametrize("setting", ["smtp.proxy_from", "pop.proxy_from", "auth.trusted_networks"])
def test_what_is_no_network_is_refused_at_the_start(setting: str) -> None:
    for good in ("127.0.0.1", "10.0.0.0/8", "10.0.0.1/8", "::1/128"):
        load("", {}, [f'{setting}=["{good}"]'])
    for bad in ("localhost", "10.0.0.0/40", "", "10.0.0"):
        with pytest.raises(OperatorError, match=setting):
            load("", {}, [f'{setting}=["{bad}"]'])
