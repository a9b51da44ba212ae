"""Owns the bundle of seams that every room is handed: one real world, one simulated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from powermail.base.clock import Clock, SystemClock
from powermail.base.counters import Counters
from powermail.base.disk import Disk, SystemDisk
from powermail.base.entropy import Entropy, KeySource, SystemEntropy
from powermail.base.lane import Lane, ThreadLane
from powermail.base.log import Log
from powermail.base.net import Network, SocketNetwork, descriptors


@dataclass
class World:
    """Everything that is not pure computation."""

    clock: Clock
    disk: Disk
    net: Network
    entropy: Entropy
    lane: Callable[[str], Lane]
    log: Log
    descriptors: int = 1 << 20  # files and sockets that may be open
    counters: Counters = field(default_factory=Counters)
    keys: KeySource = field(init=False)
    lanes: WeakValueDictionary[str, Lane] = field(init=False)  # those that there are, for who shows them

    def __post_init__(self) -> None:
        self.keys = KeySource(self.clock.now, self.entropy)
        self.lanes = WeakValueDictionary()
        make = self.lane

        def known(name: str) -> Lane:
            lane = self.lanes[name] = make(name)
            return lane

        self.lane = known


def system_world(log: Log) -> World:
    """The machine's own clock, disks, sockets, randomness and threads."""
    return World(SystemClock(), SystemDisk(), SocketNetwork(), SystemEntropy(), ThreadLane, log, descriptors=descriptors())
