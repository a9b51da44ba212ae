"""Real power cuts: an ext4 on a loop device is shut down (FS_IOC_SHUTDOWN, no log flush) under a writing node."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from powermail.base.disk import SystemDisk
from powermail.base.entropy import SystemEntropy
from powermail.storage.contract import Held
from powermail.storage.identity import make_store
from powermail.storage.log.store import Options, SegmentStore
from tests.storage.support import CLUSTER, FAR, body, commit, count, drop, in_file, key, live, marked, open_store, tombstone

SHUTDOWN = 0x8004587D
WITHOUT_LOG_FLUSH = 2
CUTS = int(os.environ.get("PM_TEST_CUTS", "10"))
OPTIONS = Options(256 * 1024, 0)


def open_at(path: str, boot: int = 1) -> SegmentStore:
    """A store on a real file system."""
    return open_store(SystemDisk(), OPTIONS, boot, time.monotonic, path, in_file)


def write_for_ever(path: str, first: int) -> None:
    """What the writing process does: batches of three messages, of which one is deleted and one dropped, said when durable.

    Message n stays when n % 3 is 1, has a tombstone when it is 2, and is dropped when it is 0.
    """
    store = open_at(path, first)
    number = first
    while True:
        outcomes = store.write([commit(n) for n in range(number, number + 3)])
        if any(isinstance(outcome, Exception) for outcome in outcomes):
            return
        dropped = outcomes[2]
        assert dropped is not None and not isinstance(dropped, Exception)
        mark = count(number)
        outcomes = store.write([marked(mark), tombstone(number + 1, 1.0), drop(number + 2, dropped)])
        if any(isinstance(outcome, Exception) for outcome in outcomes):
            return
        store.settle(everything=number % 5 == 0)
        if number % 10 == 1 and store.compaction.compactable(FAR, 0.0) is not None:
            store.compaction.compact(FAR, [], mark)
        print(number + 2, flush=True)
        number += 3


@pytest.mark.timeout(120 + 3 * CUTS)
def test_what_was_acknowledged_survives_real_power_cuts(tmp_path: Path) -> None:
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control"):
        pytest.skip("needs root and loop devices: real power cuts were NOT tried")
    image, mount = tmp_path / "image", tmp_path / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(64 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    node = str(mount / "node")
    acknowledged: set[int] = set()
    first = 1
    for cut in range(CUTS):
        _mount(image, mount)
        try:
            if cut == 0:
                make_store(SystemDisk(), node, CLUSTER, "a", SystemEntropy())
            last = _write_and_cut(node, mount, first, cut)
            acknowledged.update(range(first, last + 1))
        finally:
            _unmount(mount)
        _mount(image, mount)
        try:
            store = open_at(node)
            try:
                check(store, acknowledged, f"cut {cut}")
                assert store.damaged() or not store.facts().damaged, f"a torn tail is no damage: {store.recovery}"
                first = (max([1, *live(store)]) + 5) // 3 * 3 + 1
            finally:
                store.close()
        finally:
            _unmount(mount)
    assert len(acknowledged) > CUTS * 10


def check(store: SegmentStore, acknowledged: set[int], where: str) -> None:
    """What was acknowledged is as it was left."""
    for number in acknowledged:
        (answer,) = store.reader.has([key(number)])
        wanted = ((Held.LIVE,), (Held.DEAD,), (Held.ABSENT, Held.UNKNOWN))[(number + 2) % 3]
        assert answer in wanted, f"{where}: {number} is {answer.value}"
        if answer is Held.LIVE:
            store.reader.verify(key(number))
            assert store.reader.read_chunk(key(number), 0).stored == body(number), f"{where}: octets of {number}"
    if acknowledged:
        assert store.facts().mark.slots[1][1] >= max(acknowledged) - 2, f"{where}: the mark is older"


def _mount(image: Path, mount: Path) -> None:
    subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True)


def _unmount(mount: Path) -> None:
    """Also when a failed test left a file open: nothing may stay mounted."""
    subprocess.run(["umount", "-l", str(mount)], check=True)


def _write_and_cut(node: str, mount: Path, first: int, cut: int) -> int:
    """Lets a process write, takes the power away, and gives the last number that was acknowledged."""
    code = f"from tests.storage.test_power_cut import write_for_ever; write_for_ever({node!r}, {first})"
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert writer.stdout is not None
    acknowledged = 0
    for _ in range(20 + 7 * (cut % 10)):
        line = writer.stdout.readline()
        assert line, "the writer ended by itself"
        acknowledged = int(line)
    descriptor = os.open(mount, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("I", WITHOUT_LOG_FLUSH))
    finally:
        os.close(descriptor)
    writer.kill()
    # What the writer said after the cut began does not count: ext4 drops the error of an extent conversion that the shutdown
    # interrupts, so an fsync under way may answer success to a process that a real power cut would have ended.
    writer.stdout.close()
    writer.wait()
    return acknowledged
