"""One message behind the other in one write (RFC 2920 §3.1), at a hop that takes that well, badly, or as an occasion.

Each line of `CASES` is what a hop does once, at the first message of several on its only connection: what becomes of the first
and of the second at their first attempt (S, R, L as in `test_hop_table`), and how many sessions that took. No attempt of the
second is counted, and in the end each arrives, once.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import pytest

from powermail.base import limits
from powermail.base.net import SocketNetwork
from powermail.base.settings import OutboundSettings
from tests.cluster.support import virtual
from tests.outbound.hop import ScriptedHop
from tests.outbound.rig import Rig


class Case(NamedTuple):
    """One behaviour."""

    name: str
    script: dict[str, str]
    fates: str
    sessions: int
    twice: bool = False  # the first: what the hop says behind it leaves in doubt what was said to it


CASES = [
    Case("takes everything", {}, "SS", 1),
    Case("takes its time", {"END": "SLEEP 0.5|NEXT"}, "SS", 1),
    Case("takes more time than a message waits behind another", {"END": "SLEEP 5|NEXT"}, "SS", 2),
    Case("ends twice", {"END": "NEXT|250 taken"}, "SS", 2),
    Case("ends three times", {"END": "NEXT|250 taken|250 taken"}, "SS", 2),
    Case("ends once for each, as LMTP does", {"END": "NEXT|550 5.2.2 full"}, "SS", 2),
    Case("ends, and defers somebody", {"END": "NEXT|451 4.3.0 later"}, "SS", 2),
    Case("ends with an invitation", {"END": "NEXT|354 go"}, "LS", 2, twice=True),
    Case("ends and mutters", {"END": "NEXT|RAW 25"}, "SS", 2),
    Case("ends and talks nonsense", {"END": "NEXT|hello"}, "SS", 2),
    Case("ends and says 421", {"END": "NEXT|421 enough|CLOSE"}, "SS", 2),
    Case("ends and says 421 and stays", {"END": "NEXT|421 enough"}, "SS", 2),
    Case("ends and closes", {"END": "NEXT|CLOSE"}, "SS", 2),
    Case("ends and resets", {"END": "NEXT|SLEEP 0.1|RESET"}, "SS", 2),
    Case("ends and hears no more", {"END": "NEXT|DEAF"}, "SS", 2),
    Case("refuses one", {"END": "554 5.6.0 spam"}, "RS", 1),
    Case("refuses one and closes", {"END": "554 5.6.0 spam|CLOSE"}, "RS", 2),
    Case("refuses one and says 421", {"END": "554 5.6.0 spam|421 enough|CLOSE"}, "RS", 2),
    Case("refuses one twice", {"END": "554 5.6.0 spam|554 5.6.0 spam"}, "LS", 2),
    Case("refuses one, then takes it", {"END": "554 5.6.0 spam|250 taken"}, "LS", 2),
    Case("defers one", {"END": "451 4.3.0 later"}, "LS", 1),
    Case("says 421 to one", {"END": "421 4.3.0 bye|CLOSE"}, "LS", 2),
    Case("closes at the end of one", {"END": "CLOSE"}, "LS", 2),
    Case("does not say what became of one", {"END": "SILENT"}, "LS", 2),
    Case("calls it improper", {"END": "503 5.5.0 improper use of pipelining"}, "LS", 1),
    Case("refuses the next recipient for the sender", {"END": "NEXT", "RCPT two": "553 5.7.1 not from you"}, "SR", 1),
    Case("refuses the next recipient", {"END": "NEXT", "RCPT two": "550 5.1.1 no such"}, "SR", 1),
    Case("refuses the next recipient and closes", {"END": "NEXT", "RCPT two": "550 5.1.1 no such|CLOSE"}, "SR", 1),
    Case("refuses one and the next recipient", {"END": "554 spam", "RCPT two": "550 5.1.1 no such"}, "RS", 2),
    Case("defers the next recipient", {"END": "NEXT", "RCPT two": "450 4.2.1 later"}, "SL", 1),
    Case("begins although nobody is there to begin for", {"RCPT two": "550 no|354 go"}, "SS", 2),
    Case("says nothing to the next recipient", {"RCPT two": "SILENT"}, "SS", 2),
]


async def push(rig: Rig) -> None:
    """Works until nothing is due or in hand."""
    while await rig.outbound.step() == 0.0 or rig.outbound._in_hand:
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_whatever_a_hop_does_between_two_messages(case: Case) -> None:
    run(case)


@virtual
async def run(case: Case) -> None:
    hop = ScriptedHop({"DATA": "SLEEP 0.2|NEXT", **case.script})
    hop.once = True
    rig = await Rig.open(hop, OutboundSettings(concurrency=1))
    for name in ("one", "two"):
        await rig.queue(name)
        assert await rig.outbound.step() == 0.0
        await asyncio.sleep(0.05)
    await push(rig)
    rows, refused = await rig.rows(), await rig.refused()
    found = "".join("L" if name in rows else "R" if name in refused else "S" for name in ("one", "two"))
    assert found == case.fates
    assert all(row.attempts == 1 for row in rows.values())
    assert len(hop.sessions) == case.sessions

    hop.script = {}
    await rig.queue("next")
    await push(rig)
    await rig.office.index.queue_set([], None, rig.office.world.clock.now())
    await push(rig)
    assert await rig.rows() == {}
    taken = hop.recipients()
    for name, fate in zip(("one", "two"), case.fates, strict=True):
        assert taken.count(name) == (0 if fate == "R" else 2 if case.twice and name == "one" else 1), f"{name}: {taken}"
    assert taken.count("next") == 1
    await rig.close()


async def test_a_message_costs_one_write_where_others_wait() -> None:
    rig = await Rig.open(settings=OutboundSettings(concurrency=1), net=SocketNetwork())
    for number in range(5):
        await rig.queue(f"to{number}")
    await push(rig)
    (session,) = rig.hop.sessions
    assert sorted(rig.hop.recipients()) == [f"to{number}" for number in range(5)]
    assert session.reads == 1 + 1 + 5, "EHLO, the first envelope, and each message with the next one's"
    await rig.close()


@virtual
async def test_who_began_behind_a_slow_one_waits_no_longer_than_a_moment() -> None:
    rig = await Rig.open(ScriptedHop({"END": "SLEEP 40|NEXT"}), OutboundSettings(concurrency=2))
    rig.hop.once = True
    for number in range(6):
        await rig.queue(f"to{number}")
    began = asyncio.get_running_loop().time()
    task = asyncio.get_running_loop().create_task(push(rig))
    while len(rig.hop.recipients()) < 5:
        await asyncio.sleep(0.1)
    assert asyncio.get_running_loop().time() - began < 3 * limits.SMTP_CLIENT_AHEAD_S + 1
    await task
    assert sorted(rig.hop.recipients()) == [f"to{number}" for number in range(6)]
    await rig.close()


@pytest.mark.parametrize("moment", ["DATA", "END"])
@virtual
async def test_a_stop_forgets_nobody_who_had_begun_behind_another(moment: str) -> None:
    rig = await Rig.open(ScriptedHop({moment: "SLEEP 0.5|NEXT"}), OutboundSettings(concurrency=1))
    for number in range(3):
        await rig.queue(f"to{number}")
    assert await rig.outbound.step() == 0.0
    await asyncio.sleep(0.3)
    await rig.outbound.stop()
    rig.start()
    rig.hop.script = {}
    await push(rig)
    assert sorted(rig.hop.recipients()) == ["to0", "to1", "to2"]
    assert await rig.rows() == {}
    await rig.close()
