"""Every state that a power cut may leave of the log: recovered, checked, appended to, and recovered once more."""

from __future__ import annotations

import copy

import pytest

from powermail.sim.disk import Op, SimDisk, cuts
from powermail.storage import record as rec
from powermail.storage.contract import Chunk, Position
from powermail.storage.store import Operation, SegmentStore
from tests.storage.support import Promises, body, check, commit, fresh_disk, key, open_store


def workload(disk: SimDisk, store: SegmentStore) -> list[tuple[int, Promises]]:
    """Does a bit of everything; what was promised after how many operations of the journal."""
    promises = Promises()
    history: list[tuple[int, Promises]] = [(0, copy.deepcopy(promises))]

    def ask(number: int, chunks: int = 1) -> None:
        promises.asked[key(number)] = (number, chunks)
        for entry in history:
            entry[1].asked[key(number)] = (number, chunks)

    def promised() -> None:
        history.append((len(disk.journal), copy.deepcopy(promises)))

    def commits(*numbers: int) -> None:
        for number in numbers:
            ask(number)
        assert store.write([commit(number) for number in numbers]) == [None] * len(numbers)
        promises.live.update({key(number): (number, 1) for number in numbers})
        promised()

    def delete(*numbers: int) -> None:
        for number in numbers:
            promises.live.pop(key(number), None)
        history.append((len(disk.journal), copy.deepcopy(promises)))  # from here on it may be gone
        assert store.write([Operation(rec.TOMBSTONE, key(number)) for number in numbers]) == [None] * len(numbers)
        promises.dead.update({key(number): None for number in numbers})
        promised()

    commits(1)
    commits(2, 3, 4)
    ask(5, 3)
    for number in range(2):
        store.write([Operation(rec.CHUNK, key(5), [Chunk(number, 0, body(5, number), len(body(5, number)))])])
    commits(6)
    last = Chunk(2, 0, body(5, 2), len(body(5, 2)))
    assert store.write([Operation(rec.COMMIT, key(5), [last], b"{}", 3)]) == [None]
    promises.live[key(5)] = (5, 3)
    promised()
    delete(1, 2)
    ask(7)
    store.write([Operation(rec.CHUNK, key(7), [Chunk(0, 0, body(7), len(body(7)))])])
    assert store.write([Operation(rec.ABORT, key(7))]) == [None]
    promises.dead[key(7)] = None
    promised()
    for number in range(10, 34, 2):
        commits(number, number + 1)
    delete(*range(10, 30))
    store.forget_tombstones([key(number) for number in range(10, 30)])
    while store.compact(Position(1 << 40, 0)):
        promised()
    commits(40)
    return history


def states() -> int:
    """Tries all states; how many there were."""
    disk = fresh_disk()
    base = disk.clone()
    store = open_store(disk)
    disk.settle()
    history = workload(disk, store)
    tried = 0
    for length in range(len(disk.journal) + 1):
        promises = [entry for at, entry in history if at <= length][-1]
        for ops in cuts(disk.journal, length, 64):
            _try(disk, base, ops, promises, f"cut after {length}")
            tried += 1
    return tried


def _try(disk: SimDisk, base: SimDisk, ops: list[Op], promises: Promises, where: str) -> None:
    image = disk.image(base, ops)
    store = open_store(image)
    check(store, promises, where)
    again = copy.deepcopy(promises)
    before = image.clone()
    image.settle()
    extra = 1000
    again.asked[key(extra)] = (extra, 1)
    assert store.write([commit(extra)]) == [None]
    again.live[key(extra)] = (extra, 1)
    # Depth two: the power fails again behind the append; only what was synced is left, or all of it.
    for second in list(cuts(image.journal, len(image.journal)))[:2]:
        check(open_store(image.image(before, second)), again, f"{where}, then again")


@pytest.mark.timeout(300)
def test_original_defect_1_every_power_cut_keeps_what_was_acknowledged() -> None:
    assert states() > 1000


def test_the_harness_notices_a_missing_fsync() -> None:
    """Sensitivity: a drive, or an edit, that does not sync is caught."""
    disk = fresh_disk()
    base = disk.clone()
    store = open_store(disk)
    disk.settle()
    disk.lies = True
    history = workload(disk, store)
    length = len(disk.journal)
    with pytest.raises(Exception, match=r"."):
        for ops in cuts(disk.journal, length, 64):
            _try(disk, base, ops, history[-1][1], "lying disk")
            break
