"""What the log tells of a session and of a message: who, what came of it, and what belongs together."""

from __future__ import annotations

import re

from tests.system.conftest import Running


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


async def test_background_work_belongs_to_no_session(running: Running) -> None:
    await running.operation("account_add", address="ann@example.org", password="x")
    assert "cid=" not in running.lines("operator")[0]
    assert all("cid=" not in line for line in running.lines("listening"))
