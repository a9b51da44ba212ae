"""Every state that a power cut may leave of the log: recovered, checked, used and cut again, recovered, checked once more.

CI tries a fixed choice of states. `PM_TEST_STATES=20000` is the campaign: other workloads follow until that many are tried.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from powermail.sim.disk import Op, SimDisk, cuts
from tests.storage.promises import Promises, check
from tests.storage.support import fresh_disk, open_store
from tests.storage.workload import Driver, random_acts, scripted

STATES = int(os.environ.get("PM_TEST_STATES", "1500"))
SECTOR = 64  # torn writes end at multiples of this


def drive(seed: int) -> tuple[Driver, SimDisk]:
    """A workload that was done, and the disk it began with; seed 0 is the scripted one."""
    disk = fresh_disk()
    base = disk.clone()
    driver = Driver(disk)
    if seed:
        random_acts(driver, random.Random(seed), 25)
    else:
        scripted(driver)
    return driver, base


def images(driver: Driver, base: SimDisk, share: float, seed: int) -> Iterator[tuple[SimDisk, Promises, str]]:
    """States of one workload: all of them, or a share."""
    journal, chance = driver.disk.journal, random.Random(seed)
    for length in range(len(journal) + 1):
        for number, ops in enumerate(cuts(journal, length, SECTOR)):
            if share == 1.0 or chance.random() < share:
                yield driver.disk.image(base, ops), driver.at(length), f"workload {seed}: cut {number} after {length}"


def first(image: SimDisk, promises: Promises, where: str) -> None:
    """Recovers, checks, goes on, and then the power fails again: in recovery, in what came behind it, or at its end."""
    image.settle()
    before = image.clone()
    again = Driver(image, promises.copy(), boot=50)
    check(again.store, promises, where)
    again.commits(1000)
    again.delete(1000)
    again.commits(1001, 1002)
    journal = image.journal
    chance = random.Random(where)
    length = len(journal) if chance.random() < 0.3 else chance.randrange(len(journal) + 1)
    ops = chance.choice(list(cuts(journal, length, SECTOR)))
    _last(image, before, ops, again.at(length), f"{where}, then after {length} of {len(journal)}")


def _last(image: SimDisk, before: SimDisk, ops: list[Op], promises: Promises, where: str) -> None:
    check(open_store(image.image(before, ops), boot=60), promises, where)


def states(wanted: int) -> tuple[int, int]:
    """(states of the first cut tried, workloads used)."""
    tried = seed = 0
    while tried < wanted:
        driver, base = drive(seed)
        share = 1.0 if wanted > 1500 else 0.3 if seed == 0 else 0.1
        for image, promises, where in images(driver, base, share, seed):
            first(image, promises, where)
            tried += 1
        seed += 1
    return tried, seed


@pytest.mark.timeout(60 + STATES // 10)
def test_original_defect_1_every_power_cut_keeps_what_was_acknowledged() -> None:
    tried, workloads = states(STATES)
    assert tried >= STATES and workloads > 1


def test_a_workload_meets_what_it_should() -> None:
    """The scripted one compacts, is refused at a roll, moves copies and forgets tombstones: else its states prove little."""
    driver, _ = drive(0)
    assert driver.promises.refused and driver.promises.forgotten and driver.promises.dropped
    assert driver.store.facts().end.segment > 6
    assert len(driver.store.facts().boots) == 2
    check(driver.store, driver.promises)


def test_the_harness_notices_a_missing_fsync() -> None:
    """Sensitivity: a drive, or an edit, that does not sync is caught."""
    disk = fresh_disk()
    base = disk.clone()
    driver = Driver(disk)
    disk.settle()
    base = disk.clone()
    disk.lies = True
    scripted(driver)
    length = len(disk.journal)
    state = next(cuts(disk.journal, length, SECTOR))
    with pytest.raises(Exception, match=r"."):
        first(disk.image(base, state), driver.at(length), "lying disk")
