"""Holds what a store has promised, and checks a recovered store against it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

from powermail.base.errors import CopyMissing
from powermail.storage.contract import START, Held, Mark, Position
from powermail.storage.log.store import SegmentStore
from tests.storage.support import FAR, body, key, record

Checkpoints = dict[tuple[bytes, int], bytes]


@dataclass
class Promises:
    """What was acknowledged. `live`: key number to (number of the octets, chunks, position)."""

    live: dict[int, tuple[int, int, Position]] = field(default_factory=dict)
    dead: dict[int, None] = field(default_factory=dict)
    forgotten: dict[int, None] = field(default_factory=dict)  # dead, and their tombstones may go
    refused: dict[int, None] = field(default_factory=dict)  # refused for good: never live (law 5)
    dropped: dict[tuple[int, Position], None] = field(default_factory=dict)
    mark: Mark = field(default_factory=Mark)
    boots: tuple[str, ...] = ()
    end: Position = START
    torn: list[tuple[Position, Position]] = field(default_factory=list)  # where earlier cuts may have torn what was written
    births: list[tuple[str, Position]] = field(default_factory=list)  # what incarnation and birth mark may be
    checkpoints: list[Checkpoints] = field(default_factory=lambda: [{}])  # what may be there
    asked: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # key number to octets that may be there

    def copy(self) -> Promises:
        """A copy that goes on by itself; `asked` stays shared, for what may be there may be there at all times."""
        made = copy.copy(self)
        for name in ("live", "dead", "forgotten", "refused", "dropped", "torn", "births", "checkpoints"):
            setattr(made, name, getattr(self, name).copy())
        return made


def check(store: SegmentStore, promises: Promises, where: str = "") -> None:
    """Acknowledged is there, deleted and dropped is not, what is there is whole, and marks only rise."""
    items = store.reader.inventory(b"", 1 << 20)
    live = {int.from_bytes(item.key, "big"): item for item in items if item.held is Held.LIVE}
    for number, (octets, _, position) in promises.live.items():
        assert number in live, f"{where}: {number} is gone"
        assert live[number].position == position, f"{where}: {number} lies elsewhere"
        assert store.reader.read_commit(key(number)) == record(octets), f"{where}: another copy of {number}"
    answers = dict(zip(promises.dead, store.reader.has([key(number) for number in promises.dead]), strict=True))
    for number, answer in answers.items():
        allowed = (Held.DEAD, Held.ABSENT, Held.UNKNOWN) if number in promises.forgotten else (Held.DEAD,)
        assert answer in allowed, f"{where}: {number} was deleted, now it is {answer.value}"
    for number, item in live.items():
        assert number in promises.asked, f"{where}: a message nobody sent"
        assert number not in promises.refused, f"{where}: {number} was refused for good"
        assert (number, item.position) not in promises.dropped, f"{where}: {number} was dropped"
    for number, commit, chunks in _read(store, list(live)):
        (whole,) = [one for one in promises.asked[number] if commit == record(one[0])]
        assert chunks == [body(whole[0], n) for n in range(whole[1])], f"{where}: half of {number}"
    _check_scan(store, promises, {item.key: item.held for item in items}, where)
    _check_facts(store, promises, where)


def _read(store: SegmentStore, numbers: list[int]) -> Iterator[tuple[int, bytes, list[bytes]]]:
    """(number, commit, chunks) of each, by every way there is to read it."""
    for number, whole in zip(numbers, store.reader.read_small([key(number) for number in numbers]), strict=True):
        if whole is not None:
            yield number, whole.commit, whole.parts
            continue
        store.reader.verify(key(number))
        chunks: list[bytes] = []
        try:
            while True:
                chunks.append(store.reader.read_chunk(key(number), len(chunks)).stored)
        except CopyMissing:
            yield number, store.reader.read_commit(key(number)), chunks


def _check_scan(store: SegmentStore, promises: Promises, inventory: dict[bytes, Held], where: str) -> None:
    """Law 1: scans show each copy and each tombstone once, and nothing else.

    What a cut tore may look like damage when sectors of one write were kept out of order; what was acknowledged never does.
    """
    seen: dict[bytes, Held] = {}
    after = START
    while (scan := store.scanner.scan(after, 7, 0.0)).following != after:
        for one in scan.unread:
            torn = any(start <= one.position < end for start, end in [*promises.torn, (promises.end, FAR)])
            assert torn, f"{where}: {one} was acknowledged and cannot be read"
        for item in scan.items:
            assert item.key not in seen, f"{where}: {item.key.hex()} is shown twice"
            seen[item.key] = Held.DEAD if item.origin is None else Held.LIVE
        after = scan.following
    assert seen == inventory, f"{where}: the scan shows other keys than the inventory"


def _check_facts(store: SegmentStore, promises: Promises, where: str) -> None:
    facts = store.facts()
    assert facts.end >= promises.end, f"{where}: the log ends before what was told"
    hidden = store.damaged() or store.recovery.rebuilt  # where, `_check_scan` asks
    assert hidden or not facts.damaged, f"{where}: a torn tail is no damage: {store.recovery}"
    assert facts.mark.with_seen(promises.mark) == facts.mark, f"{where}: a mark was lost"
    assert [boot for boot in facts.boots if boot in promises.boots] == list(promises.boots), f"{where}: a boot was lost"
    assert len(facts.began) == len(facts.boots) and list(facts.began) == sorted(facts.began), f"{where}: openings out of order"
    if facts.boots[-1] not in promises.boots:  # law 12: what was shown does not lie behind where a later opening began
        assert facts.began[-1] >= promises.end, f"{where}: it would be taken for an older state of itself"
    assert not promises.births or (facts.incarnation, facts.birth) in promises.births, f"{where}: another birth"
    kept = {(name, number): octets for name, number, octets in store.reader.checkpoints(b"", 1 << 20)}
    assert kept in promises.checkpoints, f"{where}: other checkpoints"
