"""Drives a store through a bit of everything and remembers after which disk operation each promise was given."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from typing import Any

from powermail.base.errors import CommitRefused
from powermail.sim.disk import SimDisk
from powermail.storage.contract import START, Mark, Origin, Position
from powermail.storage.log.store import SegmentStore
from powermail.storage.log.write import CANCEL, Operation
from tests.storage import support as make
from tests.storage.promises import Promises
from tests.storage.support import FAR, key, open_store

NAME = b"\x77" * 16


class Driver:
    """One store on one disk. `history` holds (length of the disk's journal, what was promised by then)."""

    def __init__(self, disk: SimDisk, promises: Promises | None = None, boot: int = 1) -> None:
        self.disk = disk
        self.promises = promises or Promises()
        self.history: list[tuple[int, Promises]] = []
        self._boot = boot
        self._count = 0
        self._next = 1
        self._note()
        self.store = self._open()

    def _note(self) -> None:
        self.history.append((len(self.disk.journal), self.promises.copy()))

    def at(self, length: int) -> Promises:
        """What was promised when the journal had that length."""
        return [promises for at, promises in self.history if at <= length][-1]

    def _promised(self) -> None:
        """The answer was given: from now on it holds."""
        facts = self.store.facts()
        self.promises.end = max(self.promises.end, facts.end)
        self.promises.boots = tuple(facts.boots)
        self._note()

    def _open(self) -> SegmentStore:
        store = open_store(self.disk, boot=self._boot)
        facts = store.facts()
        self.promises.torn.append((self.promises.end, facts.end))
        if store.boot:
            self.promises.births = [(facts.incarnation, facts.birth)]
            self.promises.boots = tuple(facts.boots)
            self.promises.end = max(self.promises.end, facts.end)
        self._note()
        return store

    def reopen(self) -> None:
        """The process is killed and starts anew: what was written stays in the page cache."""
        self._boot += 1
        self.store = self._open()

    def mark(self) -> Mark:
        """The index has committed once more."""
        self._count += 1
        return make.count(self._count)

    # -- acts -----------------------------------------------------------------------------------------------------

    def write(self, *operations: Operation) -> list[Position | Exception | None]:
        """One batch that must not fail."""
        outcomes = self.store.write(operations)
        assert not any(isinstance(outcome, Exception) for outcome in outcomes), outcomes
        return outcomes

    def ask(self, number: int, chunks: int, octets: int | None = None) -> None:
        """From now on it may be there."""
        variants = self.promises.asked.setdefault(number, [])
        if (variant := (number if octets is None else octets, chunks)) not in variants:
            variants.append(variant)

    def commits(self, *numbers: int, chunks: int = 1, origin: Origin = Origin.DELIVERY) -> None:
        """Messages in one batch."""
        for number in numbers:
            self.ask(number, chunks)
        outcomes = self.write(*[make.commit(number, chunks, origin) for number in numbers])
        for number, position in zip(numbers, outcomes, strict=True):
            assert isinstance(position, Position)
            self.promises.live[number] = (number, chunks, position)
        self._promised()

    def streams(self, *numbers: int, chunks: int = 3, let_go: bool = False) -> None:
        """Messages that stream in side by side, and are committed or let go."""
        for number in numbers:
            self.ask(number, chunks)
        for chunk in range(chunks):
            self.write(*[make.stream(number, chunk) for number in numbers])
        if let_go:
            self.write(*[Operation(CANCEL, key(number)) for number in numbers])
            return
        outcomes = self.write(*[make.last(number, chunks) for number in numbers])
        for number, position in zip(numbers, outcomes, strict=True):
            assert isinstance(position, Position)
            self.promises.live[number] = (number, chunks, position)
        self._promised()

    def delete(self, *numbers: int, at: float = 0.0) -> None:
        """Tombstones; from the moment they are asked for, the messages may be gone."""
        mark = self.mark()
        for number in numbers:
            self.promises.live.pop(number, None)
        self._note()
        self.write(make.marked(mark), *[make.tombstone(number, at) for number in numbers])
        self.promises.dead.update(dict.fromkeys(numbers))
        self.promises.mark = self.promises.mark.with_seen(mark)
        self._promised()

    def drop(self, number: int) -> None:
        """Takes the copy away that is there."""
        mark, position = self.mark(), self.promises.live.pop(number)[2]
        self._note()
        self.write(make.marked(mark), make.drop(number, position))
        self.promises.dropped[number, position] = None
        self.promises.mark = self.promises.mark.with_seen(mark)
        self._promised()

    def again(self, number: int, octets: int) -> None:
        """Another copy of a key, with other octets, as a repair that found better ones."""
        self.ask(number, 1, octets)
        (position,) = self.write(make.commit(octets, origin=Origin.REPAIR, under=number))
        assert isinstance(position, Position)
        self.promises.live[number] = (octets, 1, position)
        self._promised()

    def checkpoint(self, number: int, octets: bytes) -> None:
        """A record of a checkpoint; 0 replaces all."""
        old = self.promises.checkpoints[-1]
        new = {(NAME, 0): octets} if not number else {**old, (NAME, number): octets}
        self.promises.checkpoints = [old, new]
        self._note()
        mark = self.mark()
        self.write(make.marked(mark), make.checkpoint(NAME, number, octets))
        self.promises.checkpoints = [new]
        self.promises.mark = self.promises.mark.with_seen(mark)
        self._promised()

    def rebirth(self) -> None:
        """A new incarnation and a birth mark (law 12)."""
        old = self.promises.births[-1]
        incarnation = f"{self._count + 1:016x}"
        end = self.store.facts().end
        self.promises.births = [old, (incarnation, end)]
        self._note()
        birth = self.store.rebirth(incarnation)
        assert birth >= end
        self.promises.births = [(incarnation, birth)]
        for _, earlier in self.history:  # the place of the mark is known only now
            if (incarnation, end) in earlier.births:
                earlier.births.append((incarnation, birth))
        self._promised()

    def lift_birth(self) -> None:
        """There is no birth mark any more (law 12)."""
        old = self.promises.births[-1]
        self.promises.births = [old, (old[0], START)]
        self._note()
        self.store.lift_birth()
        self.promises.births = [(old[0], START)]
        self._promised()

    def compact(self, at: float = 0.0, steps: int = 50) -> int:
        """Steps of compaction; tombstones stated before `at` are forgotten. Octets freed."""
        freed = 0
        for _ in range(steps):
            wanted = self.store.compaction.compactable(FAR, at)
            if wanted is None:
                break
            for name in wanted:
                self.promises.forgotten[int.from_bytes(name, "big")] = None
            self._note()
            freed += self.store.compaction.compact(FAR, wanted, make.NO_MARK)
            self._promised()
        return freed

    def full(self, *numbers: int) -> None:
        """A batch that needs a new segment while there is no room: refused, and refused for good where it says so."""
        for number in numbers:
            self.ask(number, 1)
        self.disk.fail("allocate", 1, errno.ENOSPC)
        outcomes = self.store.write([make.commit(number) for number in numbers])
        self.disk.clear_faults()
        for number, outcome in zip(numbers, outcomes, strict=True):
            if isinstance(outcome, CommitRefused):
                self.promises.refused[number] = None
            elif isinstance(outcome, Position):
                self.promises.live[number] = (number, 1, outcome)
        self._promised()
        self.store.resume()
        self._promised()


def scripted(driver: Driver) -> None:
    """A bit of everything in an order that meets every kind of record at every kind of boundary."""
    driver.commits(1)
    driver.commits(2, 3, 4)
    driver.streams(5, 6)
    driver.streams(7, let_go=True)
    driver.delete(1, 2, 700)
    driver.commits(8, origin=Origin.REPAIR)
    driver.drop(8)
    driver.again(8, 9008)
    driver.checkpoint(0, b"whole")
    driver.checkpoint(1, b"delta")
    driver.full(*range(20, 32))
    for number in range(40, 64, 2):
        driver.commits(number, number + 1)
    driver.reopen()
    driver.rebirth()
    driver.delete(*range(40, 60), at=100.0)
    driver.compact(at=200.0)
    driver.drop(next(number for number in (60, 61, 62, 63) if number in driver.promises.live))
    driver.checkpoint(0, b"whole again")
    driver.commits(90)
    driver.compact(at=200.0)


def random_acts(driver: Driver, chance: random.Random, acts: int, number: int = 100) -> None:
    """Any acts in any order; the same for the same `chance`. Messages are numbered from `number`."""

    def some(most: int) -> list[int]:
        alive = sorted(driver.promises.live)
        return chance.sample(alive, min(len(alive), chance.randint(1, most)))

    def new(most: int) -> range:
        nonlocal number
        first, number = number, number + chance.randint(1, most)
        return range(first, number)

    def do_drop() -> None:
        for one in some(1):
            driver.drop(one)
            if chance.random() < 0.7:
                driver.again(one, one + 9000)

    def do_delete() -> None:
        if gone := some(6):
            driver.delete(*gone, at=chance.choice([50.0, 100.0, 300.0]))

    table: list[tuple[int, Callable[[], Any]]] = [
        (6, lambda: driver.commits(*new(4), origin=chance.choice([Origin.DELIVERY, Origin.REPAIR]))),
        (2, lambda: driver.streams(*new(2), chunks=chance.randint(1, 3))),
        (1, lambda: driver.streams(*new(2), chunks=2, let_go=True)),
        (4, do_delete),
        (2, do_drop),
        (1, lambda: driver.checkpoint(chance.randint(0, 2), b"checkpoint %d" % chance.randrange(1000))),
        (1, lambda: driver.full(*new(12))),
        (2, lambda: driver.compact(at=200.0, steps=chance.randint(1, 6))),
        (1, driver.reopen),
        (1, driver.rebirth),
        (1, driver.lift_birth),
    ]
    weights = [weight for weight, _ in table]
    for _ in range(acts):
        chance.choices(table, weights)[0][1]()
