"""Power cuts inside a batch that was gathered of several deletions: no tombstone is left that hides what was lost (law 10).

A tombstone whose mark is lost with the power hides that the index lost the transaction that ordered it, unless recovery says
that the log is damaged: then belief is compared with the node, and a tombstone of a listed message is the proof (law 12).
"""

from __future__ import annotations

import asyncio

from powermail.sim.disk import Op, SimDisk, cuts
from powermail.storage.contract import Held
from tests.storage.asks import put
from tests.storage.rigs import LocalRig
from tests.storage.support import PATH, count, key, open_store

SECTOR = 16
MESSAGES = 12
ORDERED = {1: 5, 2: 5, 3: 5, 4: 6, 5: 6, 6: 6, 7: 6, 8: 7, 9: 7}  # message to the count that its deletion came with


async def deleted_at_once() -> tuple[SimDisk, list[Op]]:
    """A disk, and what was done to it while three deletions and a drop came at once."""
    rig = LocalRig(None)
    await rig.node.initialise()
    await rig.node.open()
    receipts = {number: await put(rig.node, number) for number in range(1, MESSAGES + 1)}
    disk = rig.disk.below
    disk.settle()
    base = disk.clone()
    await asyncio.gather(
        *(rig.node.delete([key(n) for n, at in ORDERED.items() if at == now], count(now), 0.0) for now in (5, 6, 7)),
        rig.node.drop([(key(MESSAGES), receipts[MESSAGES].position)], count(7)),
    )
    return base, list(disk.journal)


def test_no_power_cut_leaves_a_tombstone_without_its_mark_or_a_sign_of_damage() -> None:
    base, journal = asyncio.run(deleted_at_once())
    torn = 0
    for length in range(len(journal) + 1):
        for ops in cuts(journal, length, SECTOR):
            store = open_store(base.image(base, ops), path=PATH, boot=9)
            facts, held = store.facts(), store.reader.has([key(number) for number in ORDERED])
            seen = facts.mark.slots.get(1, ("", 0))[1]
            dead = [number for number, state in zip(ORDERED, held, strict=True) if state is Held.DEAD]
            unmarked = [number for number in dead if ORDERED[number] > seen]
            assert not unmarked or facts.damaged, f"after {length} operations: {unmarked} are dead, the mark is {seen}"
            torn += 0 < len(dead) < len(ORDERED)
    assert torn  # some cuts fell between them
