"""Senders who say one thing and do another, at every door that takes mail: each is answered once, and stays in step."""

from __future__ import annotations

import asyncio
import ssl

import pytest

from tests.system.conftest import Client, Running

SMALL = ("smtp.message_octets_max=100000",)
DOORS = ("smtp", "lmtp")


async def greeted(running: Running, door: str) -> Client:
    """A session that has said hello."""
    client = await running.connect(door)
    assert (await client.ask("LHLO x" if door == "lmtp" else "EHLO x")).startswith("250")
    return client


async def replies(client: Client, door: str, recipients: int) -> list[str]:
    """The replies to the end of a message; the session is in step then."""
    found = [await client.reply() for _ in range(recipients if door == "lmtp" else 1)]
    assert (await client.ask("NOOP")).startswith("250")
    return found


@pytest.mark.parametrize("running", [SMALL], indirect=True)
@pytest.mark.parametrize("door", DOORS)
async def test_a_message_beyond_the_limit_is_refused_whatever_size_it_said(running: Running, door: str) -> None:
    """S11: at MAIL if it says so, else at its end, with nothing kept."""
    for name in ("ann", "bob"):
        await running.mailbox(f"{name}@local.example")
    client = await greeted(running, door)
    assert (await client.ask("MAIL FROM:<a@b.cc> SIZE=100001")).startswith("552 5.3.4")
    line = b"x" * 998 + b"\r\n"
    for how in ("DATA", "BDAT", "chunks"):
        assert (await client.ask("MAIL FROM:<a@b.cc> SIZE=10")).startswith("250")
        for name in ("ann", "bob"):
            assert (await client.ask(f"RCPT TO:<{name}@local.example>")).startswith("250")
        if how == "DATA":
            assert (await client.ask("DATA")).startswith("354")
            client.send(line * 300 + b".\r\n")
        elif how == "BDAT":
            client.send(b"BDAT %d LAST\r\n" % (300 * len(line)) + line * 300)
        else:
            client.send((b"BDAT %d\r\n" % (90 * len(line)) + line * 90) * 2)
            assert (await client.reply()).startswith("250")
            assert (await client.reply()).startswith("552 5.3.4")  # it is over then: nothing waits for its end
            assert (await client.ask("NOOP")).startswith("250")
            continue
        assert all(reply.startswith("552 5.3.4") for reply in await replies(client, door, 2)), how
    assert await running.read("ann@local.example") == await running.read("bob@local.example") == []


@pytest.mark.parametrize("door", DOORS)
async def test_one_mailbox_gets_one_copy_however_often_it_is_named(running: Running, door: str) -> None:
    """S10: by itself, in other cases, with a tag, quoted, by a forward."""
    await running.mailbox("ann@local.example")
    await running.mailbox("alias@local.example", password="", forward=["ann@local.example"])
    client = await greeted(running, door)
    await client.ask("MAIL FROM:<a@b.cc>")
    names = ["ann", "ANN", "ann+tag", '"ann"', "alias", "Alias"] * 50
    client.send("\r\n".join(f"RCPT TO:<{name}@local.example>" for name in names))
    assert {(await client.reply())[:3] for _ in names} == {"250"}
    assert (await client.ask("DATA")).startswith("354")
    client.send(b"S: x\r\n\r\n.\r\n")
    assert {reply[:9] for reply in await replies(client, door, len(names))} == {"250 2.6.0"}
    assert len(await running.read("ann@local.example")) == 1


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("field", [b"Received: x\r\n", b"received : x\r\n", b"Received: x\n", b"RECEIVED:\r\n x\r\n"])
async def test_a_message_that_goes_round_is_refused_and_nobody_is_written_to(running: Running, door: str, field: bytes) -> None:
    """S26, S39: in the session, and no notice follows."""
    await running.mailbox("ann@local.example")
    client = await greeted(running, door)
    await client.ask("MAIL FROM:<ann@local.example>")
    for _ in range(2):
        await client.ask("RCPT TO:<ann@local.example>")
    await client.ask("DATA")
    client.send(field * 51 + b"\r\nx\r\n.\r\n")
    assert {reply[:9] for reply in await replies(client, door, 2)} == {"554 5.4.6"}
    assert await running.read("ann@local.example") == []


@pytest.mark.parametrize("name", ["x" * 63 + ".example", "xn--bcher-kva.test", "nobody.example"])
async def test_any_server_name_gets_the_certificate_we_have(running: Running, name: str) -> None:
    """T04."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for door in ("pop3s", "submissions"):
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port(door), ssl=context, server_hostname=name)
        assert (await reader.readline()).startswith((b"+OK", b"220"))
        writer.close()


async def test_an_account_sends_so_much_an_hour_and_is_told_for_now(running: Running) -> None:
    """U17, and its postmaster finds it in the counters."""
    from tests.system.submitting import submitter

    await running.mailbox("ann@local.example", send_per_hour=3)
    client = await submitter(running, "ann@local.example")
    await client.ask("MAIL FROM:<ann@local.example>")
    found = [(await client.ask("RCPT TO:<ann@local.example>"))[:9] for _ in range(5)]
    assert found == ["250 2.1.5"] * 3 + ["451 4.7.1"] * 2
    assert running.powermail.world.counters.get("submission.rate_limited") == 2
