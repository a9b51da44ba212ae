"""Owns bringing mail back from a disk that is no member any more: expelled, replaced, or found when nobody looked for it.

The disk is read, and never joins (law 9). What lies there and is live gets a copy where it has too few; what was deleted stays
so. A key that the index does not know was never entered, or was deleted and forgotten: the mail of it is entered only into a
mailbox that the operator names, as another message, and only once however often it is said.

Danger: a key that is not known is never entered under its own name, nor where it was: deleted mail would be back (P8).
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable

import msgspec
from msgspec import Struct

from powermail.base import limits
from powermail.base.errors import CopyDamaged, CopyMissing, NodeTrouble, NotRedundant
from powermail.base.log import Event
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.cluster.packing import Packer
from powermail.cluster.replicate import Replication
from powermail.directory.contract import Writable
from powermail.index.contract import Delivery, Fate, Index, Outcome
from powermail.keeper.repair import Repairer
from powermail.mail.envelope import Commit, Target
from powermail.storage.contract import Held, StorageNode
from powermail.storage.frames import Inflater

_PAGE = 200
Progress = Callable[[int, int], Awaitable[None]]


class Found(Struct):
    """What lies on a disk, and what became of it; `admin.nodes.Salvaged` says what each figure is."""

    live: int = 0
    thin: int = 0
    copied: int = 0
    deleted: int = 0
    unknown: int = 0
    entered: int = 0
    left: int = 0
    why: list[str] = msgspec.field(default_factory=list)
    done: bool = False


class Salvager:
    """Reads a disk for the operator."""

    def __init__(self, world: World, cluster: Cluster, index: Index, directory: Writable, repairer: Repairer) -> None:
        self._world = world
        self._cluster = cluster
        self._index = index
        self._directory = directory
        self._repairer = repairer
        self._packer = Packer(True)
        self._inflater = Inflater()

    async def run(self, disk: StorageNode, into: str, really: bool, progress: Progress) -> Found:
        """Goes through the disk, which is open. `into` is the mailbox for what is not known, "" to leave that alone. Raises
        Trouble; run again, it goes on.
        """
        found, after, done = Found(done=really), b"", 0
        total = disk.stat().messages
        while page := await disk.inventory(after, _PAGE):
            keys = [item.key for item in page if item.held is Held.LIVE]
            fates = await self._index.fates(keys)
            again = await self._index.fates([_other(key) for key in keys]) if into else {}
            for key in keys:
                fate = fates.get(key)
                if fate is Fate.LIVE:
                    await self._bring(key, disk, found)
                elif fate is not None:
                    found.deleted += 1
                else:
                    found.unknown += 1
                    if into and really and _other(key) not in again:
                        await self._enter(key, disk, into, found)
            after, done = page[-1].key, done + len(keys)
            await progress(done, total)
        return found

    def _left(self, found: Found, key: bytes, why: str) -> None:
        found.left += 1
        if len(found.why) < limits.SALVAGE_WHY_MAX:
            found.why.append(f"{key.hex()}: {why}")

    async def _bring(self, key: bytes, disk: StorageNode, found: Found) -> None:
        """Copies a live message from the disk until it lies in R groups."""
        found.live += 1
        counted, required = self._cluster.counted_there(), self._cluster.copies_required
        thin = False
        for _ in range(required):
            message = await self._index.message(key)
            if message is None or len({counted[name] for name in message.nodes if name in counted}) >= required:
                break
            thin = True
            if not found.done:
                break
            if why := await self._repairer.mend(message, counted, await self._repairer.takers(), disk):
                self._left(found, key, why)
                found.thin += 1
                return
        found.thin += thin
        found.copied += thin and found.done

    async def _enter(self, key: bytes, disk: StorageNode, into: str, found: Found) -> None:
        """Delivers what the index does not know as another message, to those of its accounts that there still are."""
        try:
            commit = Commit.parse(await disk.read_commit(key))
            wanted = list(dict.fromkeys(target.account for target in commit.targets if not target.destination))
            known = await self._directory.ids(wanted)
            targets = [Target(account=account, mailbox=into) for account in wanted if account in known]
            if not targets:
                self._left(found, key, "none of its accounts is known")
                return
            await self._deliver(_other(key), key, commit, targets, disk)
        except (CopyMissing, CopyDamaged, ValueError, NodeTrouble) as error:
            self._left(found, key, str(error))
            return
        found.entered += 1

    async def _deliver(self, other: bytes, key: bytes, commit: Commit, targets: list[Target], disk: StorageNode) -> None:
        message = Replication(self._world, self._cluster, self._packer, other)
        digest = hashlib.sha256()
        try:
            for number in range(len(commit.sizes)):
                octets = self._inflater.octets(await disk.read_chunk(key, number))
                digest.update(octets)
                await message.write(octets)
            if digest.hexdigest() != commit.sha256:
                raise CopyDamaged("it has another SHA-256 than was accepted")
        except BaseException:
            await message.cancel()
            raise

        def make(octets: int, sha256: str, sizes: list[int]) -> Commit:
            return msgspec.structs.replace(commit, octets=octets, sha256=sha256, sizes=sizes, targets=targets)

        record, receipts = await message.commit(make)
        outcome = await self._index.deliver(Delivery(other, record, receipts))
        if outcome not in (Outcome.ENTERED, Outcome.KNOWN):
            raise NotRedundant(f"{key.hex()} was decided otherwise while it was stored: say it again")
        self._world.counters.add("keeper.salvaged")
        self._world.log.event(Event.RECONCILED, key=other, by="salvage")


def _other(key: bytes) -> bytes:
    """The key under which what was salvaged is mail: the same each time, of the same moment, and a UUID of version 7."""
    made = bytearray(key[:6] + hashlib.sha256(b"salvaged" + key).digest()[:10])
    made[6] = 0x70 | made[6] & 0x0F
    made[8] = 0x80 | made[8] & 0x3F
    return bytes(made)
