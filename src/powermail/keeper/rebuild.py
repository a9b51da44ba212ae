"""Owns the rebuild of an index from the nodes alone (P15, law 13).

What mailboxes show comes from their checkpoints, what came later from the commit records. Only a tombstone, PURGED, or a
checkpoint that names the key as expunged from that mailbox, deletes: a message that is merely not in a checkpoint is entered.
A recipient elsewhere is done if the queue's checkpoint says so; else its row is held, and the operator decides. The new index
grows under another name, with memory for one mailbox and one page of keys, and is renamed when it is whole and durable and
nodes of R groups know its epoch. An unfinished one is never served; a second run begins anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import msgspec

from powermail.base import limits
from powermail.base.errors import CopyDamaged, CopyMissing, NodeTrouble, NotRedundant, OperatorError
from powermail.base.log import Event
from powermail.base.sqlite_files import present, put_in_place, remove
from powermail.base.world import World
from powermail.index.contract import Fate, Head, NodeRow
from powermail.index.rebuilding import Found, LostEntry, Rebuilding, RecordPlace, Verdict, begin
from powermail.keeper.checkpoint import heads_record, pages_of, write_heads
from powermail.keeper.checkpoint_form import (
    FIRST_RELEASE_MARK,
    HEADS_MAX,
    BadRecord,
    Kind,
    RecordHead,
    decode_head,
    decode_heads,
    decode_queue,
    is_first_release,
)
from powermail.keeper.restored import FIRST, Restored, restored, shown_by
from powermail.mail.envelope import Commit, Target
from powermail.storage.contract import START, Held, Mark, NodeFacts, Position, StorageNode

Progress = Callable[[int, int], Awaitable[None]]
_PAGE = 500  # keys, and mailboxes, taken at a time
_COMMITS_AT_ONCE = 32
_NAMED_MAX = 10_000  # of what was lost, named one by one; the rest is counted
_QUEUE_STATES_MAX = 32
_EPOCHS_UNKNOWN = 16  # how many leaps of UIDVALIDITY may have gone unseen when too few groups could be read


class Rebuilt(NamedTuple):
    """What a rebuild did, and what could not be had. `lost` and `unreadable_keys` name the first of them."""

    mailboxes: int
    messages: int
    entries: int
    deleted: int  # keys that nodes still held, and that a tombstone, PURGED, a checkpoint or the queue's state ends
    held_rows: int
    entries_lost: int
    unreadable: int
    passed_over: int  # keys that only a disk of an earlier state held, and that no mailbox showed (law 12)
    records_bad: int
    lost: tuple[LostEntry, ...]
    unreadable_keys: tuple[str, ...]
    left_out: tuple[str, ...]  # what each node that was left out may cost
    began_anew: str = ""  # why what an earlier run had read was not used


class Source(NamedTuple):
    """A node that is read, and what it said before anything of it was read."""

    node: StorageNode
    facts: NodeFacts
    end: Position


class QueueState(NamedTuple):
    """One checkpoint of the queue: its bit, and how far each node's log was settled then."""

    number: int
    watermarks: dict[str, tuple[str, Position]]


class _Counts:
    """What was met on the way."""

    def __init__(self) -> None:
        self.mailboxes = self.messages = self.entries = self.deleted = self.held = self.passed_over = 0
        self.unreadable = self.bad = 0
        self.unreadable_keys: list[str] = []


def is_done(found: Found, destination: str) -> bool:
    """True if some checkpoint of the queue lies behind a copy of the message and does not name the recipient (law 13)."""
    return any(
        found.settled >> state & 1 and (state, destination) not in found.open for state in range(found.settled.bit_length())
    )


def decide(found: Found, commit: Commit, purged: Collection[str]) -> Verdict:
    """What becomes of a message that some node holds and no tombstone ends (law 13)."""
    shown, gone = set(found.shown), {(account, mailbox) for account, mailbox, _ in found.gone}
    lives_in = {account for account, _ in shown}
    left = {account for account, _, left in found.gone if left}
    enter: dict[tuple[str, str], Target] = {}
    doubtful: list[Target] = []
    for target in commit.targets:
        box = target.account, target.mailbox
        if target.destination or target.account in purged or box in shown or box in enter:
            continue
        if box in gone:
            doubtful.append(target)
        elif not found.old:  # law 12
            enter[box] = target
            lives_in.add(target.account)
    for target in doubtful:
        # It left this mailbox for another of the account, whose checkpoint does not show it: it must not be lost between them.
        if target.account not in lives_in and target.account not in left:
            enter[target.account, target.mailbox] = target
            lives_in.add(target.account)
    forwards = [target for target in commit.targets if target.destination]
    hold = tuple(target for target in forwards if not found.old and not is_done(found, target.destination))
    if shown or enter or hold:
        return Verdict(found.key, Fate.LIVE, found.nodes, commit, tuple(enter.values()), hold)
    # Of what only an older disk has, one target says nothing of the others: a node that was left out may have them (law 12).
    over = left.union(purged)
    done = (is_done(found, target.destination) if target.destination else target.account in over for target in commit.targets)
    dead = bool(commit.targets) and all(done)
    return Verdict(found.key, Fate.DEAD if dead else None, found.nodes)


class Rebuilder:
    """Makes the index at `path` anew. `without` names nodes that are not read, because they cannot be."""

    def __init__(
        self,
        world: World,
        nodes: Sequence[StorageNode],
        path: str,
        cluster: str,
        copies_required: int,
        progress: Progress,
        without: Collection[str] = (),
        set_aside: Callable[[], None] | None = None,
    ) -> None:
        """`set_aside` makes room under the name when the new index is whole: before it, the old one stays where it is."""
        self._set_aside = set_aside
        self._world = world
        self._nodes = nodes
        self._path = path
        self._building = f"{path}.building"
        self._cluster = cluster
        self._required = copies_required
        self._progress = progress
        self._without = without
        self._counts = _Counts()
        self._states: list[QueueState] = []
        self._queue: dict[bytes, list[bytes]] = {}  # the newest states of the queue that were found whole, by tag
        self._queue_rank = 0, 0
        self._epoch = 0  # highest known
        self._uidvalidity = 0
        self._unsure = False  # too few groups are read to know the highest epoch
        self._groups_needed = copies_required  # to take what must be durable
        self._thin: list[Head] = []  # what the index goes on from, and too few groups show
        self._thin_records: list[tuple[bytes, bytes]] = []  # the same, packed

    async def run(self) -> Rebuilt:
        """Reads every node and makes the index. Raises OperatorError, Trouble."""
        await self._clear()
        sources = await self._sources()
        index = await begin(self._world, self._building, self._cluster)
        try:
            mark = await self._fill(index, sources)
        finally:
            await index.close()
        result = self._result
        await self._tell(sources, mark)
        await self._on_disk(self._publish)
        self._world.log.event(Event.RECONCILED, messages=result.messages, by="rebuild")
        return result

    async def _fill(self, index: Rebuilding, sources: Sequence[Source]) -> Mark:
        marks = [source.facts.mark for source in sources]
        self._epoch = max([1, *(mark.epoch for mark in marks)])
        self._uidvalidity = max([0, *(mark.uidvalidity for mark in marks)])
        for source in sources:
            await self._read_records(index, source.node)
        await self._take_queue(index)
        leaps = _EPOCHS_UNKNOWN if self._unsure else 1
        await index.begin_numbers(self._epoch + 1, self._uidvalidity + leaps * limits.EPOCH_JUMP)  # law 11
        await self._put_mailboxes(index, {source.node.id: source.node for source in sources})
        for source in sources:
            await self._read_inventory(index, source)
        await self._settle(index, {source.node.id: source.node for source in sources})
        left_out = [node for node in self._nodes if node.id in self._without]
        if left_out:
            await index.bury_on([node.id for node in left_out])
        lost_total, lost = await index.lost(_NAMED_MAX)
        counts = self._counts
        self._result = Rebuilt(
            mailboxes=counts.mailboxes, messages=counts.messages, entries=counts.entries, deleted=counts.deleted,
            held_rows=counts.held, entries_lost=lost_total, unreadable=counts.unreadable, passed_over=counts.passed_over,
            records_bad=counts.bad, lost=tuple(lost), unreadable_keys=tuple(counts.unreadable_keys),
            left_out=tuple(_cost(node) for node in left_out),
        )  # fmt: skip
        sequence = max([0, *(max([mark.sequence, *mark.slots]) for mark in marks)])
        retired = sorted({incarnation for mark in marks for incarnation in mark.retired})
        return await index.finish([*map(_row, sources), *map(self._absent, left_out)], sequence, retired)

    # -- nodes ----------------------------------------------------------------------------------------------------------

    async def _sources(self) -> list[Source]:
        """The nodes to be read, each with the end of its log before anything of it is read. Raises OperatorError."""
        unknown = sorted(set(self._without) - {node.id for node in self._nodes})
        if unknown:
            raise OperatorError(f"there is no node {unknown[0]!r} to leave out")
        sources = []
        for node in self._nodes:
            if node.id in self._without:
                continue
            try:
                facts = await node.facts()
                stamp = await node.fresh_stamp()
                # Who still writes is waited for, so that what lies before the end is all that is shown (laws 2, 7).
                end = facts.end if stamp is None else await node.fence(stamp)
            except NodeTrouble as error:
                choice = f"bring it back, or leave it out with --without {node.id}: {_cost(node)}"
                raise OperatorError(f"node {node.id} cannot be read: {error}; {choice}") from error
            sources.append(Source(node, facts, end))
        if not sources:
            raise OperatorError("there is no node to read")
        retired = {incarnation for source in sources for incarnation in source.facts.mark.retired}
        for source in sources:
            if source.facts.incarnation in retired:
                name = source.node.id
                raise OperatorError(f"node {name} was expelled: empty its directory, or leave it out with --without {name}")
        groups = {node.group for node in self._nodes}
        read = {source.node.group for source in sources} - {node.group for node in self._nodes if node.id in self._without}
        self._unsure = len(read) < len(groups) - self._required + 1  # law 11
        self._groups_needed = min(self._required, len({source.node.group for source in sources}))
        return sources

    def _absent(self, node: StorageNode) -> NodeRow:
        """A node that was left out is a member: when it returns, all of it is unseen."""
        return NodeRow(node.id, node.group, "", START, START, "", 0, False, False, self._world.clock.now())

    async def _tell(self, sources: Sequence[Source], mark: Mark) -> None:
        """The epoch must be durable on nodes of R groups before a number is given in it (law 11). Raises NotRedundant."""
        groups: dict[str, None] = {}
        cause: NodeTrouble | None = None
        for source in sources:
            try:
                await source.node.put_mark(mark)
                groups[source.node.group] = None
            except NodeTrouble as error:
                cause = error
        required = self._groups_needed
        if len(groups) < required:
            raise NotRedundant(f"only {len(groups)} of {required} groups took the new epoch") from cause
        self._pack_thin()
        for record in self._thin_records:  # law 11: what too few groups show is durable before a number is given beyond it
            await write_heads([source.node for source in sources], required, record, mark)

    # -- checkpoints ------------------------------------------------------------------------------------------------------

    async def _read_records(self, index: Rebuilding, node: StorageNode) -> None:
        """Where complete records lie, what they say of numbers; PURGED and the queue's states at once."""
        async for page in pages_of(node):
            places: list[tuple[str, str, RecordPlace]] = []
            seen: list[Head] = []
            purged: list[str] = []
            for name, group in groupby(page, key=lambda record: record[0]):
                if name == FIRST_RELEASE_MARK:
                    continue
                for parts in self._by_writing(node, [octets for _, _, octets in group]):
                    head = parts[0][0]
                    if head.kind is Kind.PURGED:
                        purged.append(head.account)
                    elif head.kind is Kind.QUEUE:
                        self._find_queue(node, parts)
                    elif head.kind is Kind.HEADS:
                        seen += self._far_heads(node, parts)
                    else:
                        seen += [h.numbers() for h, _ in parts]
                        place = _place(node, name, parts)
                        if place is not None:
                            places.append((head.account, head.name, place))
            for numbers in seen:
                self._epoch = max(self._epoch, numbers.epoch)
                self._uidvalidity = max(self._uidvalidity, numbers.uidvalidity)
            await index.note_numbers(node.group, seen)
            await index.note_records(places)
            await index.note_purged(purged)

    def _by_writing(self, node: StorageNode, records: Sequence[bytes]) -> Iterator[list[tuple[RecordHead, bytes]]]:
        """Records of one name by what was written at once."""
        parts: dict[bytes, list[tuple[RecordHead, bytes]]] = {}
        for octets in records:
            try:
                head = decode_head(octets)
            except BadRecord as error:
                self._bad(node, error)
            else:
                parts.setdefault(head.tag, []).append((head, octets))
        yield from parts.values()

    def _bad(self, node: StorageNode, error: BadRecord) -> None:
        self._counts.bad += 1
        self._world.log.event(Event.NODE_DAMAGE, node=node.id, error=str(error))

    def _far_heads(self, node: StorageNode, parts: list[tuple[RecordHead, bytes]]) -> list[Head]:
        try:
            return [each for _, octets in parts for each in decode_heads(octets)]
        except BadRecord as error:
            self._bad(node, error)
            return []

    def _find_queue(self, node: StorageNode, parts: list[tuple[RecordHead, bytes]]) -> None:
        """The newest one counts, whoever wrote an older one later; of those without a rank all do (laws 11, 13)."""
        head = parts[0][0]
        if head.tag in self._queue or head.rank() < self._queue_rank or not _whole(parts):
            return
        try:
            for _, octets in parts:
                decode_queue(octets)
        except BadRecord as error:
            self._bad(node, error)
            return
        if head.rank() > self._queue_rank:
            self._queue, self._queue_rank = {}, head.rank()
        if len(self._queue) < _QUEUE_STATES_MAX:
            self._queue[head.tag] = [octets for _, octets in parts]

    async def _take_queue(self, index: Rebuilding) -> None:
        """What waits by the states that count, and how far logs were settled then."""
        for records in self._queue.values():
            bodies = [decode_queue(octets) for octets in records]
            state = QueueState(len(self._states), bodies[0][1])
            for _, _, rows in bodies:
                await index.note_open(state.number, rows)
            self._states.append(state)
        self._queue.clear()

    async def _put_mailboxes(self, index: Rebuilding, nodes: dict[str, StorageNode]) -> None:
        after = "", ""
        while boxes := await index.boxes(after, _PAGE):
            for account, name in boxes:
                state = await self._restored(index, nodes, account, name)
                if state is None:
                    continue  # nothing is complete: whatever is entered comes under a fresh UIDVALIDITY
                numbers = state.numbers._replace(uidvalidity=0) if self._unsure else state.numbers
                await index.put_mailbox(account, name, numbers, state.keywords, state.view.rows(), state.gone.items())
                self._counts.mailboxes += 1
            after = boxes[-1]

    async def _restored(self, index: Rebuilding, nodes: dict[str, StorageNode], account: str, name: str) -> Restored | None:
        async def read(place: RecordPlace) -> list[bytes]:
            """Records under a name, which is the first behind the one before it."""
            before = (int.from_bytes(place.name, "big") - 1).to_bytes(len(place.name), "big") if any(place.name) else b""
            page = await nodes[place.node].checkpoints(before, 1)
            return [octets for found, _, octets in page if found == place.name]

        def bad(place: RecordPlace, error: BadRecord) -> None:
            self._bad(nodes[place.node], error)

        seen = await index.numbers(account, name)
        state = await restored(await index.records(account, name), [head for _, head in seen], read, bad)
        n = state.numbers if state is not None and not self._unsure else None
        if n is not None and n.uidvalidity and shown_by(n, seen) < self._groups_needed:
            self._thin.append(Head(account, name, n.uidvalidity, n.uid_next, n.modseq, n.epoch))
            if len(self._thin) == HEADS_MAX:
                self._pack_thin()
        return state

    def _pack_thin(self) -> None:
        if self._thin:
            self._thin_records.append(heads_record(self._world, self._thin))
            self._thin = []

    # -- messages -----------------------------------------------------------------------------------------------------------

    async def _read_inventory(self, index: Rebuilding, source: Source) -> None:
        """Every key the node has."""
        node, after = source.node, b""
        while items := await node.inventory(after, _PAGE):
            copies = [
                (item.key, item.position < source.facts.birth, self._settled(source, item.position))
                for item in items
                if item.held is Held.LIVE
            ]
            await index.note_copies(node.id, copies)
            await index.note_tombstones(node.id, [item.key for item in items if item.held is Held.DEAD])
            after = items[-1].key

    def _settled(self, source: Source, position: Position) -> int:
        """Bits of the queue's states by whose watermark the copy was settled."""
        bits = 0
        for state in self._states:
            incarnation, watermark = state.watermarks.get(source.node.id, ("", START))
            if incarnation == source.facts.incarnation and position < watermark:
                bits |= 1 << state.number
        return bits

    async def _settle(self, index: Rebuilding, nodes: dict[str, StorageNode]) -> None:
        total = await index.total()
        after, done = b"", 0
        while page := await index.found(after, _PAGE):
            commits: list[Commit | None] = []
            for start in range(0, len(page), _COMMITS_AT_ONCE):
                some = page[start : start + _COMMITS_AT_ONCE]
                commits += await asyncio.gather(*(self._commit(found, nodes) for found in some))
            accounts = {target.account for commit in commits if commit is not None for target in commit.targets}
            purged = await index.purged(sorted(accounts))
            verdicts = [self._verdict(found, commit, purged) for found, commit in zip(page, commits, strict=True)]
            settled = await index.settle(verdicts)
            self._counts.entries += settled.entries
            self._counts.held += settled.held
            after, done = page[-1].key, done + len(page)
            await self._progress(done, total)

    def _verdict(self, found: Found, commit: Commit | None, purged: Collection[str]) -> Verdict:
        counts = self._counts
        if found.buried:
            verdict = Verdict(found.key, Fate.DEAD, found.nodes)
        elif commit is None:
            counts.unreadable += 1
            if len(counts.unreadable_keys) < _NAMED_MAX:
                counts.unreadable_keys.append(found.key.hex())
            return Verdict(found.key, None, found.nodes)
        else:
            verdict = decide(found, commit, purged)
        if verdict.fate is Fate.LIVE:
            counts.messages += 1
        elif verdict.fate is Fate.DEAD:
            counts.deleted += 1
        else:
            counts.passed_over += 1
        return verdict

    async def _commit(self, found: Found, nodes: dict[str, StorageNode]) -> Commit | None:
        """The first good commit record; None if every holder has a bad one. Raises NodeTrouble if one could not be asked."""
        if found.buried:
            return None
        trouble: NodeTrouble | None = None
        for name in found.nodes:
            try:
                commit = Commit.parse(await nodes[name].read_commit(found.key))
                if len(bytes.fromhex(commit.sha256)) == 32:
                    return commit
                raise ValueError("no SHA-256")
            except NodeTrouble as error:
                trouble = error
            except (CopyMissing, CopyDamaged, msgspec.DecodeError, ValueError) as error:
                self._world.log.event(Event.COPY_BAD, key=found.key, node=name, error=str(error))
        if trouble is not None:
            raise trouble
        return None

    # -- files ----------------------------------------------------------------------------------------------------------------

    async def _on_disk(self, call: Callable[[], None]) -> None:
        lane = self._world.lane("rebuild-files")
        try:
            await lane.run(call)
        except OSError as error:
            raise OperatorError(f"{self._path}: {error}") from error
        finally:
            lane.close()

    async def _clear(self) -> None:
        """What an earlier run has left goes. Raises OperatorError."""

        def clear() -> None:
            there = present(self._world.disk, self._path)
            if there and self._set_aside is None:
                raise OperatorError(f"{there[0]} exists; move it away first, nothing was changed")
            remove(self._world.disk, self._building)

        await self._on_disk(clear)

    def _publish(self) -> None:
        """The finished file gets its name; both are durable before anybody serves it."""
        if self._set_aside is not None:
            self._set_aside()
        put_in_place(self._world.disk, self._building, self._path)


def _place(node: StorageNode, name: bytes, parts: list[tuple[RecordHead, bytes]]) -> RecordPlace | None:
    """Where a complete checkpoint lies. Those of the first release are put together from all that lie under any name."""
    head, octets = parts[0]
    if is_first_release(octets):
        return RecordPlace(FIRST, b"", node.id, name, head.uidvalidity, 0, head.modseq, 0)
    if not _whole(parts):
        return None
    rank = int(not head.skipped)
    return RecordPlace(int(head.kind), head.tag, node.id, name, head.uidvalidity, head.base, head.modseq, rank)


def _whole(parts: list[tuple[RecordHead, bytes]]) -> bool:
    """True if every part is there."""
    count = max(head.parts for head, _ in parts)
    return count > 0 and sorted({head.part for head, _ in parts}) == list(range(count))


def _row(source: Source) -> NodeRow:
    """What the new index knows of a node it was made from: all that lies before the end is settled."""
    node, facts = source.node, source.facts
    boot = facts.boots[-1] if facts.boots else ""
    return NodeRow(node.id, node.group, facts.incarnation, source.end, source.end, boot, 0, False, False, 0.0)


def _cost(node: StorageNode) -> str:
    """What it may cost to leave a node out."""
    return (
        f"without node {node.id} (group {node.group}), messages of which only it has a copy, and mailboxes whose only complete"
        " checkpoint lies there, are missing until it returns; deletions that only it knows may show again"
    )
