"""The port that everybody must reach cannot be made to take the machine's time: turns, waits, few handshakes at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from powermail.authority.pace import Pace
from powermail.base import limits
from powermail.base.clock import SystemClock
from powermail.base.errors import Trouble
from tests.authority.support import SOON_S, Office, office


class Still(SystemClock):
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.at = 1000.0

    def monotonic(self) -> float:
        return self.at


@pytest_asyncio.fixture
async def at(tmp_path: Path) -> AsyncIterator[Office]:
    """An authority that listens."""
    async with office(tmp_path) as made:
        yield made


def test_an_address_has_its_turns_and_others_have_theirs() -> None:
    clock = Still()
    pace, turn_s, burst = Pace(clock), limits.ENROLMENT_ADDRESS_TURN_S, limits.ENROLMENT_ADDRESS_BURST
    assert [pace.wait_s("192.0.2.1") for _ in range(burst + 1)] == [0.0] * (burst + 1)
    assert pace.wait_s("192.0.2.1") == pytest.approx(turn_s)
    assert pace.wait_s("192.0.2.1") == pytest.approx(2 * turn_s)
    assert pace.wait_s("192.0.2.2") == 0.0
    waits = [pace.wait_s("192.0.2.1") for _ in range(10)]
    assert waits[-1] is None and max(wait for wait in waits if wait is not None) <= limits.ENROLMENT_WAIT_MAX_S
    clock.at += 2 * turn_s
    assert pace.wait_s("192.0.2.1") is not None, "who was not heard has had no turn"
    clock.at += 3600.0
    assert pace.wait_s("192.0.2.1") == 0.0


def test_the_addresses_of_one_network_have_one_turn() -> None:
    """A host has all of its /64."""
    pace = Pace(Still())
    for number in range(limits.ENROLMENT_ADDRESS_BURST + 1):
        assert pace.wait_s(f"2001:db8::{number:x}") == 0.0
    assert pace.wait_s("2001:db8::ffff") != 0.0 and pace.wait_s("2001:db8:0:1::1") == 0.0


def test_all_together_have_turns_too_and_few_addresses_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ENROLMENT_TRACKED_MAX", 5)
    pace = Pace(Still())
    for number in range(limits.ENROLMENT_BURST + 1):
        assert pace.wait_s(f"192.0.2.{number}") == 0.0
    assert pace.wait_s("198.51.100.1") == pytest.approx(limits.ENROLMENT_TURN_S)
    assert len(pace._turns) == 5


async def test_who_comes_too_often_is_slowed_down_and_then_not_heard(at: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ENROLMENT_ADDRESS_BURST", 1)
    monkeypatch.setattr(limits, "ENROLMENT_ADDRESS_TURN_S", 0.25)
    monkeypatch.setattr(limits, "ENROLMENT_WAIT_MAX_S", 0.3)
    at._services[0]._pace = Pace(Still())
    token, machine = await at.invite(), at.machine()
    for number, slowed in enumerate((0, 0, 1)):
        await at.join(token, machine)
        assert at.world.counters.get("authority.slowed") == slowed, number
    assert not at.refused("rate")
    for _ in range(2):
        with pytest.raises(Trouble):
            await at.join(token, machine)
    assert at.refused("rate") == 2 and at.world.counters.get("authority.slowed") == 1
    assert len([line for line in at.log.lines if "why=rate" in line]) == 2


async def test_handshakes_that_get_nowhere_make_room_for_who_is_in_earnest(at: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ENROLMENT_HANDSHAKES_MAX", 2)
    hangs = []
    for number in range(3):
        reader, writer = await asyncio.open_connection("127.0.0.1", at.port)
        writer.write(bytes.fromhex("160301020001"))  # the beginning of a ClientHello
        hangs.append((reader, writer))
        async with asyncio.timeout(SOON_S):
            while len(at._services[0]._pace._hands) < min(2, number + 1):
                await asyncio.sleep(0.01)
    async with asyncio.timeout(SOON_S):
        assert await hangs[0][0].read() == b"", "the oldest was given up"
    assert at.refused("handshakes") == 1 and not at.refused("tls")
    joined = await at.join(await at.invite(), at.machine())
    assert joined.issued.identity == "front-1" and at.refused("handshakes") == 2
    for _, writer in hangs:
        writer.close()
