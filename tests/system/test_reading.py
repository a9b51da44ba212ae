"""POP3 against a whole PowerMail."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.conftest import PopClient, Running, start


async def login(running: Running, name: str = "ann@local.example") -> PopClient:
    """A session behind TLS and login."""
    client = await running.connect("pop3")
    assert isinstance(client, PopClient)
    await client.start_tls_pop()
    await client.ask_pop(f"USER {name}")
    assert (await client.ask_pop("PASS secret")).startswith("+OK")
    return client


@pytest.fixture
async def three(running: Running) -> Running:
    """Ann with three messages."""
    await running.mailbox("ann@local.example")
    for number in range(3):
        assert (await running.send(["ann@local.example"], b"S: %d\r\n\r\nline 1\r\nline 2" % number)).startswith("250")
    return running


async def test_dele_counts_at_quit_only(three: Running) -> None:
    client = await login(three)
    assert (await client.ask_pop("DELE 1")).startswith("+OK")
    assert (await client.ask_pop("DELE 1")).startswith("-ERR")
    assert (await client.ask_pop("STAT")).split()[1] == "2"
    client.close()
    await client.writer.wait_closed()
    for _ in range(50):
        try:
            client = await login(three)
            break
        except AssertionError:
            client.close()
    assert (await client.ask_pop("STAT")).split()[1] == "3"
    await client.ask_pop("DELE 2")
    await client.ask_pop("RSET")
    await client.ask_pop("DELE 3")
    assert (await client.ask_pop("QUIT")).startswith("+OK")
    assert len(await three.read("ann@local.example")) == 2


async def test_unique_ids_are_stable_and_unique(three: Running) -> None:
    async def ids() -> list[str]:
        client = await login(three)
        await client.ask_pop("UIDL")
        found = (await client.multiline()).decode().split("\r\n")[:-1]
        await client.ask_pop("QUIT")
        return [line.split()[1] for line in found]

    before = await ids()
    assert len(set(before)) == 3
    assert all(1 <= len(name) <= 70 for name in before)
    await three.powermail.stop(0.5)
    three.powermail = await start(three.data)
    assert await ids() == before


@pytest.mark.parametrize(
    "command",
    ["RETR 0", "RETR -1", "RETR 99999999999999999999", "RETR 4", "TOP 1 -5", "LIST x", "DELE 1 2", "FOO", "USER x", "UIDL 0"],
)
async def test_bad_arguments(three: Running, command: str) -> None:
    client = await login(three)
    assert (await client.ask_pop(command)).startswith("-ERR")
    assert (await client.ask_pop("NOOP")).startswith("+OK")
    client.close()


async def test_top_list_and_pipelining(three: Running) -> None:
    client = await login(three)
    client.send(b"TOP 1 1\r\nLIST 2\r\nNOOP\r\nSTAT\r\n")
    assert (await client.line()).startswith("+OK")
    top = await client.multiline()
    assert top.endswith(b"S: 0\r\n\r\nline 1\r\n")
    assert (await client.line()).startswith("+OK 2 ")
    assert await client.line() == "+OK"
    assert (await client.line()).startswith("+OK 3 ")
    client.close()


async def test_a_maildrop_is_exclusive(three: Running) -> None:
    first = await login(three)
    second = await three.connect("pop3")
    assert isinstance(second, PopClient)
    await second.start_tls_pop()
    await second.ask_pop("USER ann@local.example")
    assert "[IN-USE]" in await second.ask_pop("PASS secret")
    await first.ask_pop("QUIT")
    await second.ask_pop("USER ann@local.example")
    assert (await second.ask_pop("PASS secret")).startswith("+OK")
    second.close()


async def test_no_password_without_tls_and_none_survives_the_switch(running: Running) -> None:
    await running.mailbox("ann@local.example")
    client = await running.connect("pop3")
    assert isinstance(client, PopClient)
    assert (await client.ask_pop("USER ann@local.example")).startswith("-ERR")
    client.send(b"STLS\r\nUSER ann@local.example\r\nPASS secret\r\n")
    assert (await client.line()).startswith("+OK")
    await client.start_tls()
    assert (await client.ask_pop("STAT")).startswith("-ERR")
    await client.ask_pop("CAPA")
    assert b"STLS" not in await client.multiline()
    client.close()


async def test_who_is_made_again_sees_no_old_mail(running: Running) -> None:
    """X11: ids, not names."""
    await running.mailbox("ann@local.example")
    await running.send(["ann@local.example"], b"old owner's")
    await running.operation("account_delete", address="ann@local.example")
    await running.mailbox("ann@local.example")
    assert await running.read("ann@local.example") == []
    orphans = await running.operation("orphans")
    assert isinstance(orphans, list)
    assert [row["messages"] for row in orphans] == [1]
    said = await running.operation("purge", account=orphans[0]["account"], confirm=False)
    assert isinstance(said, dict)
    assert said["purged"] is False
    await running.operation("purge", account=orphans[0]["account"], confirm=True, now=True)
    assert await running.operation("orphans") == []


async def test_catch_all_login_as_the_original_allows(running: Running) -> None:
    await running.mailbox("*@all.example")
    await running.send(["whoever@all.example"], b"x")
    for name in ("*@all.example", "all.example", "any@all.example", "any%all.example"):
        client = await login(running, name)
        assert (await client.ask_pop("STAT")).split()[1] == "1"
        assert (await client.ask_pop("QUIT")).startswith("+OK")
        client.close()


async def test_one_insert_makes_a_mailbox(running: Running, tmp_path: Path) -> None:
    import sqlite3

    with sqlite3.connect(running.data / "directory.db") as database:
        database.execute("INSERT INTO accounts (address, password) VALUES ('New@local.example', '{plain}secret')")
    database.close()
    assert (await running.send(["new@local.example"], b"welcome")).startswith("250")
    assert len(await running.read("new@local.example")) == 1
