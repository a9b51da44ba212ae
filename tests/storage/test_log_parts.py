"""Parts of the log by themselves: walks over stretches that do not read, notes of damage, and a key index that lags behind."""

from __future__ import annotations

import errno
import random
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from powermail.base.disk import SystemDisk
from powermail.base.entropy import SystemEntropy
from powermail.base.errors import CommitRefused, NodeTrouble
from powermail.base.log import MemoryLog
from powermail.base.world import system_world
from powermail.sim.disk import SimDisk
from powermail.storage.contract import Chunk, Held, Mark, NodeState, Origin, Position
from powermail.storage.identity import make_store
from powermail.storage.log import record as rec
from powermail.storage.log import segments as segments_module
from powermail.storage.log.damage import Damage
from powermail.storage.log.keys import KeyIndex, SqliteKeyIndex
from powermail.storage.log.segments import Found, Segments
from powermail.storage.log.store import Options, SegmentStore
from powermail.storage.node import LocalNode
from tests.storage.bad_disk import BadDisk
from tests.storage.promises import check
from tests.storage.support import (
    CLUSTER,
    NO_MARK,
    PATH,
    SMALL,
    checkpoint,
    commit,
    in_file,
    key,
    live,
    open_store,
    put,
    tombstone,
)
from tests.storage.workload import Driver, random_acts

# -- walks ------------------------------------------------------------------------------------------------------------

CODEC = rec.Codec(bytes(32))


def segment(disk: Any, sizes: list[int], room: int) -> list[int]:
    """Segment 1 with records of these sizes, and zeros up to `room`; the offsets of the records."""
    disk.make_directory(f"{PATH}/segments")
    content, offsets = bytearray(rec.SEGMENT_HEADER_OCTETS), []
    for number, size in enumerate(sizes):
        offsets.append(len(content))
        record = rec.Record(rec.CHUNK, 0, number, key(number), bytes([number % 256]) * size)
        content += b"".join(CODEC.pack(record, 1, len(content)))
    file = disk.open(f"{PATH}/segments/0000000001.seg", create=True)
    file.write(0, [bytes(content).ljust(room, b"\0")])
    return [*offsets, len(content)]


def walked(disk: Any, end: int, full: bool) -> list[tuple[int, int | None, int]]:
    """(offset, number of the record or None, room) of all that a walk finds."""
    segments = Segments(disk, PATH, CODEC, lambda number: 2)
    found = [*segments.walk(1, rec.SEGMENT_HEADER_OCTETS, end, full)]
    assert all(isinstance(one, Found) for one in found)
    return [(one.offset, one.record.number if one.record is not None else None, one.room) for one in found]


@pytest.fixture(params=[256, 512, 4096, 1 << 22])
def window(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Octets read at a time; records are larger and smaller than that."""
    monkeypatch.setattr(segments_module, "WINDOW_OCTETS", request.param)
    monkeypatch.setattr(segments_module, "_WIDE_OCTETS", request.param + 4096)
    return int(request.param)


SIZES = [40, 900, 0, 7, 2000, 300, 1, 1500, 64, 64]


def test_a_walk_finds_every_record_whatever_it_reads_at_a_time(window: int) -> None:
    disk = SimDisk()
    *offsets, end = segment(disk, SIZES, 16_384)
    expected = [
        (offset, number, rec.record_octets(size)) for number, (offset, size) in enumerate(zip(offsets, SIZES, strict=True))
    ]
    assert walked(disk, end, True) == expected
    assert walked(disk, 16_384, False) == expected, "zeros behind the last record are room that was never used"
    behind = [found for found in walked(disk, 16_384, True) if found[1] is None]
    assert sum(room for _, _, room in behind) == 16_384 - end and behind[0][0] == end, "and damage where records should be"


@pytest.mark.parametrize("filling", [b"\0", b"\xff"])
def test_a_walk_names_what_was_overwritten_and_goes_on_behind_it(window: int, filling: bytes) -> None:
    for broken in range(len(SIZES)):
        disk = SimDisk()
        *offsets, end = segment(disk, SIZES, 16_384)
        file = disk.open(f"{PATH}/segments/0000000001.seg")
        start, stop = offsets[broken], [*offsets, end][broken + 1]
        file.write(start, [filling * (stop - start)])
        found = walked(disk, end, True)
        assert [number for _, number, _ in found if number is not None] == [n for n in range(len(SIZES)) if n != broken]
        bad = [(offset, room) for offset, number, room in found if number is None]
        assert bad[0][0] == start and sum(room for _, room in bad) == stop - start


def test_a_walk_reads_around_what_the_disk_does_not_read(window: int) -> None:
    plain = SimDisk()
    sizes = [3000] * 12
    *offsets, end = segment(plain, sizes, 65_536)
    disk = BadDisk(plain)
    disk.bad[f"{PATH}/segments/0000000001.seg"] = [(offsets[6] + 100, offsets[6] + 101)]
    found = walked(disk, end, True)
    numbers = [number for _, number, _ in found if number is not None]
    assert set(range(12)) - set(numbers) <= {5, 6, 7} and 6 not in numbers
    bad = [(offset, room) for offset, number, room in found if number is None]
    assert any(offset <= offsets[6] + 100 < offset + room for offset, room in bad)
    disk.bad[f"{PATH}/segments/0000000001.seg"] = [(offsets[11], 65_536)]
    assert walked(disk, 65_536, False)[-1][1] is None, "what cannot be read at the end may hold a record"


def test_a_disk_that_reads_nothing_is_not_asked_for_ever() -> None:
    plain = SimDisk()
    *_, end = segment(plain, [3000] * 200, 1 << 20)
    disk, asked = BadDisk(plain), 0
    path = f"{PATH}/segments/0000000001.seg"
    disk.bad[path] = [(0, 1 << 30)]
    segments = Segments(disk, PATH, CODEC, lambda number: 2)
    file = segments.file(1)
    read = file.read

    def counted(offset: int, octets: int) -> bytes:
        nonlocal asked
        asked += 1
        return read(offset, octets)

    file.read = counted  # type: ignore[method-assign]
    assert [found.record for found in segments.walk(1, rec.SEGMENT_HEADER_OCTETS, end, True)] == [None]
    assert asked < 40


class CountingCodec(rec.Codec):
    """Counts the octets that are searched for the next record behind a bad one."""

    octets = 0

    def _next_valid(self, octets: bytes, segment: int, base: int, position: int) -> int | None:
        self.octets += len(octets) - position
        return super()._next_valid(octets, segment, base, position)


def test_unused_room_of_a_segment_is_read_once_and_not_searched_for_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each start the rest of the last segment is looked through: nearly all of it was never written."""
    monkeypatch.setattr(segments_module, "WINDOW_OCTETS", 4096)
    monkeypatch.setattr(segments_module, "_WIDE_OCTETS", 8192)
    disk, room = SimDisk(), 1 << 20
    *offsets, end = segment(disk, [500] * 4, room)
    codec = CountingCodec(bytes(32))
    segments = Segments(disk, PATH, codec, lambda number: 2)
    file = segments.file(1)
    read, octets_read = file.read, 0

    def counted(offset: int, octets: int) -> bytes:
        nonlocal octets_read
        octets_read += octets
        return read(offset, octets)

    file.read = counted  # type: ignore[method-assign]
    found = [*segments.walk(1, rec.SEGMENT_HEADER_OCTETS, room, False)]
    assert [one.offset for one in found] == offsets
    assert not codec.octets and octets_read == room - rec.SEGMENT_HEADER_OCTETS
    for where in (room - 1, room // 2 + 4096, end):  # a single octet in all of it is not passed over
        file.write(where, [b"\1"])
        bad = [one for one in segments.walk(1, rec.SEGMENT_HEADER_OCTETS, room, False) if one.record is None]
        assert bad[0].offset == end and any(one.offset <= where < one.offset + one.room for one in bad)
        file.write(where, [b"\0"])


# -- damage -----------------------------------------------------------------------------------------------------------


def test_notes_of_damage_grow_together_survive_and_heal() -> None:
    disk = SimDisk()
    disk.make_directory(PATH)
    damage = Damage(disk, PATH)
    assert damage.note(3, 128, 64, "first", blind=False)
    assert not damage.note(3, 136, 8, "within", blind=False), "no news"
    assert damage.note(3, 192, 64, "touching", blind=False)
    assert damage.note(5, 128, 64, "elsewhere", blind=True)
    assert (damage.count(), damage.segments(), damage.blind()) == (2, [3, 5], True)
    assert damage.blind_at(5, 130) and not damage.blind_at(3, 130)
    damage.save()
    again = Damage(disk, PATH)
    again.load()
    assert (again.count(), again.segments(), again.blind()) == (2, [3, 5], True)
    again.heal(3, 128, 128, [(192, 64)])
    assert again.count() == 2, "what is still bad stays"
    again.heal(3, 128, 128, [])
    again.forget(5)
    assert (again.count(), again.segments(), again.blind()) == (0, [], False)
    again.save()
    last = Damage(disk, PATH)
    last.load()
    assert last.count() == 0


def test_a_stretch_that_was_looked_at_in_part_heals_in_part() -> None:
    damage = Damage(SimDisk(), PATH)
    damage.note(3, 128, 640, "large", blind=True)
    damage.heal(3, 256, 128, [(256, 64)])
    assert damage.count() == 3 and all(damage.blind_at(3, offset) for offset in (128, 256, 384, 760))
    assert not damage.blind_at(3, 320), "this part reads well"
    damage.heal(3, 320, 0, [])
    assert damage.count() == 3, "of one record nothing is known but that it is good"
    damage.heal(3, 128, 640, [])
    assert damage.count() == 0


def test_notes_of_damage_are_bounded() -> None:
    disk = SimDisk()
    disk.make_directory(PATH)
    damage = Damage(disk, PATH)
    for number in range(1000):
        damage.note(1, 128 + 64 * number, 8, "one of many", blind=False)
    assert damage.count() < 200
    assert not damage.note(1, 128 + 64 * 500, 8, "one of many", blind=False), "and none is forgotten"


# -- a key index that lags behind -------------------------------------------------------------------------------------


class RealDisk(SystemDisk):
    """Files; what the simulated one can do for the driver does nothing here. A copy of it is what a killed process leaves."""

    def __init__(self) -> None:
        self.journal: list[Any] = []

    def fail(self, kind: str, number: int, error: int = errno.EIO) -> None:
        """Real disks fail by themselves."""

    def clear_faults(self) -> None:
        """There are none."""


class FileDriver(Driver):
    """Drives a store on files with the key index of production."""

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(RealDisk())  # type: ignore[arg-type]

    def _open(self) -> SegmentStore:
        store = open_store(self.disk, boot=self._boot, path=self.path, make_keys=in_file)
        facts = store.facts()
        self.promises.births = [(facts.incarnation, facts.birth)]
        self.promises.boots = tuple(facts.boots)
        self.promises.end = facts.end
        return store

    def reopen(self) -> None:
        self.store.close()
        super().reopen()


def weighed(store: SegmentStore) -> dict[int, int]:
    """Octets that count in each segment, reckoned anew from the key index."""
    octets: dict[int, int] = {}
    for _, entry in store._ledger.keys.everything():
        if entry.state:
            for place in (*entry.chunks, entry.mark):
                octets[place.segment] = octets.get(place.segment, 0) + place.room
    octets.pop(0, None)
    return octets


@pytest.mark.parametrize("seed", range(1, 7))
def test_a_key_index_that_lags_and_one_made_anew_say_the_same(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process is killed at any time, and its key index is brought forward, or lost: the log alone decides."""
    monkeypatch.setattr(SqliteKeyIndex, "_FREEZE_AT", 9)
    monkeypatch.setattr(SqliteKeyIndex, "_SLICE", 4)
    home = tmp_path / "node"
    make_store(SystemDisk(), str(home), CLUSTER, "a", SystemEntropy())
    driver = FileDriver(str(home))
    for turn in range(3):
        chance = random.Random(seed * 100 + turn)
        random_acts(driver, chance, 12, 100 + 1000 * turn)
        for _ in range(chance.randint(0, 5)):
            driver.store.settle()
        told = []
        for lose_index in (False, True):
            left = tmp_path / f"left-{turn}-{lose_index}"
            shutil.copytree(home, left)
            (left / "lock").unlink()
            for name in left.glob("keys.db*") if lose_index else ():
                name.unlink()
            store = open_store(SystemDisk(), boot=90, path=str(left), make_keys=in_file)
            check(store, driver.promises, f"turn {turn}, index lost: {lose_index}")
            counted = {number: octets for number, octets in store._ledger.live.items() if octets}
            assert counted == weighed(store)
            told.append((store.reader.inventory(b"", 1 << 20), store.reader.checkpoints(b"", 1 << 20), counted))
            store.close()
        assert told[0] == told[1]
        driver.reopen()
    driver.store.close()


def test_parts_of_a_replaced_checkpoint_never_come_back(tmp_path: Path) -> None:
    """Also when the record that replaced them was moved behind them, and there was no part in between."""
    disk = SimDisk()
    make_store(disk, PATH, CLUSTER, "a", SystemEntropy())
    store, name = open_store(disk), b"\x77" * 16

    def put(number: int, octets: bytes) -> None:
        assert store.write([checkpoint(name, number, octets)]) == [None]

    put(0, b"old")
    put(2, b"old part")
    for number in range(1, 12):
        put(0, b"new %d" % number)
    put(3, b"new part")
    far = Position(1 << 40, 0)
    store.writer.seal()
    put(3, b"new part again")
    while store.compaction.compactable(far, 0.0) is not None:
        store.compaction.compact(far, [], NO_MARK)
    for current in (store, open_store(disk)):
        assert current.reader.checkpoints(b"", 10) == [(name, 0, b"new 11"), (name, 3, b"new part again")]


# -- disks that are full or read-only ---------------------------------------------------------------------------------


class StubbornDisk(SystemDisk):
    """A disk that refuses what changes it, for a reason."""

    def __init__(self) -> None:
        self.error = 0

    def _refuse(self) -> None:
        if self.error:
            raise OSError(self.error, "injected")

    def open(self, path: str, create: bool = False, exclusive: bool = False) -> Any:
        if create or exclusive:
            self._refuse()
        return StubbornFile(super().open(path, create, exclusive), self)

    def replace_file(self, path: str, octets: bytes, mode: int = 0o600) -> None:
        self._refuse()
        super().replace_file(path, octets, mode)

    def unlink(self, path: str) -> None:
        self._refuse()
        super().unlink(path)


class StubbornFile:
    """A file of it."""

    def __init__(self, file: Any, disk: StubbornDisk) -> None:
        self._file, self._disk = file, disk

    def write(self, *args: Any, **named: Any) -> None:
        self._disk._refuse()
        self._file.write(*args, **named)

    def truncate(self, octets: int) -> None:
        self._disk._refuse()
        self._file.truncate(octets)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize(("error", "state"), [(errno.ENOSPC, NodeState.FULL), (errno.EROFS, NodeState.FAILED)])
async def test_a_disk_that_cannot_be_written_opens_for_reading_and_comes_back(
    error: int, state: NodeState, tmp_path: Path
) -> None:
    """The boot record cannot be written: no commit is taken, all is read, and the node returns by itself."""
    world = system_world(MemoryLog())
    disk = world.disk = StubbornDisk()
    keys_refused = error == errno.ENOSPC

    def make_keys(path: str, store: bytes) -> SqliteKeyIndex:
        if disk.error and keys_refused:
            raise sqlite3.OperationalError("database or disk is full")
        return SqliteKeyIndex(path, store)

    def made() -> LocalNode:
        return LocalNode(world, CLUSTER, "a", str(tmp_path / "node"), "g", 1, SMALL, make_keys)

    node = made()
    await node.initialise()
    await node.open()
    for number in range(30):
        await node.commit(key(number), [Chunk(0, 0, b"x" * 100, 100)], b"{}", 1, node.stamp(), Origin.DELIVERY)
    boots = (await node.facts()).boots
    await node.close()

    disk.error = error
    node = made()
    await node.open()
    assert node.state is state and node.reason and node.stamp() is None
    assert await node.has([key(number) for number in range(30)]) == [Held.LIVE] * 30
    assert [await node.read_chunk(key(number), 0) for number in range(30)]
    with pytest.raises(CommitRefused):
        await node.commit(key(99), [Chunk(0, 0, b"x", 1)], b"{}", 1, None, Origin.DELIVERY)
    with pytest.raises(NodeTrouble):
        await node.delete([key(1)], Mark(epoch=1), 0.0)
    with pytest.raises(NodeTrouble):
        await node.probe()
    assert node.state is NodeState.FAILED
    assert (await node.facts()).boots == boots

    disk.error = 0
    await node.probe()
    if not node.incarnation:  # it was let go of, to have its key index on the disk again
        await node.open()
    assert node.stat().state == NodeState.READ_WRITE.value and node.stamp() is not None
    assert (await node.facts()).boots[: len(boots)] == boots and len((await node.facts()).boots) > len(boots)
    await node.commit(key(99), [Chunk(0, 0, b"x", 1)], b"{}", 1, node.stamp(), Origin.DELIVERY)
    await node.close()
    assert (tmp_path / "node" / "keys.db").exists()


class _Asked(SqliteKeyIndex):
    """Counts the statements that look for keys."""

    asked = 0

    def __init__(self, path: str, store: bytes) -> None:
        super().__init__(path, store)
        self._write.set_trace_callback(self._count)

    def _count(self, statement: str) -> None:
        self.asked += "FROM keys WHERE key" in statement


def test_a_batch_of_deletions_looks_for_its_keys_once(tmp_path: Path) -> None:
    """Each look gives up the interpreter lock; over a thousand keys that is most of what a deletion costs."""
    made: list[_Asked] = []

    def make_keys(path: str, store: bytes) -> KeyIndex:
        made.append(_Asked(path, store))
        return made[-1]

    disk = SystemDisk()
    path = f"{tmp_path}/node"
    make_store(disk, path, CLUSTER, "a", SystemEntropy())
    store = open_store(disk, Options(segment_octets=1 << 20), path=path, make_keys=make_keys)
    put(store, *(commit(number) for number in range(1, 121)))
    while store.settle(everything=True):
        pass
    keys = made[-1]
    keys.asked = 0
    put(store, *(tombstone(number) for number in range(1, 101)), tombstone(200))
    assert keys.asked == 1
    assert live(store) == [*range(101, 121)]
