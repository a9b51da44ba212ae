"""What every front door promises: replies to who only listens, PROXY, bodies at any pace, sizes as they are."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time

import pytest

from powermail.base import limits
from tests.system.conftest import Client, PopClient, Running, without_trace

LOOPBACK = '["127.0.0.0/8"]'
PROXIED = (f"smtp.proxy_from={LOOPBACK}", f"pop.proxy_from={LOOPBACK}")


async def half_closed(port: int, octets: bytes) -> bytes:
    """What is answered to a client that says all it has to say, and shuts its writing side."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    greeting = await reader.readline()
    writer.write(octets)
    writer.write_eof()
    async with asyncio.timeout(20):
        rest = await reader.read()
    writer.close()
    return greeting + rest


async def test_what_the_tests_hear_is_the_first_refusal_of_a_message(running: Running) -> None:
    await running.mailbox("ann@local.example")
    assert (await running.send(["ann@local.example"], b"x", "a b@c.example")).startswith("501 5.1.7"), "to MAIL"
    assert (await running.send(["ann@local.example", "no@local.example"], b"x")).startswith("550 5.1.1"), "to RCPT"
    assert (await running.send([], b"x")).startswith("503 5.5.1"), "to DATA"
    assert (await running.send(["ann@local.example"], b"S: x\r\n\r\nx")).startswith("250"), "to none"


async def test_a_half_closed_client_gets_its_replies(running: Running) -> None:
    await running.mailbox("ann@local.example")
    said = await half_closed(
        running.port("smtp"),
        b"EHLO x\r\nMAIL FROM:<a@b.cc>\r\nRCPT TO:<ann@local.example>\r\nDATA\r\nS: x\r\n\r\n.\r\nQUIT\r\n",
    )
    assert b"\r\n250 2.6.0 " in said
    assert said.rstrip().rpartition(b"\r\n")[2].startswith(b"221")
    unfinished = await half_closed(running.port("smtp"), b"EHLO x\r\nMAIL FROM:<a@b.cc>\r\nNO")
    assert unfinished.rstrip().rpartition(b"\r\n")[2].startswith(b"250")
    assert len(await running.read("ann@local.example")) == 1


@pytest.mark.parametrize("running", [("pop.plaintext_login=true",)], indirect=True)
async def test_a_half_closed_pop3_client_gets_what_it_deletes(running: Running) -> None:
    await running.mailbox("ann@local.example")
    await running.send(["ann@local.example"], b"S: x\r\n\r\n" + b"y" * 100_000)
    said = await half_closed(running.port("pop3"), b"USER ann@local.example\r\nPASS secret\r\nRETR 1\r\nDELE 1\r\nQUIT\r\n")
    assert said.count(b"y") > 100_000
    assert said.endswith(b"+OK bye\r\n")
    assert await running.read("ann@local.example") == []


async def test_pop3_deletes_nothing_for_a_client_that_is_gone(running: Running) -> None:
    await running.mailbox("ann@local.example")
    await running.send(["ann@local.example"], b"S: x\r\n\r\n" + b"y" * 3_000_000)
    client = await running.log_in("ann@local.example")
    client.send(b"RETR 1\r\nDELE 1\r\nQUIT\r\n")
    await client.line()
    client.writer.transport.abort()
    await running.until("the session is over", lambda status: not status["connections"]["popd"])
    assert len(await running.entries()) == 1


def _context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


HEADER = b"PROXY TCP6 ::ffff:203.0.113.7 ::1 4711 465\r\n"


@pytest.mark.parametrize("running", [PROXIED], indirect=True)
@pytest.mark.parametrize("door", ["submissions", "pop3s"])
@pytest.mark.parametrize("together", [False, True])
async def test_a_proxy_header_outside_tls(running: Running, door: str, together: bool) -> None:
    """As balancers send it that pass TLS through; the handshake may be in the same segment."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = _context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port(door))
    greeting, shaken = b"", False
    writer.write(HEADER if not together else b"")
    prefix = HEADER if together else b""
    async with asyncio.timeout(20):
        while not greeting.endswith(b"\r\n"):
            try:
                if not shaken:
                    tls.do_handshake()
                    shaken = True
                greeting += tls.read(1000)
            except ssl.SSLWantReadError:
                writer.write(prefix + outgoing.read())
                prefix = b""
                octets = await reader.read(65536)
                assert octets, "the server has closed"
                incoming.write(octets)
    assert greeting.startswith((b"220 ", b"+OK "))
    [connection] = [each for front in running.powermail.front.doors for each in front._open]
    assert connection.client == "203.0.113.7", "one form for an address that was mapped"
    writer.close()


@pytest.mark.parametrize("running", [PROXIED], indirect=True)
@pytest.mark.parametrize("door", ["submissions", "pop3s"])
async def test_a_proxy_header_inside_tls(running: Running, door: str) -> None:
    """As balancers send it that end TLS and begin their own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port(door), ssl=_context())
    writer.write(HEADER)
    assert (await reader.readline()).startswith((b"220 ", b"+OK "))
    [connection] = [each for front in running.powermail.front.doors for each in front._open]
    assert (connection.client, connection.port) == ("203.0.113.7", 4711)
    writer.close()


ELSEWHERE = ('smtp.proxy_from=["192.0.2.0/24"]', 'pop.proxy_from=["192.0.2.0/24"]')


@pytest.mark.parametrize("running", [ELSEWHERE], indirect=True)
@pytest.mark.parametrize("door", ["submissions", "pop3s"])
async def test_who_is_no_balancer_reaches_the_tls_ports_as_ever(running: Running, door: str) -> None:
    for _ in range(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port(door), ssl=_context())
        assert (await reader.readline()).startswith((b"220 ", b"+OK "))
        writer.close()
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port(door))
    writer.write(HEADER)
    async with asyncio.timeout(20):
        assert b"+OK" not in await reader.read(), "no word of a header is believed"
    writer.close()


@pytest.mark.parametrize("running", [PROXIED], indirect=True)
@pytest.mark.parametrize("octets", [b"EHLO x\r\n", b"PROXY TCP4 a b 1 2\r\n", b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff"])
async def test_a_listed_balancer_without_a_good_header_is_closed(running: Running, octets: bytes) -> None:
    for door, context in (("smtp", None), ("submissions", None), ("pop3", None), ("pop3s", _context())):
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port(door), ssl=context)
        writer.write(octets)
        async with asyncio.timeout(20):
            assert await reader.read() == b"", door
        writer.close()


@pytest.mark.parametrize("running", [PROXIED], indirect=True)
async def test_received_names_an_ipv6_client_as_a_literal(running: Running) -> None:
    """RFC 5321 §4.1.3."""
    await running.mailbox("ann@local.example")
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port("smtp"))
    writer.write(b"PROXY TCP6 2001:db8::7 ::1 4711 25\r\n")
    client = Client(reader, writer)
    running.clients.append(client)
    assert (await client.reply()).startswith("220")
    for line in ("EHLO [IPv6:2001:db8::7]", "MAIL FROM:<a@b.cc>", "RCPT TO:<ann@local.example>", "DATA"):
        await client.ask(line)
    assert (await client.ask(b"x\r\n.\r\n")).startswith("250")
    key = (await running.entries())[0].key
    octets = b"".join([part async for part in running.powermail.core.opener.read(key)])
    assert b"Received: from ?IPv6:2001:db8::7? " not in octets
    assert b" ([IPv6:2001:db8::7])\r\n" in octets
    assert without_trace(octets) == b"x\r\n"


@pytest.mark.parametrize("kind", ["", " BODY=8BITMIME", " BODY=BINARYMIME"])
async def test_list_says_what_retr_sends(running: Running, kind: str) -> None:
    """Also for messages that came with bare LF, or without an end of the last line, small or not, in text or in binary."""
    await running.mailbox("ann@local.example")
    bodies = [
        b"S: x\r\n\r\nplain\r\n",
        b"S: x\n\nbare\nlf\n",
        b"S: x\r\n\r\nno end",
        b"S: x\r\n\r\nmixed\n\r\nlf\r",
        b"a\n.\n..\n",
        b"S: x\n\n\0nul\0\n\r\r\n\n\r",
        b"\n",
        b"\r",
        b"S: x\n\n" + b"y" * 5000 + b"\n.\n" + b"z" * 200_000,
        b"S: x\r\n\r\n" + b"a\nb\rc\0\n" * 60_000,
    ]
    client = await running.connect()
    await client.ask("EHLO x")
    for body in bodies:
        await client.ask(f"MAIL FROM:<a@b.cc>{kind}")
        await client.ask("RCPT TO:<ann@local.example>")
        half = len(body) // 2
        client.send(b"BDAT %d\r\n%sBDAT %d LAST\r\n%s" % (half, body[:half], len(body) - half, body[half:]))
        await client.reply()
        assert (await client.reply()).startswith("250 2.6.0")
    pop = await running.log_in("ann@local.example")
    await pop.ask_pop("LIST")
    sizes = [int(line.split()[1]) for line in (await pop.multiline()).splitlines()]
    for number, size in enumerate(sizes, 1):
        assert await pop.ask_pop(f"RETR {number}") == f"+OK {size} octets"
        whole = await pop.multiline()
        assert len(whole) == size
        assert (await pop.ask_pop(f"TOP {number} 999999999")).startswith("+OK")
        assert await pop.multiline() == whole
        assert await pop.ask_pop(f"LIST {number}") == f"+OK {number} {size}"
    assert len(sizes) == len(bodies)
    assert await pop.ask_pop("STAT") == f"+OK {len(sizes)} {sum(sizes)}"


async def test_top_of_a_large_message_is_linear_and_holds_nobody_up(running: Running) -> None:
    """A `TOP 1 999999999` of 12 MB took 18 s, in which nobody else was served."""
    await running.mailbox("ann@local.example")
    await running.mailbox("bob@local.example")
    body = b"S: x\r\n\r\n" + b"line of some length\r\n" * 600_000
    assert (await running.send(["ann@local.example"], body[:-2])).startswith("250")
    client = await running.log_in("ann@local.example")
    for asked, lines in (("999999999", 600_000), ("300000", 300_000), ("0", 0)):
        began = time.process_time()
        client.send(f"TOP 1 {asked}")
        top = asyncio.create_task(_multiline(client))
        assert (await running.send(["bob@local.example"], b"S: quick\r\n\r\n")).startswith("250")
        assert (await top).count(b"line of some length\r\n") == lines
        assert time.process_time() - began < 5.0


async def _multiline(client: PopClient) -> bytes:
    assert (await client.line()).startswith("+OK")
    return await client.multiline()


async def test_a_slow_but_steady_body_keeps_its_five_minutes_under_load(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    await running.mailbox("ann@local.example")
    door = running.powermail.front.doors[0]
    monkeypatch.setattr(door, "_max", 1)
    client = await running.connect()
    [connection] = door._open

    async def left_s(wanted: range) -> None:
        """Waits until the client has so long to say something."""
        async with asyncio.timeout(20):
            while not wanted.start <= connection.deadline - door.monotonic() <= wanted.stop:
                await asyncio.sleep(0.01)

    idle, steady = range(int(limits.SMTP_STRESS_TIMEOUT_S)), range(290, 301)
    for line in ("EHLO x", "MAIL FROM:<a@b.cc>", "RCPT TO:<ann@local.example>"):
        await client.ask(line)
        await left_s(idle)
    await client.ask("DATA")
    client.send(b"slow\r\n")
    await left_s(steady)
    assert (await client.ask(b".\r\n")).startswith("250")
    await left_s(idle)


async def test_nothing_is_left_listening_on_a_socket_that_was_half_closed(running: Running) -> None:
    """A client that shuts its side and never reads is dropped when its session ends."""
    door = running.powermail.front.doors[0]
    with socket.create_connection(("127.0.0.1", running.port("smtp"))) as client:
        client.shutdown(socket.SHUT_WR)
        await running.until("no session is left", lambda status: not door.connections)
