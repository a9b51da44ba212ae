"""A stored message is opened by its key: by the maildrop, the bouncer, the sender and the operator."""

from __future__ import annotations

import asyncio
import random

import pytest

from powermail.base import limits
from powermail.base.errors import IndexTrouble, MessageUnreadable
from powermail.cluster.fetch import Fetcher
from powermail.mail.dsn import Action, Report
from powermail.mail.envelope import Envelope
from powermail.mailbox.maildrop import Maildrops
from powermail.message.opener import Opener
from powermail.outbound.bounce import Bouncer
from tests.cluster.support import virtual
from tests.delivery.support import ACCOUNT, Office

LONG = b"Subject: long\r\n\r\n" + random.Random(1).randbytes(2 * limits.CHUNK_OCTETS)
SHORT = b"Subject: short\r\n\r\ntext\r\n"


async def opened(*bodies: bytes) -> tuple[Office, Opener, list[bytes]]:
    """Messages that were delivered."""
    office = await Office().open()
    keys = []
    for body in bodies:
        message = await office.begin(body)
        assert await office.outcome(message) == "250"
        keys.append(message.key)
    return office, Opener(office.index, Fetcher(office.world, office.cluster, office.index.note_bad)), keys


@virtual
async def test_a_message_is_opened_by_its_key() -> None:
    _, opener, (key,) = await opened(LONG)
    message = await opener.open(key)
    assert message.facts is not None
    assert message.facts.nodes == ("a", "b")
    assert message.commit.targets[0].account == ACCOUNT.id
    parts = [part async for part in message.chunks()]
    assert b"".join(parts).endswith(LONG)
    assert await message.first() == parts[0]
    assert [part async for part in opener.read(key)] == parts


@virtual
async def test_a_key_that_is_not_known_is_read_where_it_is_found() -> None:
    office, opener, (key,) = await opened(SHORT)
    del office.index.state.keys[key]
    message = await opener.open(key)
    assert message.facts is None
    assert (await message.first()).endswith(SHORT)
    with pytest.raises(MessageUnreadable):
        await opener.open(b"?" * 16)


@virtual
async def test_small_ones_are_read_many_at_once_and_trouble_leaves_them_out() -> None:
    office, opener, keys = await opened(SHORT, SHORT, LONG)
    small = await opener.read_small(keys)
    assert set(small) == set(keys[:2])
    assert all(one.octets.endswith(SHORT) for one in small.values())

    async def away(_: object) -> list[object]:
        raise IndexTrouble("locked")

    office.index.messages = away  # type: ignore[assignment, method-assign]
    assert await opener.read_small(keys) == {}


@virtual
async def test_a_maildrop_reads_and_expunges() -> None:
    """POP3: one after the other read ahead, the long one in pieces; DELE at the end (P11)."""
    office, opener, keys = await opened(SHORT, LONG, SHORT)
    drops = Maildrops(office.index, opener, office.tasks)
    drop = await drops.open(ACCOUNT.id)
    await drop.load()
    listed = [drop.get(number) for number in (1, 2, 3)]
    assert [one.key for one in listed if one is not None] == keys
    first = await drop.whole(1)
    assert first is not None
    assert first.octets.endswith(SHORT)
    assert await drop.whole(2) is None
    parts = [part async for part in drop.read(keys[1])]
    assert b"".join(parts).endswith(LONG)
    drop.mark(2)
    assert await drop.update() == [keys[1]]
    drop.release()
    assert await office.listed() == [keys[0], keys[2]]
    assert await office.index.orders("a", 10) == [keys[1]]


@virtual
async def test_a_bounce_returns_the_header_or_goes_without() -> None:
    office, opener, (key,) = await opened(SHORT)
    sent: list[tuple[bytes, str]] = []

    async def submit(to: str, octets: bytes, work: str) -> bool:
        sent.append((octets, work))
        return True

    bouncer = Bouncer(office.world, opener, "here.example", submit)
    to = "x@there.example"
    envelope = Envelope("s@e.example")
    failures = [Report(to, "", Action.FAILED, "5.1.1", "smtp; 550", "mx")]
    assert await bouncer.tell(key, envelope, 1.5, failures)
    for node in office.nodes:
        node.miss()
    await asyncio.sleep(0)
    assert await bouncer.tell(key, envelope, 1.5, failures)
    assert await bouncer.tell(key, envelope, 1.5, [failures[0]._replace(recipient="y@there.example")])
    assert b"Subject: short" in sent[0][0]
    assert b"Subject: short" not in sent[1][0]
    assert sent[0][1] == sent[1][1] != sent[2][1], "what it is for is who is told what: nobody's failure is passed over"
