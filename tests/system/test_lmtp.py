"""LMTP against a whole PowerMail: each recipient has a reply of its own (RFC 2033 §4.2)."""

from __future__ import annotations

from itertools import permutations

import pytest

from tests.system.conftest import Client, Running

BODY = b"S: x\r\n\r\n" + b"y" * 5000 + b"\r\n"
SMALL = 3000


async def rooms(running: Running) -> None:
    """Ann has no quota, bob and dan have too little for BODY."""
    await running.mailbox("ann@local.example")
    await running.mailbox("bob@local.example", quota_octets=SMALL)
    await running.mailbox("dan@local.example", quota_octets=SMALL)


async def deliver(client: Client, names: tuple[str, ...], how: str, octets: bytes = BODY) -> list[str]:
    """The replies to the end of a message to those."""
    size = f" SIZE={len(octets)}" if "size" in how else ""
    await client.ask(f"MAIL FROM:<a@b.cc>{size}")
    for name in names:
        assert (await client.ask(f"RCPT TO:<{name}@local.example>")).startswith("250")
    if "bdat" in how:
        assert (await client.ask(b"BDAT 3\r\n" + octets[:3])).startswith("250")
        client.send(b"BDAT %d LAST\r\n" % (len(octets) - 3) + octets[3:])
    else:
        assert (await client.ask("DATA")).startswith("354")
        client.send(octets + b".\r\n")
    replies = [await client.reply() for _ in names]
    assert (await client.ask("NOOP")).startswith("250"), "no reply too many"
    return replies


@pytest.mark.parametrize("how", ["", "size", "bdat", "bdat size"])
async def test_who_is_over_quota_is_told_so_and_the_others_get_it(running: Running, how: str) -> None:
    await rooms(running)
    client = await running.connect("lmtp")
    await client.ask("LHLO x")
    orders = list(permutations(("ann", "bob", "dan")))
    for order in orders:
        for name, reply in zip(order, await deliver(client, order, how), strict=True):
            assert reply.startswith("250 2.6.0" if name == "ann" else "552 5.2.2"), (order, reply)
    assert len(await running.entries("ann@local.example")) == len(orders)
    assert await running.read("bob@local.example") == await running.read("dan@local.example") == []
    assert len(running.lines("recipient-refused")) == 2 * len(orders)
    assert len(running.lines("delivered")) == len(orders)


async def test_who_has_room_for_this_one_gets_it_and_the_same_twice_is_told_twice(running: Running) -> None:
    await rooms(running)
    client = await running.connect("lmtp")
    await client.ask("LHLO x")
    little = b"S: x\r\n\r\n" + b"z" * 1000 + b"\r\n"
    assert [reply[:3] for reply in await deliver(client, ("bob", "bob", "ann"), "", little)] == ["250"] * 3
    assert [reply[:3] for reply in await deliver(client, ("bob", "ann", "bob"), "", little * 2)] == ["552", "250", "552"]
    assert [reply[:3] for reply in await deliver(client, ("dan", "ann", "bob"), "", little * 2)] == ["250", "250", "552"]
    assert len(await running.read("bob@local.example")) == 1
    assert len(await running.read("dan@local.example")) == 1


@pytest.mark.parametrize("how", ["", "bdat"])
async def test_a_message_that_fits_nobody_is_refused_for_each_and_the_session_goes_on(running: Running, how: str) -> None:
    await rooms(running)
    client = await running.connect("lmtp")
    await client.ask("LHLO x")
    assert [reply[:9] for reply in await deliver(client, ("bob", "dan"), how)] == ["552 5.2.2"] * 2
    assert [reply[:3] for reply in await deliver(client, ("ann",), how)] == ["250"]


async def test_over_smtp_a_message_that_fits_one_is_for_all(running: Running) -> None:
    """There is one reply: the original's rule."""
    await rooms(running)
    for order in permutations(("ann", "bob")):
        assert (await running.send([f"{name}@local.example" for name in order], BODY)).startswith("250")
    assert (await running.send(["bob@local.example", "dan@local.example"], BODY)).startswith("552 5.2.2")
