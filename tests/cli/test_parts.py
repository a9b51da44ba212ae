"""What one of several processes refuses to start with."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from powermail.app.roles import ALL, Role, listening, parts
from powermail.base.errors import OperatorError
from powermail.base.net import parse_host_port
from powermail.base.settings import Settings, load
from powermail.base.sharing import Inherited
from powermail.cli.part import check_addresses


def inherited(settings: Settings, front: bool = True) -> list[Inherited]:
    """What a parent with these settings hands down."""
    addresses = [*settings.metrics.listen, *([address for _, address in listening(settings)] if front else [])]
    return [Inherited(*parse_host_port(address), (), True) for address in addresses]


@pytest.mark.parametrize("front", [True, False])
def test_a_process_serves_every_address_that_its_parent_listens_at_or_none(front: bool) -> None:
    """What only the parent has accepts clients whom nobody answers: they would hang instead of being refused."""
    plain = Settings()
    smtp = replace(plain.smtp, listen=["127.0.0.1:25", "127.0.0.2:25"])
    metrics = replace(plain.metrics, listen=["127.0.0.1:9000"])
    more = replace(plain, smtp=smtp, metrics=metrics)
    check_addresses(more, inherited(more, front), front)
    check_addresses(replace(more, pop=replace(plain.pop, listen_tls=[])), inherited(more, False), False)
    fewer = [replace(more, metrics=replace(metrics, listen=[]))]
    if front:
        fewer += [replace(more, smtp=replace(smtp, listen=[address])) for address in smtp.listen]
        fewer += [replace(more, smtp=replace(smtp, listen=["127.0.0.1:25", "127.0.0.3:25"]))]
    for settings in fewer:
        with pytest.raises(OperatorError, match="restart of the whole"):
            check_addresses(settings, inherited(more, front), front)
        with pytest.raises(OperatorError, match="restart of the whole"):
            check_addresses(more, inherited(settings, front), front)


DATABASE, AUTHORITY = "index.database=postgresql://x@h/n", 'peers.authority_listen=["127.0.0.1:2701"]'


def test_a_first_machine_that_shares_its_index_serves_it_as_several_processes_without_being_told() -> None:
    """One process that does everything takes no leases: it would do the jobs of other machines' keepers too."""
    for told in ((), (DATABASE,), (AUTHORITY,)):
        assert parts(load("", {}, told), ALL, 2) == [], told
    found = parts(load("", {}, (DATABASE, AUTHORITY)), ALL, 2)
    assert [role for _, role in found] == [Role.AUTHORITY, Role.KEEPER, Role.FRONT]


@pytest.mark.parametrize("told", [(), (DATABASE,), ("workers=2", DATABASE)])
def test_a_machine_that_has_joined_is_told_to_say_its_roles(told: tuple[str, ...]) -> None:
    settings = load("", {}, ('peers.authority_at=["192.0.2.1:2701"]', *told))
    with pytest.raises(OperatorError, match=r"has joined a cluster.*--roles"):
        parts(settings, ALL, 2)
    assert parts(settings, "node", 2) == [("node", Role.NODE)]
