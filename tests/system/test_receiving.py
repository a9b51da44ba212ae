"""SMTP, LMTP and submission against a whole PowerMail: the rows of the attack list that arrive by these doors."""

from __future__ import annotations

import asyncio
import base64

import pytest

from tests.system.conftest import PopClient, Running


async def test_a_message_is_stored_and_read_back(running: Running) -> None:
    await running.mailbox("ann@local.example")
    reply = await running.send(["ANN@Local.Example"], b"Subject: x\r\n\r\n..dot\r\nbody\x00\rbare \xff")
    assert reply.startswith("250 2.6.0 Stored as ")
    assert await running.read("ann@local.example") == [b"Subject: x\r\n\r\n.dot\r\nbody\x00\rbare \xff\r\n"]


@pytest.mark.parametrize("end", [b"\n.\n", b"\n.\r\n", b"\r.\r", b"\r\n.\n"])
async def test_smuggling_gives_one_message(running: Running, end: bytes) -> None:
    await running.mailbox("ann@local.example")
    tail = b"MAIL FROM:<smuggled@x>\r\nRCPT TO:<ann@local.example>\r\nDATA\r\nevil"
    assert (await running.send(["ann@local.example"], b"Subject: x\r\n\r\nx" + end + tail)).startswith("250")
    found = await running.read("ann@local.example")
    assert len(found) == 1
    assert b"evil" in found[0]


async def test_one_copy_however_addressed(running: Running) -> None:
    await running.mailbox("ann@local.example")
    await running.mailbox("alias@local.example", password="", forward=["ann@local.example"])
    recipients = ["ann@local.example", "Ann@LOCAL.example", "alias@local.example", "ann+tag@local.example"] * 5
    assert (await running.send(recipients, b"Subject: x\r\n\r\nx")).startswith("250")
    assert len(await running.read("ann@local.example")) == 1


async def test_unknown_and_relay_are_refused_at_the_door(running: Running) -> None:
    client = await running.connect()
    await client.ask("EHLO x")
    for sender in ("<>", "<a@elsewhere.example>", "<postmaster@localhost>"):
        assert (await client.ask(f"MAIL FROM:{sender}")).startswith("250")
        for path in ("victim@elsewhere.example", "nobody@localhost", "\"x' OR '1'='1\"@localhost", '"../../etc/x"@localhost'):
            assert (await client.ask(f"RCPT TO:<{path}>")).startswith("550")
        assert (await client.ask("RCPT TO:<postmaster>")).startswith("250")
        await client.ask("RSET")
    client.close()


async def test_alias_loops_are_cut(running: Running) -> None:
    for one, two in (("a", "b"), ("b", "c"), ("c", "a")):
        await running.mailbox(f"{one}@local.example", password="", forward=[f"{two}@local.example"])
    assert (await running.send(["a@local.example"], b"x")).startswith("550 5.4.6")


async def test_commands_out_of_order_and_rset_clears_recipients(running: Running) -> None:
    await running.mailbox("ann@local.example")
    client = await running.connect()
    assert (await client.ask("MAIL FROM:<a@b.c>")).startswith("503")
    await client.ask("EHLO x")
    assert (await client.ask("DATA")).startswith("503")
    await client.ask("MAIL FROM:<a@b.c>")
    await client.ask("RCPT TO:<ann@local.example>")
    await client.ask("RSET")
    await client.ask("MAIL FROM:<a@b.c>")
    assert (await client.ask("DATA")).startswith("503 5.5.1 No valid")
    assert (await client.ask("QUIT")).startswith("221")


async def test_too_large_is_refused_and_the_session_stays_in_step(running: Running) -> None:
    await running.mailbox("ann@local.example")
    limit = running.powermail.settings.smtp.message_octets_max
    client = await running.connect()
    await client.ask("EHLO x")
    assert (await client.ask(f"MAIL FROM:<a@b.c> SIZE={limit + 1}")).startswith("552 5.3.4")
    await client.ask("MAIL FROM:<a@b.c> SIZE=10")
    await client.ask("RCPT TO:<ann@local.example>")
    await client.ask("DATA")
    line = b"x" * 65_534 + b"\r\n"
    for _ in range(limit // len(line) + 2):
        client.send(line)
        await client.writer.drain()
    assert (await client.ask(b".\r\n")).startswith("552 5.3.4")
    assert (await client.ask("NOOP")).startswith("250")
    client.close()
    assert await running.read("ann@local.example") == []


async def test_a_large_message_streams_and_comes_back_whole(running: Running) -> None:
    await running.mailbox("ann@local.example")
    body = b"".join(b"%08d %s\r\n" % (n, base64.b64encode(bytes([n % 251] * 40))) for n in range(60_000))
    assert (await running.send(["ann@local.example"], b"Subject: big\r\n\r\n" + body)).startswith("250")
    assert await running.read("ann@local.example") == [b"Subject: big\r\n\r\n" + body + b"\r\n"]


async def test_bdat(running: Running) -> None:
    await running.mailbox("ann@local.example")
    client = await running.connect()
    await client.ask("EHLO x")
    assert (await client.ask(b"BDAT 6\r\nQUIT\r\n")).startswith("503")
    await client.ask("MAIL FROM:<a@b.c> BODY=BINARYMIME")
    assert (await client.ask(b"BDAT 19 LAST\r\nRSET\r\nNOOP\r\nQUIT\r\n.")).startswith("503")
    await client.ask("RCPT TO:<ann@local.example>")
    assert (await client.ask("DATA")).startswith("503")
    assert (await client.ask(b"BDAT 6\r\nA: b\r\n")).startswith("250")
    assert (await client.ask("DATA")).startswith("503")
    assert (await client.ask(b"BDAT 0\r\n")).startswith("250")
    assert (await client.ask(b"BDAT 10 LAST\r\n\r\n.\r\nQUIT\r")).startswith("250 2.6.0")
    assert (await client.ask("BDAT -1")).startswith("50")
    assert (await client.ask("BDAT 99999999999999999999")).startswith("50")
    assert (await client.ask("QUIT")).startswith("221")
    assert await running.read("ann@local.example") == [b"A: b\r\n\r\n.\r\nQUIT\r\r\n"]


async def test_early_talkers_and_other_protocols_are_closed(running: Running) -> None:
    for first in (b"GET / HTTP/1.1\r\n", b"POST / HTTP/1.1\r\nHost: x\r\n\r\nEHLO x\r\n", b"\x16\x03\x01\x02\x00\n"):
        client = await running.connect()
        client.send(first)
        answer = await asyncio.wait_for(client.reader.read(), 20)
        assert answer.startswith(b"554")
        assert b"250" not in answer


async def test_long_lines_are_refused(running: Running) -> None:
    client = await running.connect()
    assert (await client.ask(b"EHLO " + b"x" * 1_000_000 + b"\r\n")).startswith("500")
    assert (await client.ask("EHLO <script>")).startswith("501")
    assert (await client.ask("EHLO fine.example")).startswith("250")
    assert (await client.ask(b"NOOP\n")).startswith("500")
    client.close()


async def test_hops_are_limited(running: Running) -> None:
    await running.mailbox("ann@local.example")
    reply = await running.send(["ann@local.example"], b"Received: x\r\n" * 51 + b"\r\nbody")
    assert reply.startswith("554 5.4.6")
    assert await running.read("ann@local.example") == []


async def test_original_defect_8_too_many_recipients_keeps_the_earlier_ones(running: Running) -> None:
    await running.mailbox("*@many.example")
    client = await running.connect()
    await client.ask("EHLO x")
    await client.ask("MAIL FROM:<a@b.c>")
    limit = running.powermail.settings.smtp.recipients_max
    client.send(b"".join(b"RCPT TO:<u%d@many.example>\r\n" % n for n in range(limit + 5)))
    replies = [await client.reply() for _ in range(limit + 5)]
    assert all(reply.startswith("250") for reply in replies[:limit])
    assert all(reply.startswith("452 4.5.3") for reply in replies[limit:])
    await client.ask("DATA")
    assert (await client.ask(b"x\r\n.\r\n")).startswith("250")
    client.close()


async def test_quota_and_the_message_to_everybody(running: Running) -> None:
    await running.mailbox("small@local.example", quota_octets=1000)
    await running.mailbox("large@local.example")
    assert (await running.send(["small@local.example"], b"x" * 2000)).startswith("552 5.2.2")
    assert (await running.send(["small@local.example"], b"x" * 500)).startswith("250")
    assert (await running.send(["small@local.example"], b"x" * 500)).startswith("552 5.2.2")
    for order in (["large@local.example", "small@local.example"], ["small@local.example", "large@local.example"]):
        assert (await running.send(order, b"x" * 2000)).startswith("250"), "whatever the order"
    assert len(await running.read("small@local.example")) == 3


async def test_lmtp_answers_each_recipient(running: Running) -> None:
    await running.mailbox("ann@local.example")
    await running.mailbox("bob@local.example")
    client = await running.connect("lmtp")
    assert (await client.ask("EHLO x")).startswith("500")
    await client.ask("LHLO x")
    await client.ask("MAIL FROM:<>")
    await client.ask("RCPT TO:<ann@local.example>")
    assert (await client.ask("RCPT TO:<nobody@local.example>")).startswith("550")
    await client.ask("RCPT TO:<bob@local.example>")
    await client.ask("DATA")
    client.send(b"body\r\n.\r\n")
    assert [(await client.reply())[:3] for _ in range(2)] == ["250", "250"]
    assert (await client.ask("QUIT")).startswith("221")


async def test_submission_needs_tls_then_login_and_the_senders_own_address(running: Running) -> None:
    await running.mailbox("ann@local.example")
    await running.mailbox("bob@local.example")
    client = await running.connect("submission")
    await client.ask("EHLO x")
    assert (await client.ask("AUTH PLAIN " + _plain("ann@local.example", "secret"))).startswith("538")
    assert (await client.ask("MAIL FROM:<ann@local.example>")).startswith("530")
    # What is sent with STARTTLS in one segment is dropped (CVE-2011-0411).
    assert (await client.ask(b"STARTTLS\r\nRSET\r\nMAIL FROM:<x@y.z>\r\n")).startswith("220")
    await client.start_tls()
    assert (await client.ask("MAIL FROM:<ann@local.example>")).startswith(("503", "530"))
    assert "AUTH" not in await client.ask("NOOP")
    await client.ask("EHLO x")
    assert (await client.ask("AUTH PLAIN " + _plain("ann@local.example", "wrong"))).startswith("535")
    assert (await client.ask("AUTH PLAIN " + _plain("ann@local.example", "secret", "bob@local.example"))).startswith("535")
    assert (await client.ask("AUTH PLAIN !!!")).startswith("501")
    assert (await client.ask("AUTH PLAIN " + _plain("ann@local.example", "secret"))).startswith("235")
    assert (await client.ask("AUTH PLAIN x")).startswith("503")
    assert (await client.ask("MAIL FROM:<bob@local.example>")).startswith("553 5.7.1")
    assert (await client.ask("MAIL FROM:<ann@local.example>")).startswith("250")
    assert (await client.ask("AUTH PLAIN x")).startswith("503")
    assert (await client.ask("RCPT TO:<bob@local.example>")).startswith("250")
    await client.ask("DATA")
    assert (await client.ask(b"From: Bob <bob@local.example>\r\n\r\nforged\r\n.\r\n")).startswith("553")
    await client.ask("MAIL FROM:<ann@local.example>")
    await client.ask("RCPT TO:<bob@local.example>")
    await client.ask("DATA")
    assert (await client.ask(b"From: Ann <ann@local.example>\r\n\r\nmine\r\n.\r\n")).startswith("250")
    client.close()
    assert len(await running.read("bob@local.example")) == 1


def _plain(name: str, password: str, acting: str = "") -> str:
    return base64.b64encode(f"{acting}\0{name}\0{password}".encode()).decode()


async def test_empty_and_forward_only_rows_admit_nobody(running: Running) -> None:
    await running.mailbox("empty@local.example", password="")
    await running.mailbox("fwd@local.example", forward=["a@b.example"])
    for name in ("empty@local.example", "fwd@local.example", "nobody@local.example"):
        client = await running.connect("pop3")
        assert isinstance(client, PopClient)
        await client.start_tls_pop()
        assert (await client.ask_pop(f"USER {name}")).startswith("+OK")
        assert await client.ask_pop("PASS secret") == "-ERR [AUTH] invalid user name or password"
        client.close()


async def test_a_client_that_dies_at_any_octet_leaves_all_or_nothing(running: Running) -> None:
    """S30, P4: the connection breaks behind each octet of a transaction."""
    await running.mailbox("ann@local.example")
    dialog = b"EHLO x\r\nMAIL FROM:<a@b.c>\r\nRCPT TO:<ann@local.example>\r\nDATA\r\nS: x\r\n\r\nbody\r\n.\r\n"
    for length in range(0, len(dialog) + 1, 3):
        client = await running.connect()
        client.send(dialog[:length])
        await client.writer.drain()
        client.close()
        await client.writer.wait_closed()
    acknowledged = 0
    for _ in range(2):
        client = await running.connect()
        client.send(dialog)
        replies = [await client.reply() for _ in range(5)]
        acknowledged += replies[-1].startswith("250 2.6.0")
        client.close()
    found = await running.read("ann@local.example")
    assert acknowledged == 2
    assert len(found) in (2, 3)
    assert set(found) == {b"S: x\r\n\r\nbody\r\n"}


async def test_connections_per_address_are_capped(running: Running) -> None:
    cap = running.powermail.settings.smtp.connections_per_address_max
    for _ in range(cap):
        await running.connect()
    reader, writer = await asyncio.open_connection("127.0.0.1", running.powermail.front.listening["smtp"])
    assert (await reader.readline()).startswith(b"421")
    writer.close()
