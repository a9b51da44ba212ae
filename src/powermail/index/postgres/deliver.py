"""Owns entering messages, on PostgreSQL: a batch is one transaction of few statements, in the order of law 7.

Insert the keys; look, in a later statement, at the watermarks; lock the mailboxes by id and enter; the writer slot last. Keys,
and mailboxes, are always taken in one order, so that those who write wait for each other and never in a ring.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from powermail.base import limits
from powermail.base.errors import IndexTrouble
from powermail.base.world import World
from powermail.index import laws
from powermail.index.contract import Delivery, Fate, Outcome, QueueRow
from powermail.index.postgres.connection import IN_THE_WAY
from powermail.index.postgres.reading import ReadPart
from powermail.index.postgres.statements import Ids, Writer
from powermail.index.sql import queue_form
from powermail.index.sql.core import NO_NODES
from powermail.index.sql.engine import Again, Transaction, Untouched, split
from powermail.mail.envelope import Commit
from powermail.storage.contract import Position

_TRIES = 2  # of a batch that others stand in the way of; then it is halved
_ROUND = "(SELECT value FROM counters WHERE name = 'round')"
_CLAIM = (
    "INSERT INTO messages SELECT m.key, m.octets, m.sha256, m.placement, m.refs, 1, 0"
    " FROM unnest(?::bytea[], ?::bigint[], ?::bytea[], ?::bigint[], ?::bigint[]) AS m(key, octets, sha256, placement, refs)"
    " ORDER BY m.key ON CONFLICT (key) DO NOTHING RETURNING key"
)
# Law 7: which receipts lie behind a watermark, or are of another incarnation. And what else must be known to enter.
_BEHIND = (
    " LEFT JOIN nodes n ON n.id = r.node WHERE n.id IS NULL OR n.incarnation <> r.incarnation"
    " OR r.segment < n.segment OR (r.segment = n.segment AND r.place < n.place)"
)
_SETTLED = (
    "SELECT DISTINCT r.key FROM unnest(?::bytea[], ?::text[], ?::text[], ?::bigint[], ?::bigint[])"
    f" AS r(key, node, incarnation, segment, place){_BEHIND}"
)
_WHAT = (
    "(SELECT count(*) FROM unnest(?::text[], ?::text[], ?::bigint[], ?::bigint[])"
    f" AS r(node, incarnation, segment, place){_BEHIND}),"
    " (SELECT array_agg(p.account) FROM purged p WHERE p.account = ANY(?::text[])),"
    " (SELECT count(*) FROM placements s JOIN unnest(?::bigint[], ?::text[]) AS w(id, nodes)"
    " ON w.id = s.id AND w.nodes = s.nodes) AS sets,"
    " (SELECT value FROM counters WHERE name = 'epoch') AS epoch, (SELECT value FROM counters WHERE name = 'starts') AS starts,"
    " (SELECT value FROM counters WHERE name = 'waiting') AS waiting"
)
_LOCK = (
    "SELECT m.id, m.account, m.name, m.uid_next, m.modseq, m.uidvalidity, m.epoch, m.start, m.base_uid, m.base_modseq"
    " FROM mailboxes m JOIN unnest(?::text[], ?::text[]) AS w(account, name) ON m.account = w.account AND m.name = w.name"
    " ORDER BY m.id FOR UPDATE OF m"
)
_LOCK_BOTH = (  # those that messages arrive in, and those that show what dies
    "SELECT id FROM mailboxes WHERE id IN (SELECT m.id FROM mailboxes m JOIN unnest(?::text[], ?::text[]) AS w(account, name)"
    " ON m.account = w.account AND m.name = w.name UNION SELECT mailbox FROM entries WHERE key = ANY(?))"
    " ORDER BY id FOR UPDATE"
)
_LOOK = f"SELECT {_WHAT}"
_LOOK_AND_LOCK = (  # both are behind the insert: one statement does where every mailbox was there once
    f"WITH boxes AS MATERIALIZED ({_LOCK}) SELECT look.*, b.* FROM (SELECT {_WHAT}) AS look LEFT JOIN boxes b ON true"
)
_LOOKED = 6  # columns of `_WHAT`
_EXIST = (
    "SELECT m.account, m.name FROM mailboxes m JOIN unnest(?::text[], ?::text[]) AS w(account, name)"
    " ON m.account = w.account AND m.name = w.name"
)
_MAKE = (
    "INSERT INTO mailboxes (id, account, name, uidvalidity, uid_next, modseq, epoch, start, base_uid, base_modseq, messages,"
    " octets) SELECT w.id, w.account, w.name, 0, 1, 1, ?, ?, 1, 1, 0, 0"
    " FROM unnest(?::bigint[], ?::text[], ?::text[]) AS w(id, account, name)"
    " ORDER BY w.account, w.name ON CONFLICT (account, name) DO NOTHING RETURNING id"
)
_ENTER = (
    "WITH numbered AS (UPDATE mailboxes m SET uid_next = m.uid_next + c.count, modseq = m.modseq + c.count,"
    " messages = m.messages + c.count, octets = m.octets + c.octets,"
    " due_at = CASE WHEN m.due_at = 0 OR m.due_at > c.due_at THEN c.due_at ELSE m.due_at END"
    " FROM unnest(?::bigint[], ?::bigint[], ?::bigint[], ?::float8[]) AS c(id, count, octets, due_at) WHERE m.id = c.id"
    " RETURNING m.id, m.uid_next - c.count AS uid, m.modseq - c.count AS modseq)"
    " INSERT INTO entries SELECT a.mailbox, n.uid + a.place, a.key, a.flags, n.modseq + a.place + 1, a.octets, a.received_at"
    " FROM unnest(?::bigint[], ?::bigint[], ?::bytea[], ?::bigint[], ?::bigint[], ?::float8[])"
    " AS a(mailbox, place, key, flags, octets, received_at) JOIN numbered n ON n.id = a.mailbox"
)


_Rows: TypeAlias = Sequence[Sequence[Any]]  # of `_LOCK`


class _Box(NamedTuple):
    """A mailbox that mail arrives in, locked, with room for what comes."""

    id: int
    due_at: float


class DeliverPart(ReadPart):
    """`deliver` of `index.contract.Copies` on PostgreSQL, and entering what reconcile and walks find."""

    def __init__(self, world: World, url: str, ids: Ids | None = None) -> None:
        super().__init__(world, url, ids)
        # Hints: each is looked at in the transaction that goes by it.
        self._seen: set[tuple[str, str]] = set()  # mailboxes that were there once
        self._sets: dict[str, int] = {}  # the numbers of sets of nodes

    # -- batches ---------------------------------------------------------------------------------------------------------

    def _enter_batch(self, batch: list[Delivery]) -> asyncio.Future[list[Outcome | Exception]]:
        return self._start(self._deliver_batch(batch))

    def _entered(self, deliveries: Iterable[Delivery]) -> None:
        """Nothing is remembered of them."""

    async def _deliver_batch(self, batch: list[Delivery]) -> list[Outcome | Exception]:
        """One transaction for all; if others stand in its way, or one bad delivery spoils it, one for each half."""
        try:
            tries = _TRIES if len(batch) > 1 else limits.INDEX_TRIES_MAX
            sets: dict[str, int] = {}
            outcomes: list[Outcome] = await self._change(self._in_deliver, (batch, sets), tries)
            self._sets.update(sets)  # not before they are committed
            return list(outcomes)
        except IndexTrouble as error:
            if len(batch) == 1 or not isinstance(error.__cause__, (*IN_THE_WAY, *self.SPOILT)):
                return [error] * len(batch)
        half = len(batch) // 2
        return [*await self._deliver_batch(batch[:half]), *await self._deliver_batch(batch[half:])]

    # -- one batch -------------------------------------------------------------------------------------------------------

    async def _in_deliver(
        self, db: Writer, batch: list[Delivery], sets: dict[str, int]
    ) -> list[Outcome] | Untouched[list[Outcome]]:
        """`sets` gets the numbers of the sets of nodes that it asked for."""
        first: dict[bytes, Delivery] = {}
        for delivery in batch:
            first.setdefault(delivery.key, delivery)
        placements = await self._placements(db, first.values(), sets)
        rows = [
            (key, d.commit.shown_octets, bytes.fromhex(d.commit.sha256), placements[key], len(d.commit.targets))
            for key, d in sorted(first.items())
        ]
        claimed = {row[0] for row in await db.rows(_CLAIM, _columns(rows, 5))}  # law 3
        outcomes: dict[bytes, Outcome] = {}
        if len(claimed) < len(first):
            outcomes = await self._in_decided(db, [key for key in first if key not in claimed])
        live: list[tuple[bytes, Commit]] = []
        if claimed:
            settled, purged, boxes = await self._in_look(db, [first[key] for key in first if key in claimed], placements)
            if settled:  # it was decided before: the insert is undone (law 7)
                await db.change("DELETE FROM messages WHERE key = ANY(?)", (sorted(settled),))
                outcomes.update(dict.fromkeys(settled, Outcome.SETTLED))
            entering = [(key, first[key].commit) for key in first if key in claimed and key not in settled]
            live = await self._in_arrive_all(db, entering, purged, placements, boxes)
            for key, _ in entering:
                outcomes[key] = Outcome.KNOWN
            for key, _ in live:
                outcomes[key] = Outcome.ENTERED
        seen: set[bytes] = set()
        answers = []
        for delivery in batch:
            outcome = outcomes[delivery.key]
            answers.append(Outcome.KNOWN if outcome is Outcome.ENTERED and delivery.key in seen else outcome)
            seen.add(delivery.key)
        changed = any(key in claimed and outcome is not Outcome.SETTLED for key, outcome in outcomes.items())
        return answers if changed else Untouched(answers)

    async def _placements(self, db: Writer, deliveries: Iterable[Delivery], sets: dict[str, int]) -> dict[bytes, int]:
        """The number of each one's set of nodes: as it was the last time, which the look behind the insert compares."""
        nodes = {delivery.key: " ".join(sorted({receipt.node for receipt in delivery.receipts})) for delivery in deliveries}
        known = {each: self._sets[each] for each in nodes.values() if each in self._sets}
        unknown = sorted({*nodes.values()} - known.keys())
        await db.placements.need(unknown)
        for each in unknown:
            known[each] = sets[each] = await db.placements.id(split(each))
        return {key: known[each] for key, each in nodes.items()}

    async def _in_decided(self, db: Writer, keys: Sequence[bytes]) -> dict[bytes, Outcome]:
        """Law 3: who inserted first has decided; a row that has gone meanwhile was settled."""
        fates = dict(await db.rows("SELECT key, fate FROM messages WHERE key = ANY(?)", (list(keys),)))
        found = {}
        for key in keys:
            fate = fates.get(key)
            aborted = Outcome.ABORTED if fate == Fate.ABORTED else Outcome.KNOWN
            found[key] = Outcome.SETTLED if fate is None else aborted
        return found

    async def _in_look(
        self, db: Writer, deliveries: Sequence[Delivery], placements: Mapping[bytes, int]
    ) -> tuple[set[bytes], set[str], _Rows | None]:
        """Law 7, behind the insert: keys that were settled before, and accounts that were purged. And the rows of mailboxes,
        locked, if each of them was there once; what is missing is made before any is locked.
        """
        lowest: dict[tuple[str, str], Position] = {}  # few, however many were delivered
        for delivery in deliveries:
            for node, disk, position in delivery.receipts:
                if position < lowest.get((node, disk), _END):
                    lowest[node, disk] = position
        names = list(_names(delivery.commit for delivery in deliveries))
        accounts = sorted({account for account, _ in names})
        sets = {placements[d.key]: " ".join(sorted({receipt.node for receipt in d.receipts})) for d in deliveries}
        marks = [(node, disk, *position) for (node, disk), position in sorted(lowest.items())]
        looked = [*_columns(marks, 4), accounts, list(sets), list(sets.values())]
        rows: _Rows | None = None
        if names and self._seen.issuperset(names):
            found = await db.rows(_LOOK_AND_LOCK, [*_columns(names, 2), *looked])
            row, rows = found[0], [each[_LOOKED:] for each in found if each[_LOOKED] is not None]
        else:
            row = await db.one(_LOOK, looked)
        if row[2] != len(sets):
            self._sets.clear()
            raise Again("a node was expelled meanwhile")
        db.know_counters({"epoch": row[3], "starts": row[4], "waiting": row[5]})
        await self._in_may_number(db)  # law 11: the epoch, too, is read behind the insert
        settled: set[bytes] = set()
        if row[0]:
            receipts = [(d.key, r.node, r.incarnation, *r.position) for d in deliveries for r in d.receipts]
            settled = {each[0] for each in await db.rows(_SETTLED, _columns(receipts, 5))}
        return settled, set(row[1] or ()), rows

    # -- arriving --------------------------------------------------------------------------------------------------------

    async def _in_arrive_all(
        self, db: Writer, entering: Sequence[tuple[bytes, Commit]], purged: set[str], placements: Mapping[bytes, int],
        rows: _Rows | None = None,
    ) -> list[tuple[bytes, Commit]]:  # fmt: skip
        """Fills mailboxes and queue for messages whose rows are there, with a reference for each target; those that are live:
        what has no target left is dead at once (law 13).
        """
        copies: list[tuple[bytes, Commit, str, str, int]] = []
        queue: list[QueueRow] = []
        returns: list[tuple[str, str, float]] = []
        live, fewer, dead = [], [], []
        for key, commit in entering:
            left = 0
            for target in commit.targets:
                if target.destination:
                    queue.append(QueueRow.of(0, key, commit, target))
                    if target.original:
                        until = commit.received_at + limits.RETURN_S
                        returns.append((target.reverse_path.lower(), target.original, until))
                elif target.account in purged:
                    continue
                else:
                    copies.append((key, commit, target.account, target.mailbox, target.flags))
                left += 1
            if left:
                live.append((key, commit))
            else:
                dead.append(key)
            if left != len(commit.targets):
                fewer.append((left, key))
        if fewer:
            await db.many("UPDATE messages SET refs = ? WHERE key = ?", fewer)
        if dead:
            await self._in_dead_at_once(db, dead, placements)
        if copies:
            await self._in_copies(db, copies, rows)
        if queue:
            rows = [queue_form.values(row, db.new_id("queue")) for row in queue]
            await db.put(queue_form.INSERT, queue_form.WIDTH, rows)
        if db.made:
            await self._in_name(db, [number for number, _ in db.made], [account for _, account in db.made])
            db.made.clear()
        if returns:
            await db.many(queue_form.ADD_RETURN, sorted(returns))
        self.numbered += len(copies)
        return live

    async def _in_dead_at_once(self, db: Writer, keys: Sequence[bytes], placements: Mapping[bytes, int]) -> None:
        """Orders for its nodes come with it (laws 8, 13)."""
        pairs = [(node, key) for key in keys for node in await db.placements.nodes(placements[key])]
        await db.many(
            f"UPDATE messages SET refs = 0, fate = 2, placement = {NO_NODES}, round = {_ROUND} WHERE key = ?",
            [(key,) for key in keys],
        )
        await self._in_order(db, pairs)

    async def _in_copies(self, db: Writer, copies: Sequence[tuple[bytes, Commit, str, str, int]], locked: _Rows | None) -> None:
        """Enters copies (key, record, account, mailbox, flags) in order."""
        names = list(dict.fromkeys((account, name) for _, _, account, name, _ in copies))
        if locked is None:
            await self._in_make_missing(db, names)
            locked = await db.rows(_LOCK, _columns(names, 2))
        boxes = await self._in_boxes(db, copies, names, locked)
        due_at = self._world.clock.now() + limits.CHECKPOINT_INTERVAL_S
        count, octets = dict.fromkeys(boxes, 0), dict.fromkeys(boxes, 0)
        rows = []
        for key, commit, account, name, flags in copies:
            at = account, name
            rows.append((boxes[at].id, count[at], key, flags, commit.shown_octets, commit.received_at))
            count[at] += 1
            octets[at] += commit.shown_octets
        changes = [(box.id, count[at], octets[at], box.due_at or due_at) for at, box in boxes.items()]
        entered = await db.change(_ENTER, [*_columns(changes, 4), *_columns(rows, 6)])
        if entered != len(rows):
            raise Again("a mailbox has gone meanwhile")

    async def _in_make_missing(self, db: Writer, names: Sequence[tuple[str, str]]) -> None:
        """Makes the mailboxes that are not there; new ones by name, before any is locked."""
        unknown = [at for at in names if at not in self._seen]
        if not unknown:
            return
        there = {(row[0], row[1]) for row in await db.rows(_EXIST, _columns(unknown, 2))}
        missing = [at for at in unknown if at not in there]
        if len(self._seen) > limits.DIRECTORY_CACHE_MAX:
            self._seen.clear()
        self._seen.update(there)
        if not missing:
            return
        rows = [(db.new_id("mailboxes"), *at) for at in missing]
        numbers = await db.counter("epoch"), await db.counter("starts")
        made = {row[0] for row in await db.rows(_MAKE, [*numbers, *_columns(rows, 3)])}
        db.made += [(number, account) for number, account, _ in rows if number in made]  # the others were made meanwhile

    async def _in_boxes(
        self, db: Writer, copies: Sequence[tuple[bytes, Commit, str, str, int]], names: Sequence[tuple[str, str]], rows: _Rows
    ) -> dict[tuple[str, str], _Box]:
        """They were locked by id, and are made ready for so many numbers (laws 10, 11). Raises NumbersSpent."""
        count = dict.fromkeys(names, 0)
        for _, _, account, name, _ in copies:
            count[account, name] += 1
        epoch, starts, now = await db.counter("epoch"), await db.counter("starts"), self._world.clock.now()
        boxes: dict[tuple[str, str], _Box] = {}
        for number, account, name, *values in rows:
            coming = count.get((account, name), 0)
            if not coming:
                continue  # what was for it was settled before
            numbers = laws.Numbers(*values)
            plain = numbers.epoch == epoch and numbers.start == starts and numbers.uid_next < _UIDS_LEFT
            if not plain or numbers.uid_next + coming - numbers.base_uid > limits.EPOCH_JUMP:
                numbers = await self._in_renumber(db, number, coming)
            after = numbers._replace(uid_next=numbers.uid_next + coming, modseq=numbers.modseq + coming)
            boxes[account, name] = _Box(number, now if laws.needs_checkpoint(after) else 0.0)
        if len(boxes) != len(names):
            self._seen.clear()
            raise Again("a mailbox has gone meanwhile")
        return boxes

    async def _in_hold_boxes(self, db: Transaction, entering: Sequence[tuple[bytes, Commit]], dying: Sequence[bytes]) -> None:
        assert isinstance(db, Writer)
        if not dying:
            return  # entering locks what it needs at once
        names = _names(commit for _, commit in entering)
        gone = await self._purged_of(db, names)
        names = {at: None for at in names if at[0] not in gone}
        await self._in_make_missing(db, list(names))
        await db.rows(_LOCK_BOTH, [*_columns(list(names), 2), sorted(dying)])
        await db.lock_queue_of(dying)

    async def _purged_of(self, db: Writer, names: Iterable[tuple[str, str]]) -> set[str]:
        accounts = sorted({account for account, _ in names})
        return {row[0] for row in await db.rows("SELECT account FROM purged WHERE account = ANY(?)", (accounts,))}

    # -- what reconcile and walks find -----------------------------------------------------------------------------------

    async def _in_claim(self, db: Transaction, keys: Sequence[bytes]) -> set[bytes]:
        rows = [(key, 0, b"", NO_NODES, 0) for key in sorted(keys)]
        return {row[0] for row in await db.rows(_CLAIM, _columns(rows, 5))} if rows else set()

    async def _in_enter_found(self, db: Transaction, node: str, found: Sequence[tuple[bytes, Commit]]) -> int:
        assert isinstance(db, Writer)
        if not found:
            return 0
        placement = await db.placements.id([node])
        await db.many(
            "UPDATE messages SET octets = ?, sha256 = ?, placement = ?, refs = ? WHERE key = ?",
            [(c.shown_octets, bytes.fromhex(c.sha256), placement, len(c.targets), key) for key, c in sorted(found, key=_key)],
        )
        purged = await self._purged_of(db, _names(commit for _, commit in found))
        placements = {key: placement for key, _ in found}
        return len(await self._in_arrive_all(db, found, purged, placements))


_UIDS_LEFT = limits.UID_MAX - limits.EPOCH_JUMP
_END = Position(1 << 63, 0)


def _key(found: tuple[bytes, Commit]) -> bytes:
    return found[0]


def _names(commits: Iterable[Commit]) -> dict[tuple[str, str], None]:
    """The mailboxes of these messages, each once, in order."""
    return {(to.account, to.mailbox): None for commit in commits for to in commit.targets if not to.destination}


def _columns(rows: Sequence[Sequence[Any]], width: int) -> list[list[Any]]:
    """Rows as arrays, one a column."""
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(width)]
