"""What the log tells of a session and of a message: who, what came of it, and what belongs together."""

from __future__ import annotations

import base64
import re

import pytest

from powermail.base import limits
from powermail.directory.sqlite import SqliteDirectory
from tests.system.conftest import Client, PopClient, Running
from tests.system.submitting import plain, secured


def fact(line: str, name: str) -> str:
    """The value of one fact of a line."""
    found = re.search(rf' {name}=("(?:[^"\\]|\\.)*"|[^ ]*)', line)
    assert found is not None, (name, line)
    return found[1].strip('"')


async def test_each_recipient_of_a_message_has_a_line(running: Running) -> None:
    for name in ("ann", "bob"):
        await running.mailbox(f"{name}@local.example")
    octets = b"Subject: x\r\nmessage-ID:\r\n <one@example.org>\r\n\r\nbody"
    assert (await running.send(["ann@local.example", "bob@local.example"], octets, "s@example.org")).startswith("250")
    first, second = running.lines("delivered")
    assert [fact(line, "to") for line in (first, second)] == ["ann@local.example", "bob@local.example"]
    for name in ("key", "cid", "nodes", "seconds", "octets"):
        assert fact(first, name) == fact(second, name) != ""
    assert fact(first, "message_id") == "<one@example.org>" and fact(first, "sender") == "<s@example.org>"
    assert 0 <= float(fact(first, "seconds")) < 20


async def test_a_session_is_bound_by_its_cid_and_two_have_two(running: Running) -> None:
    await running.mailbox("ann@local.example")
    for _ in range(2):
        client = await running.connect("smtp")
        await client.ask("EHLO x")
        await client.ask("MAIL FROM:<s@example.org>")
        assert (await client.ask("RCPT TO:<none@local.example>")).startswith("550")
        await client.ask("RSET")
        await running.send(["ann@local.example"], b"S: x\r\n\r\nx")
        client.close()
    refused, delivered = running.lines("recipient-refused"), running.lines("delivered")
    cids = [fact(line, "cid") for line in (*refused, *delivered)]
    assert len(set(cids)) == 4 and all(cid.startswith("smtpd-") for cid in cids)
    assert fact(refused[0], "sender") == "<s@example.org>" and fact(refused[0], "recipient") == "none@local.example"


async def test_who_reads_is_told_with_counts_when_he_goes(running: Running) -> None:
    await running.mailbox("ann@local.example")
    await running.fill(3)
    client = await running.log_in("ann@local.example")
    for number in (1, 2):
        client.send(f"RETR {number}")
        await client.multiline()
    assert (await client.ask_pop("DELE 1")).startswith("+OK")
    assert (await client.ask_pop("QUIT")).startswith("+OK")
    await running.until("he is gone", lambda _: bool(running.lines("logout")))
    (login,), (logout,) = running.lines("login"), running.lines("logout")
    assert fact(login, "cid") == fact(logout, "cid")
    assert [fact(logout, name) for name in ("account", "retrieved", "deleted")] == ["ann@local.example", "2", "1"]


async def keys_of(running: Running) -> list[str]:
    """The keys of ann's messages, in order."""
    return [entry.key.hex() for entry in await running.entries()]


@pytest.mark.parametrize("pipelined", [True, False])
async def test_each_message_that_is_retrieved_or_deleted_has_a_line(running: Running, pipelined: bool) -> None:
    await running.mailbox("ann@local.example")
    await running.fill(3)
    assert (await running.send(["ann@local.example"], b"S: large\r\n\r\n" + b"y" * 300_000)).startswith("250")
    keys = await keys_of(running)
    client = await running.log_in("ann@local.example")
    for number in (1, 2, 4):
        client.send(f"RETR {number}")
        if not pipelined:
            await client.multiline()
    client.send("TOP 3 0\r\nDELE 2\r\nDELE 4\r\nQUIT")
    await client.reader.read()
    await running.until("he is gone", lambda _: bool(running.lines("logout")))
    (logout,) = running.lines("logout")
    retrieved, deleted = running.lines("retrieved"), running.lines("deleted")
    assert [fact(line, "key") for line in retrieved] == [keys[0], keys[1], keys[3]], "TOP is none"
    assert [fact(line, "key") for line in deleted] == [keys[1], keys[3]]
    for line in (*retrieved, *deleted):
        assert fact(line, "account") == "ann@local.example" and fact(line, "cid") == fact(logout, "cid")


async def test_retrievals_are_told_though_the_session_goes_on(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "POP3_LOG_GATHER_S", 0.01)
    monkeypatch.setattr(limits, "POP3_LOG_KEYS_MAX", 2)
    await running.mailbox("ann@local.example")
    await running.fill(5)
    client = await running.log_in("ann@local.example")
    for number in range(1, 6):
        client.send(f"RETR {number}")
        await client.multiline()
    await running.until("all are told", lambda _: len(running.lines("retrieved")) == 5)
    assert [fact(line, "key") for line in running.lines("retrieved")] == await keys_of(running)


async def test_what_is_not_deleted_is_not_said_to_be(running: Running) -> None:
    await running.mailbox("ann@local.example")
    await running.fill(2)
    client = await running.log_in("ann@local.example")
    client.send("RETR 1")
    await client.multiline()
    await client.ask_pop("DELE 1")
    client.writer.transport.abort()
    await running.until("he is gone", lambda _: bool(running.lines("logout")))
    assert running.lines("deleted") == []
    assert [fact(line, "key") for line in running.lines("retrieved")] == (await keys_of(running))[:1]


FAILING = {
    "no such account": ("nobody@local.example", "secret"),
    "account disabled": ("off@local.example", "secret"),
    "account only forwards": ("forward@local.example", "secret"),
    "account has no password": ("none@local.example", "secret"),
    "wrong password": ("ann@local.example", "wrong"),
    "scheme unknown": ("odd@local.example", "secret"),
    "digest malformed": ("cut@local.example", "secret"),
    "digest too costly to check": ("slow@local.example", "secret"),
}


async def odd_accounts(running: Running) -> None:
    """Accounts that nobody can log in to."""
    await running.mailbox("ann@local.example")
    await running.mailbox("off@local.example", enabled=False)
    await running.mailbox("forward@local.example", forward=["x@example.net"])
    await running.mailbox("none@local.example", password="")
    await running.mailbox("cut@local.example", password="{SSHA}5en6")
    await running.mailbox("slow@local.example", password="{SHA512-CRYPT}$6$rounds=999999999$abcdefgh$" + "x" * 86)
    directory = running.powermail.core.directory
    assert isinstance(directory, SqliteDirectory)
    database = directory._db
    assert database is not None
    database.execute("INSERT INTO accounts (address, password) VALUES ('odd@local.example', '{rot13}frperg')")


async def test_why_a_login_failed_is_in_the_log_and_a_counter_and_nowhere_else(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    await odd_accounts(running)
    limiter = running.powermail.front.authenticator._limiter
    monkeypatch.setattr(limiter, "delay_s", lambda *_: 0.0)
    for door in ("submission", "pop3"):
        said = set()
        for reason, (name, password) in FAILING.items():
            limiter._counts.clear()
            if door == "submission":
                client: Client = await secured(running)
                said.add(await client.ask(f"AUTH PLAIN {plain(name, password)}"))
            else:
                client = await running.connect(door)
                assert isinstance(client, PopClient)
                await client.start_tls_pop()
                said.add(await client.ask_pop(f"USER {name}"))
                said.add(await client.ask_pop(f"PASS {password}"))
            line = running.lines("login-failed")[-1]
            assert (fact(line, "reason"), fact(line, "name")) == (reason, name)
            client.close()
        assert len(said) == (2 if door == "pop3" else 1), said
    counters = running.powermail.world.counters
    for name in ("no_account", "disabled", "forwards_only", "no_password", "wrong_password", "unknown_scheme", "malformed"):
        assert counters.get(f"auth.failed_{name}") == 2
    assert counters.get("auth.failed_too_costly") == 2 and counters.get("auth.failures") == 16


async def test_logins_that_come_to_no_check_have_their_reason_too(running: Running) -> None:
    await running.mailbox("ann@local.example", password="{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ=")
    clear = await running.connect("submission")
    await clear.ask("EHLO x")
    await clear.ask("AUTH PLAIN " + plain("ann@local.example"))
    pop = await running.connect("pop3")
    assert isinstance(pop, PopClient)
    await pop.ask_pop("USER ann@local.example")
    client = await secured(running)
    await client.ask("AUTH PLAIN !")
    await client.ask("AUTH LOGIN")
    await client.ask("*")
    other = base64.b64encode(b"bob@local.example\0ann@local.example\0secret").decode()
    assert (await client.ask(f"AUTH PLAIN {other}")).startswith("535")
    first = base64.b64encode(b"n,,n=ann@local.example,r=abcdefgh").decode()
    assert (await client.ask(f"AUTH SCRAM-SHA-256 {first}")).startswith("334")
    await client.ask(base64.b64encode(b"c=biws,r=abcdefgh,p=AAAA").decode())
    authenticator = running.powermail.front.authenticator
    for _ in range(limits.AUTH_FAR_OVER * limits.AUTH_FAILURES_PER_MINUTE_MAX[0]):
        authenticator._limiter.failed("127.0.0.1", "x")
    assert (await client.ask("AUTH PLAIN " + plain("ann@local.example"))).startswith("421")
    reasons = [fact(line, "reason") for line in running.lines("login-failed")]
    assert reasons == [
        *("TLS needed", "TLS needed", "exchange unreadable", "exchange cancelled", "acts for another"),
        *("stored form serves no SCRAM", "address blocked"),
    ]
    assert "ann@local" not in "".join(running.lines("login-failed")[:2]), "nothing of a password in clear is looked at"


async def test_background_work_belongs_to_no_session(running: Running) -> None:
    await running.operation("account_add", address="ann@example.org", password="x")
    assert "cid=" not in running.lines("operator")[0]
    assert all("cid=" not in line for line in running.lines("listening"))
