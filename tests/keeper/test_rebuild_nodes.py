"""A rebuild from nodes that are away, old, damaged or expelled, and the file it leaves (laws 7, 11, 12, 13, 14)."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from powermail.base.disk import File, SystemDisk
from powermail.base.errors import IndexTrouble, NodeTrouble, NotRedundant, OperatorError
from powermail.base.sqlite_files import SUFFIXES
from powermail.index.contract import Delivery, Fate, Outcome
from powermail.storage.contract import Mark, Origin, Position, Stamp
from tests.index.support import inbox, key
from tests.keeper.installation import Installation, numbers, shown


@pytest_asyncio.fixture(params=["memory", "sqlite"])
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Installation]:
    """An installation that runs, on either index."""
    installation = Installation(tmp_path, sqlite=request.param == "sqlite")
    await installation.start()
    yield installation
    await installation.stop()


# -- nodes ------------------------------------------------------------------------------------------------------------------


async def test_rebuild_without_a_node_names_what_is_missing(place: Installation) -> None:
    await place.deliver(1, nodes=("a", "b"))
    await place.deliver(2, nodes=("b", "c"))
    await place.deliver(3, nodes=("c", "a"))
    await place.deliver(4, nodes=("c",))
    await place.checkpoint()
    uid = (await numbers(place))[4]
    place.nodes["c"].miss()
    with pytest.raises(OperatorError, match="--without c"):
        await place.rebuilder().run()
    assert not place.path.exists()
    done = await place.rebuild(without=["c"])
    assert await shown(place.index) == [1, 2, 3]
    assert done.entries_lost == 1
    assert done.lost[0] == ("ann", "INBOX", uid, key(4).hex())
    assert len(done.left_out) == 1 and "node c" in done.left_out[0]


async def test_a_node_that_was_left_out_brings_nothing_back_when_it_returns(place: Installation) -> None:
    """Others know that it is dead; the node that returns does not, and nobody forgets it before."""
    await place.deliver(1, nodes=("b", "c"))
    await place.deliver(2, nodes=("b", "c"))
    await place.expunge(1)
    await place.nodes["b"].delete(await place.index.orders("b", 10), place.index.mark(), place.clock.wall)
    place.nodes["c"].miss()
    await place.rebuild(without=["c"])
    number = await place.index.raise_round()
    assert number
    assert await place.index.forget(100) == 0
    assert await place.index.fates([key(1)]) == {key(1): Fate.DEAD}
    assert await place.index.orders("c", 10) == [key(1)]
    rows = {row.id: row for row in await place.index.node_rows()}
    assert rows["c"].missing_since and not rows["c"].incarnation


async def test_a_node_that_was_expelled_is_not_read(place: Installation) -> None:
    await place.deliver(1)
    incarnation = (await place.nodes["c"].facts()).incarnation
    await place.nodes["a"].put_mark(Mark(retired=(incarnation,)))
    with pytest.raises(OperatorError, match="was expelled"):
        await place.rebuilder().run()


async def test_logs_are_settled_to_the_end_they_had(place: Installation) -> None:
    """A receipt that lies behind it was decided: a delivery that comes late enters nothing twice (law 7)."""
    late = await place.store(1)
    await place.rebuild()
    rows = {row.id: row for row in await place.index.node_rows()}
    for name, node in place.nodes.items():
        facts = await node.facts()
        assert rows[name].incarnation == facts.incarnation
        assert rows[name].boot == facts.boots[-1]
        assert not rows[name].owes_walk
    assert all(receipt.position < rows[receipt.node].watermark for receipt in late.receipts)
    assert await place.index.deliver(late) is Outcome.KNOWN
    gone = Delivery(key(9), late.commit, late.receipts)
    assert await place.index.deliver(gone) is Outcome.SETTLED
    assert await shown(place.index) == [1]


async def test_copies_are_believed_where_they_lie(place: Installation) -> None:
    await place.deliver(1, nodes=("a", "c"))
    await place.rebuild()
    facts = await place.index.message(key(1))
    assert facts is not None and sorted(facts.nodes) == ["a", "c"]


async def test_what_only_an_older_disk_holds_is_not_entered(place: Installation) -> None:
    await place.deliver(1)
    await place.deliver(2)
    await place.checkpoint()
    await place.store(3, nodes=("a",))
    await place.nodes["a"].rebirth()
    done = await place.rebuild()
    assert await shown(place.index) == [1, 2]
    assert done.passed_over == 1


async def test_unreadable_commit_records_are_named(place: Installation) -> None:
    await place.deliver(1)
    await place.deliver(2)
    await place.checkpoint()
    for node in place.nodes.values():
        node.damage(key(1))
    done = await place.rebuild()
    assert done.unreadable == 1
    assert done.unreadable_keys == (key(1).hex(),)
    assert [entry.key for entry in done.lost] == [key(1).hex()]
    assert await shown(place.index) == [2]


async def test_one_bad_copy_hides_nothing(place: Installation) -> None:
    await place.deliver(1)
    place.nodes["a"].damage(key(1))
    done = await place.rebuild()
    assert done.unreadable == 0
    assert await shown(place.index) == [1]


# -- the file ---------------------------------------------------------------------------------------------------------------


async def test_a_rebuild_killed_midway_is_never_served(place: Installation) -> None:
    for number in range(1, 6):
        await place.deliver(number)
    await place.checkpoint()
    for call in ("facts", "checkpoints", "inventory", "read_commit", "put_mark"):
        for node in place.nodes.values():
            node.fail_next(call, times=1)
        with pytest.raises((OperatorError, NodeTrouble, NotRedundant)):
            await place.rebuilder().run()
        for node in place.nodes.values():
            node._planned.clear()
        assert not place.path.exists()
    assert place.path.with_name("index.db.building").exists()
    await place.rebuild()
    assert await shown(place.index) == [1, 2, 3, 4, 5]
    assert not place.path.with_name("index.db.building").exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
async def test_nothing_that_is_there_is_overwritten(place: Installation, suffix: str) -> None:
    there = place.path.with_name(place.path.name + suffix)
    there.write_bytes(b"of another index")
    with pytest.raises(OperatorError, match="move it away"):
        await place.rebuilder().run()
    assert there.read_bytes() == b"of another index"
    there.unlink()


class NotingDisk(SystemDisk):
    """Tells what makes a file durable, and when."""

    def __init__(self) -> None:
        self.did: list[tuple[str, ...]] = []

    def open(self, path: str, create: bool = False, exclusive: bool = False) -> File:
        return NotingFile(super().open(path, create, exclusive), path, self.did)

    def rename(self, old: str, new: str) -> None:
        self.did.append(("rename", old, new))
        super().rename(old, new)

    def sync_directory(self, path: str) -> None:
        self.did.append(("sync_directory", path))
        super().sync_directory(path)


class NotingFile:
    """One file of it, as far as a rebuild uses it."""

    def __init__(self, file: File, path: str, did: list[tuple[str, ...]]) -> None:
        self._file, self._path, self._did = file, path, did

    def sync(self) -> None:
        self._did.append(("sync", self._path))
        self._file.sync()

    def close(self) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


async def test_the_name_is_given_after_the_file_is_durable(place: Installation) -> None:
    await place.deliver(1)
    disk = place.world.disk = NotingDisk()
    await place.rebuild()
    path = str(place.path)
    assert disk.did == [
        ("sync", f"{path}.building"),
        ("rename", f"{path}.building", path),
        ("sync_directory", str(place.path.parent)),
    ]


async def test_readers_are_served_at_once_after_a_rebuild(place: Installation) -> None:
    await place.deliver(1)
    await place.rebuild()
    assert not place.index.catching_up and place.index.numbering
    assert await place.index.deliver(await place.store(2)) is Outcome.ENTERED
    assert await shown(place.index) == [1, 2]


async def test_rebuild_memory_is_bounded_per_message(tmp_path: Path) -> None:
    """Peak of what Python holds beside the nodes, at two sizes: tens of octets for each message more."""
    peaks = []
    for count in (500, 2000, 8000):  # the first one warms up
        place = Installation(tmp_path / str(count))
        place.path.parent.mkdir()
        await place.start()
        for number in range(1, count + 1):
            await place.store(number, inbox(f"account{number % 50}"))
            if not number % 100:
                await asyncio.sleep(0)
        rebuilder = place.rebuilder()
        tracemalloc.start()
        try:
            await rebuilder.run()
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        await place.stop()
    assert (peaks[2] - peaks[1]) / 6000 < 100, peaks


async def test_progress_is_told(place: Installation) -> None:
    for number in range(1, 4):
        await place.deliver(number)
    steps: list[int] = []
    await place.rebuilder(steps=steps).run()
    assert steps == [3]


async def test_an_index_that_cannot_be_made_says_so(place: Installation) -> None:
    place.path = place.path.parent / "nowhere" / "index.db"
    with pytest.raises((IndexTrouble, OperatorError)):
        await place.rebuilder().run()


async def test_a_repaired_copy_without_a_row_is_mail_as_any_other(place: Installation) -> None:
    """Nothing says that it was deleted: it may be all that is left of it."""
    delivery = await place.store(1, nodes=("a",))
    node = place.nodes["a"]
    record, chunk = await node.read_commit(key(1)), await node.read_chunk(key(1), 0)
    await place.nodes["b"].commit(key(1), [chunk], record, 1, None, Origin.REPAIR)
    node.lose(delivery.key)
    await place.rebuild()
    assert await shown(place.index) == [1]


async def test_a_log_ends_for_a_rebuild_behind_what_was_stamped_before_it_began(place: Installation) -> None:
    """Laws 2, 7: the stamp that a process last heard of a node may be a ping old; one that is made now is named."""
    await place.deliver(1)
    node = place.nodes["a"]
    now, known, fence, named = node.stamp, node.stamp(), node.fence, list[Stamp]()

    async def fresh() -> Stamp | None:
        return now()

    async def naming(stamp: Stamp) -> Position:
        named.append(stamp)
        return await fence(stamp)

    node.stamp, node.fresh_stamp, node.fence = lambda: known, fresh, naming  # type: ignore[method-assign]
    between = now()
    await place.rebuild()
    assert between is not None and named and all(stamp.at > between.at for stamp in named)
