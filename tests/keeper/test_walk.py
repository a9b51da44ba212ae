"""The walk of a node (law 11): where it goes on, when it begins anew, and what of it counts."""

from __future__ import annotations

import pytest

from powermail.base import limits
from powermail.base.errors import NodeTrouble
from powermail.index.contract import Fate
from powermail.keeper.walk import Walker
from powermail.storage.contract import Held, Item, Origin
from tests.keeper.rig import Rig, go

PAGE = 2


class Asked:
    """A walk of node a: behind which keys pages were asked for, and how many rounds began."""

    def __init__(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(limits, "RECONCILE_BATCH", PAGE)
        self.rig, self.node, self.walker = rig, rig.nodes["a"], Walker(rig.world, rig.index)
        self.pages: list[bytes] = []
        self.rounds = 0
        self.fails_at = 0  # the how-manieth page is not given
        inventory, raise_round = self.node.inventory, rig.index.raise_round

        async def asked(after: bytes, limit: int) -> list[Item]:
            self.pages.append(after)
            if len(self.pages) == self.fails_at:
                self.fails_at = 0
                raise NodeTrouble("a read failed")
            return await inventory(after, limit)

        async def rounds() -> int:
            self.rounds += 1
            return await raise_round()

        self.node.inventory, rig.index.raise_round = asked, rounds  # type: ignore[method-assign]

    async def walk(self) -> bool:
        return await self.walker.walk(self.node, await self.rig.row("a"), await self.node.facts())


async def orphans(rig: Rig, count: int) -> list[bytes]:
    """Acknowledged once, and unknown to the index that was put back."""
    keys = [rig.key() for _ in range(count)]
    for key in keys:
        await rig.put("a", key)
    return keys


def test_a_walk_goes_on_where_trouble_stopped_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(rig: Rig) -> None:
        keys, asked = await orphans(rig, 5), Asked(rig, monkeypatch)
        asked.fails_at = 3
        with pytest.raises(NodeTrouble):
            await asked.walk()
        assert asked.pages == [b"", keys[1], keys[3]]
        assert await asked.walk()
        assert asked.pages[3:] == [keys[3], keys[4]] and asked.rounds == 1
        assert await rig.listed() == keys
        asked.pages.clear()
        assert await asked.walk() and asked.pages[0] == b"" and asked.rounds == 2, "the next one is another walk"

    go(body)


@pytest.mark.parametrize("changed", ["epoch", "disk"])
def test_a_walk_begins_anew_where_the_epoch_or_the_disk_is_another(monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    """What was compared in an epoch that is lost, or on a disk that is gone, says nothing."""

    async def body(rig: Rig) -> None:
        keys, asked = await orphans(rig, 5), Asked(rig, monkeypatch)
        asked.fails_at = 3
        with pytest.raises(NodeTrouble):
            await asked.walk()
        if changed == "epoch":
            await rig.epochs.raise_epoch("an older index was put back")
            await rig.index.begin_epoch(rig.index.epoch)
        else:
            await rig.nodes["a"].close()
            await rig.nodes["a"].initialise()
            await rig.watch()
            keys = await orphans(rig, 3)
        asked.pages.clear()
        assert await asked.walk()
        assert asked.pages[0] == b"" and asked.rounds == 2
        assert [await rig.fate(key) for key in keys] == [Fate.LIVE] * len(keys)
        assert (await rig.row("a")).watermark == (await rig.nodes["a"].facts()).end

    go(body)


def test_a_tombstone_that_is_walked_over_ends_a_live_message_and_one_without_a_row() -> None:
    async def body(rig: Rig) -> None:
        live, gone = await rig.deliver("ab"), rig.key()
        await rig.nodes["a"].delete([live, gone], rig.index.mark(), rig.world.clock.now())
        walker = Walker(rig.world, rig.index)
        assert await walker.walk(rig.nodes["a"], await rig.row("a"), await rig.nodes["a"].facts())
        assert [await rig.fate(key) for key in (live, gone)] == [Fate.DEAD, Fate.DEAD]
        assert await rig.listed() == []
        await rig.collector.step(rig.nodes["b"])
        assert await rig.held("b", live) is Held.DEAD

    go(body)


def test_copies_that_repair_made_are_entered_by_a_walk_as_well() -> None:
    """Law 11: the row of the message is what was lost."""

    async def body(rig: Rig) -> None:
        key = rig.key()
        await rig.put("a", key, Origin.REPAIR)
        walker = Walker(rig.world, rig.index)
        assert await walker.walk(rig.nodes["a"], await rig.row("a"), await rig.nodes["a"].facts())
        assert await rig.listed() == [key] and await rig.believed(key) == ("a",)

    go(body)
