"""The database of the directory stopped, hung, restarted, failed over: real servers (P12, P14, F27)."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable

import asyncpg
import pytest

from powermail.base import limits
from powermail.base.counters import Counters
from powermail.base.database_url import Host
from powermail.base.errors import DirectoryTrouble, OperatorError
from powermail.base.world import World
from powermail.directory.accounts import SqlDirectory
from powermail.directory.authenticate import Authenticator, AuthTrouble
from powermail.directory.contract import Account
from powermail.directory.database import Address, parse
from powermail.directory.pool import Broken
from powermail.directory.postgres import PostgresSession
from powermail.directory.resolve import DirectoryCache, Resolver
from powermail.directory.statement import Statement
from powermail.mail.address import parse as parse_address
from tests.servers import Database, Postgres, standby_of

_SLACK_S = 1.5  # for a busy machine


@pytest.fixture(params=["postgresql", "mysql"])
def database(request: pytest.FixtureRequest) -> Database:
    """A fresh database of each server."""
    found: Database = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def directory(database: Database, world: World) -> AsyncIterator[SqlDirectory]:
    made = SqlDirectory(world, database.server.kind, parse(database.server.kind, database.url), 2)
    await made.initialise()
    await made.open()
    await made.add(
        [
            Account("", "ann@example.org", "{plain}secret"),
            Account("", "both@example.org", forward=("ann@example.org", "x@else.example")),
            Account("", "*@catch.example"),
        ]
    )
    yield made
    await made.close()


def resolver_of(world: World, directory: SqlDirectory, ttl_s: float = 0.0, stale_s: float = 3600.0) -> Resolver:
    return Resolver(DirectoryCache(directory, world.clock, Counters(), ttl_s, stale_s), "+")


async def timed(call: Awaitable[object]) -> tuple[object, float]:
    """What came of it, and how long it took."""
    began = time.monotonic()
    try:
        found = await call
    except DirectoryTrouble as error:
        found = error
    return found, time.monotonic() - began


async def test_a_server_that_was_restarted_costs_no_error(database: Database, directory: SqlDirectory) -> None:
    """The connections that rest are dead; nobody notices."""
    assert await directory.find("ann@example.org") is not None
    database.server.kill()
    database.server.start()
    await database.server.ready()
    assert await directory.find("ann@example.org") is not None
    await directory.add([Account("", "new@example.org")])
    assert await directory.serves("example.org")


async def test_a_server_that_is_gone_is_trouble_and_never_nobody(
    database: Database, directory: SqlDirectory, world: World
) -> None:
    resolver = resolver_of(world, directory)
    known = await resolver.resolve(parse_address("ann@example.org"))
    database.server.kill()
    assert await resolver.resolve(parse_address("ann@example.org")) == known
    for address in ("nobody@example.org", "x@else.example"):
        with pytest.raises(DirectoryTrouble):
            await resolver.resolve(parse_address(address))
    late = SqlDirectory(world, database.server.kind, parse(database.server.kind, database.url), 2)
    await late.open()  # nobody waits for a directory to start
    with pytest.raises(DirectoryTrouble):
        await late.find("ann@example.org")
    database.server.start()
    await database.server.ready()
    assert await late.find("ann@example.org") is not None
    await late.close()


async def test_a_server_that_hangs_costs_one_wait(database: Database, directory: SqlDirectory, world: World) -> None:
    """P14: known recipients, with their subaddresses, catch-alls and forwards; all others trouble; each within the limit."""
    resolver = resolver_of(world, directory)
    addresses = ["ann@example.org", "ann+tag@example.org", "any@catch.example", "both@example.org"]
    before = [await resolver.resolve(parse_address(address)) for address in addresses]
    assert all(found.known for found in before) and before[3].remote[0][0] == "x@else.example"
    with pytest.raises(AssertionError):
        assert (await resolver.resolve(parse_address("nobody@example.org"))).known
    database.server.pause()
    first, took_s = await timed(resolver.resolve(parse_address(addresses[0])))
    assert first == before[0] and took_s < limits.DIRECTORY_WAIT_S + _SLACK_S
    began = time.monotonic()
    for address, found in zip(addresses, before, strict=True):
        again = await resolver.resolve(parse_address(address))
        assert again.hosted == found.hosted and [to for to, _ in again.remote] == [to for to, _ in found.remote], address
    for address in ("nobody@example.org", "stranger@example.org", "ann@else.example"):
        with pytest.raises(DirectoryTrouble):
            await resolver.resolve(parse_address(address))
    rest_s = limits.DIRECTORY_AWAY_S + limits.DIRECTORY_WAIT_S
    assert time.monotonic() - began < rest_s + _SLACK_S, "not a wait for each of them"
    database.server.resume()
    async with asyncio.timeout(20.0):
        while resolver.directory.trouble:
            await asyncio.sleep(0.05)
            await timed(resolver.resolve(parse_address("ann@example.org")))
    assert not (await resolver.resolve(parse_address("nobody@example.org"))).known


async def test_stale_answers_have_a_bound(database: Database, directory: SqlDirectory, world: World) -> None:
    resolver = resolver_of(world, directory, stale_s=0.0)
    assert (await resolver.resolve(parse_address("ann@example.org"))).known
    database.server.kill()
    with pytest.raises(DirectoryTrouble):
        await resolver.resolve(parse_address("ann@example.org"))


async def test_nobody_hears_that_his_password_is_wrong_while_the_directory_is_away(
    database: Database, directory: SqlDirectory, world: World
) -> None:
    """P14, U19: who changed it a moment ago is right."""
    resolver = resolver_of(world, directory)
    authenticator = Authenticator(world, resolver, None, False, lambda client: True)  # nobody is made to wait for long
    try:
        assert await authenticator.plain("192.0.2.1", "ann@example.org", "wrong", "popd") is None
        assert await authenticator.plain("192.0.2.1", "ann@example.org", "secret", "popd") is not None
        database.server.kill()
        assert await authenticator.plain("192.0.2.2", "ann@example.org", "secret", "popd") is not None
        assert world.counters.get("auth.failures") == 1
        with pytest.raises(AuthTrouble):
            await authenticator.plain("192.0.2.2", "ann@example.org", "wrong", "popd")
        with pytest.raises(AuthTrouble):
            await authenticator.apop("192.0.2.2", "ann@example.org", "<banner>", "0" * 32, "popd")
        exchange = await authenticator.scram("192.0.2.2", "n,,n=ann@example.org,r=abcdefgh", "popd")
        with pytest.raises(AuthTrouble):
            await exchange.finish("c=biws,r=abcdefgh,p=AAAA")
        with pytest.raises(DirectoryTrouble):
            await authenticator.plain("192.0.2.2", "nobody@example.org", "secret", "popd")
        assert world.counters.get("auth.failures") == 4, "guessing is counted all the same"
    finally:
        authenticator.close()


async def test_connections_are_bounded(database: Database, directory: SqlDirectory) -> None:
    found = await asyncio.gather(*(directory.find("ann@example.org") for _ in range(60)))
    assert all(account is not None for account in found)
    asked = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'powermail-directory'"
    if database.server.kind == "mysql":
        asked = f"SELECT count(*) FROM information_schema.processlist WHERE db = '{database.name}' AND command = 'Sleep'"
    assert 1 <= int(await asyncio.to_thread(database.sql, asked)) <= 2


async def test_a_host_that_hangs_is_not_waited_for_if_another_answers(
    database: Database, directory: SqlDirectory, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two hosts takes connections and says nothing; its own time-out would be long."""
    monkeypatch.setattr(limits, "DIRECTORY_CONNECT_S", 60.0)
    silent = socket.create_server(("127.0.0.1", 0))
    port = silent.getsockname()[1]
    here = parse(database.server.kind, database.url)
    both = SqlDirectory(world, database.server.kind, here._replace(hosts=(Host("127.0.0.1", port), *here.hosts)), 2)
    try:
        found, took_s = await timed(both.find("ann@example.org"))
        assert isinstance(found, Account)
        assert limits.DIRECTORY_NEXT_HOST_S - 0.05 < took_s < 20.0
        await both.add([Account("", "new@example.org")])
        assert await both.find("new@example.org") is not None
    finally:
        await both.close()
        silent.close()


async def test_look_ups_are_content_with_a_standby_and_changes_are_not(
    postgresql: Database, postgresql_server: Postgres, world: World
) -> None:
    here = parse("postgresql", postgresql.url)
    primary = SqlDirectory(world, "postgresql", here, 2)
    await primary.initialise()
    await primary.add([Account("", "ann@example.org")])
    standby = await asyncio.to_thread(standby_of, postgresql_server)
    hosts = (Host("127.0.0.1", standby.port), *here.hosts)
    both = SqlDirectory(world, "postgresql", here._replace(hosts=hosts), 2)
    alone = SqlDirectory(world, "postgresql", here._replace(hosts=hosts[:1]), 2)
    try:
        assert await both.find("ann@example.org") is not None
        await both.add([Account("", "new@example.org")])
        assert await both.find("new@example.org") is not None, "it finds what it wrote, however late the standby is"
        with pytest.raises(DirectoryTrouble):
            await alone.add([Account("", "more@example.org")])
        postgresql_server.pause()
        found, took_s = await timed(both.find("ann@example.org"))
        assert isinstance(found, Account) and took_s < limits.DIRECTORY_WAIT_S + _SLACK_S
        assert (await timed(alone.find("ann@example.org")))[1] < 1.0
        await asyncio.to_thread(standby.promote)
        await both.add([Account("", "after@example.org")])
        assert await both.find("after@example.org") is not None
    finally:
        for directory in (primary, both, alone):
            await directory.close()
        standby.remove()


async def test_a_password_that_is_refused_is_said_and_not_waited_for(database: Database, world: World) -> None:
    kind = database.server.kind
    here = parse(kind, database.url)
    wrong = SqlDirectory(world, kind, Address(here.hosts, "nobody", "x", here.name), 2)
    with pytest.raises(OperatorError, match=r"directory\.database: 127\.0\.0\.1:\d+ says: .*nobody"):
        await wrong.open()
    nowhere = SqlDirectory(world, kind, here._replace(name="nowhere"), 2)
    with pytest.raises(OperatorError, match="nowhere"):
        await nowhere.open()
    await wrong.close()
    await nowhere.close()


async def test_a_database_without_the_table_says_how_to_get_it(database: Database, world: World) -> None:
    kind = database.server.kind
    directory = SqlDirectory(world, kind, parse(kind, database.url), 2)
    with pytest.raises(OperatorError, match="`powermail directory init` makes it"):
        await directory.open()
    assert await directory.initialise() == [1]
    assert await directory.initialise() == [], "again changes nothing"
    await directory.open()
    database.sql("UPDATE accounts_version SET version = 0")
    with pytest.raises(OperatorError, match="of version 0, this release needs 1"):
        await directory.open()
    database.sql("UPDATE accounts_version SET version = 2")
    await directory.open()  # of a newer release: columns were only added
    database.sql("DROP TABLE accounts_version")
    with pytest.raises(OperatorError, match="not of our making"):
        await directory.initialise()
    await directory.open()  # a table or view of the operator's own
    await directory.close()


async def test_a_database_of_another_encoding_is_refused(postgresql_server: Postgres, world: World) -> None:
    postgresql_server.sql("", "CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    directory = SqlDirectory(world, "postgresql", parse("postgresql", postgresql_server.url("latin")), 1)
    try:
        with pytest.raises(OperatorError, match="encoding LATIN1"):
            await directory.initialise()
    finally:
        await directory.close()
        postgresql_server.drop("latin")


async def test_a_session_that_the_server_ended_unasked_is_broken_whatever_the_driver_calls_it() -> None:
    """P12: trouble of ours is temporary."""

    class Ended:
        async def fetch(self, text: str, *values: object, timeout: float) -> list[object]:
            raise asyncpg.InternalClientError("cannot switch to state 11; another operation (2) is in progress")

    with pytest.raises(Broken):
        await PostgresSession(Ended(), Host("127.0.0.1", 5432)).rows(Statement("SELECT 1"), {}, 1.0)
