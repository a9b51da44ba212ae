"""All who write lock in one order (`powermail.index.sql`): whatever they do at once, none wait for each other in a ring."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from powermail.base.errors import IndexTrouble, OperatorError
from powermail.index.contract import Attempt, Batch, DropOrder, Fate, FlagChange, Head
from powermail.index.postgres import PostgresIndex
from powermail.index.postgres.statements import Writer, set_number
from powermail.index.sharing import Invitation
from powermail.mail.envelope import Commit, Target
from powermail.storage.contract import START, Dropped, End, Held, Mark, Origin, Position, Receipt, Unread
from powermail.storage.layout import LayoutChange, Standing
from tests.index.sharing import blocked
from tests.index.support import (
    NODES,
    PostgresRig,
    commit,
    deliver,
    delivery,
    elsewhere,
    end_of,
    inbox,
    incarnation,
    key,
    mailbox,
    uids,
)

PROCESSES = 3
AT_ONCE = 4  # callers in each process
CALLS = 25  # of each caller
KEYS, BOXES = 24, 6
FAR = Position(1 << 40, 0)
QUIET = (IndexTrouble, OperatorError, KeyError, ValueError)  # what these calls may be answered with, here: rows come and go


class Writing:
    """One caller, which does anything at all, as chance will have it."""

    def __init__(self, index: PostgresIndex, chance: random.Random, owner: str) -> None:
        self.index, self.chance, self.owner = index, chance, owner

    def key(self) -> int:
        return self.chance.randrange(1, KEYS)

    def keys(self) -> list[int]:
        return self.chance.sample(range(1, KEYS), self.chance.randrange(1, 7))

    def node(self) -> str:
        return self.chance.choice("abc")

    def nodes(self) -> tuple[str, ...]:
        return tuple(self.chance.sample("abc", 2))

    def targets(self) -> list[Target]:
        to = [inbox(f"u{self.chance.randrange(BOXES)}", self.chance.choice(["INBOX", "Sent"])) for _ in range(3)]
        to = list({(each.account, each.mailbox): each for each in to}.values())
        if self.chance.random() < 0.5:
            far = elsewhere(f"far{self.chance.randrange(3)}@example.net")
            to.append(far)
            back = f"r{self.chance.randrange(4)}@example.org"
            to.append(Target(destination="y@example.net", reverse_path=back, original="who@example.com", recipient="z@b"))
        self.chance.shuffle(to)
        return to

    async def boxes(self) -> list[int]:
        found = [facts.id for facts in await self.index.mailboxes(0, 99)]
        self.chance.shuffle(found)
        return found or [0]

    # -- deliveries and what nodes hold --------------------------------------------------------------------------------

    async def deliver(self) -> None:
        now = {row.id: row.incarnation for row in await self.index.node_rows()}
        receipts = tuple([Receipt(node, now.get(node, "gone"), FAR) for node in self.nodes()])
        made = [delivery(number, *self.targets())._replace(receipts=receipts) for number in self.keys()]
        await asyncio.gather(*[self.index.deliver(each) for each in made], return_exceptions=True)

    async def abort(self) -> None:
        await self.index.abort(key(self.key()), self.nodes())

    async def reconcile(self) -> None:
        node = self.node()
        row = next((row for row in await self.index.node_rows() if row.id == node), None)
        if row is None:
            return
        to = Position(row.watermark.segment, row.watermark.offset + 100)
        numbers = self.keys()
        found = [(key(each), to, self.chance.choice([Origin.DELIVERY, Origin.REPAIR])) for each in numbers]
        dead = [key(each) for each in self.keys() if each not in numbers] if row.owes_walk else []
        records = {key(each): commit(each, *self.targets()) for each in numbers}
        unread = [Unread(to, 9)] if self.chance.random() < 0.2 else []
        await self.index.reconcile(Batch(node, row.incarnation, row.watermark, to, to, found, dead, records, START, unread))

    async def walk(self) -> None:
        enter = self.chance.random() < 0.7
        items = [(key(each), self.chance.choice([Held.LIVE, Held.LIVE, Held.DEAD]), FAR) for each in self.keys()]
        records: dict[bytes, Commit] = {at: commit(int.from_bytes(at, "big"), *self.targets()) for at, _, _ in items}
        node = self.node()
        row = next((row for row in await self.index.node_rows() if row.id == node), None)
        if row is not None:
            await self.index.settle_inventory(node, End(row.incarnation, FAR), items, START, records, enter)

    async def believe(self) -> None:
        node, at = self.node(), key(self.key())
        await self.index.believe([at], node, end_of(node, FAR))
        await self.index.note_bad(at, self.node(), "bad")
        await self.index.let_go(at, Receipt(node, incarnation(node), FAR), FAR, NODES, 1)

    async def confirm(self) -> None:
        node = self.node()
        orders, drops = await self.index.orders(node, 9), await self.index.drops(node, 9)
        self.chance.shuffle(orders)
        await self.index.confirm_orders(node, orders, End(incarnation(node), FAR))
        done = [DropOrder(order.key, order.position) for order in drops]
        await self.index.confirm_drops(node, done, Dropped((), End(incarnation(node), FAR)))

    # -- readers ---------------------------------------------------------------------------------------------------------

    async def change(self) -> None:
        box, *others = await self.boxes()
        uids = [entry.uid for entry in await self.index.entries(box, 0, 1 << 32, 9)]
        self.chance.shuffle(uids)
        to = others[0] if others else box
        kind = self.chance.randrange(6)
        if kind == 0:
            await self.index.store(box, uids, FlagChange.ADD, 1 << self.chance.randrange(5), None)
        elif kind == 1:
            await self.index.copy(box, uids[:4], to)
        elif kind == 2:
            await self.index.move(box, uids[:4], to)
        elif kind == 3:
            await self.index.merge(box)
        elif kind == 4:
            await self.index.keyword(box, f"k{self.chance.randrange(9)}")
        else:
            await self.index.expunge(box, uids[:4])

    async def accounts(self) -> None:
        account = f"u{self.chance.randrange(BOXES)}"
        await self.index.make_mailbox(account, self.chance.choice(["INBOX", "Sent", "Junk"]))
        named = [f"u{self.chance.randrange(BOXES)}" for _ in range(4)]
        await self.index.note_owners(dict.fromkeys(named, "a@b"))
        if self.chance.random() < 0.2:
            gone = f"u{BOXES}"
            await self.index.make_mailbox(gone, "INBOX")
            await self.index.purge(self.chance.choice([account, gone]))

    # -- the way out -------------------------------------------------------------------------------------------------------

    async def queue(self) -> None:
        now = 9e9
        rows = await self.index.lease_due(self.owner, now, 60.0, 8)
        self.chance.shuffle(rows)
        kind = self.chance.randrange(8)
        if kind == 0:
            await self.index.finish(rows, self.owner)
        elif kind == 1:
            await self.index.defer(rows, [5.0] * len(rows), Attempt(1.0, "", "", 0.1, "x"), self.owner)
        elif kind == 2:
            await self.index.give_back(rows, self.chance.random(), self.owner)
        elif kind == 3:
            await self.index.renew_leases(self.owner, [row.id for row in rows], 60.0)
        elif kind == 4:
            await self.index.release_leases(self.owner)
        elif kind == 5:
            await self.index.queue_set([], self.chance.choice([True, False]), 1.0)
        elif kind == 6:
            await self.index.queue_set([row.id for row in await self.index.queue_rows(0, 9)], False, 2.0)
        else:
            await self.index.finish(await self.index.queue_rows(0, 3))
        await self.index.forget_returns(9e12 if self.chance.random() < 0.3 else 0.0)

    # -- keepers -----------------------------------------------------------------------------------------------------------

    async def checkpoint(self) -> None:
        boxes = await self.boxes()
        plan = await self.index.checkpoint_plan(boxes[0], self.chance.random() < 0.4)
        if plan is not None:
            await self.index.checkpoint_done(plan, self.nodes(), 0.0)
        if self.chance.random() < 0.3:
            await self.index.checkpoints_lost(self.node())

    async def rounds(self) -> None:
        number = await self.index.raise_round()
        for row in await self.index.node_rows():
            notes = await self.index.unread(row.id, 9)
            here, end = row.watermark, row.end_seen
            await self.index.reconcile(Batch(row.id, row.incarnation, here, here, end, [], [], {}, START, (), number, notes))
        await self.index.forget(20)

    async def heads(self) -> None:
        found = await self.index.mailboxes(0, 99)
        heads = [Head(f.account, f.name, f.uidvalidity, f.uid_next, f.modseq, self.index.epoch) for f in found]
        self.chance.shuffle(heads)
        await self.index.learn_heads(heads)
        await self.index.heads_written(heads, self.index.epoch)

    async def epoch(self) -> None:
        facts = await self.index.epoch_facts()
        if self.chance.random() < 0.2 or facts.why:
            await self.index.raise_epoch([Mark()], "a test says so", facts.epoch)
        await self.index.know_newcomers(facts.newcomers)
        await self.index.begin_epoch(self.index.epoch)
        for row in await self.index.node_rows():
            if self.chance.random() < 0.7:
                await self.index.walked(row.id, row.incarnation, row.watermark, row.end_seen, 1, self.index.epoch)
        await self.index.caught_up(self.index.epoch)
        self.index.settled()

    async def members(self) -> None:
        node = self.node()
        kind = self.chance.randrange(4)
        if kind == 0 and self.chance.random() < 0.3:
            await self.index.expel(node)
            await self.index.admit_node(node, NODES[node], f"{node}-{self.chance.random()}", "boot", START, START)
        elif kind == 1:
            await self.index.note_boot(node, incarnation(node), "boot")
            await self.index.set_node_flags(node, False, None)
        elif kind == 2:
            changes = [LayoutChange(each, NODES[each], priority=self.chance.randrange(1, 9)) for each in self.nodes()]
            await self.index.change_layout(changes)
        else:
            version = await self.index.layout_version()
            await self.index.change_layout([LayoutChange(node, group=self.chance.choice(["north", "east"]))], version)
            await self.index.change_layout([LayoutChange(node, state=Standing.ACTIVE)])

    async def shared(self) -> None:
        names = [f"n{each}" for each in self.chance.sample(range(9), 4)]
        await self.index.tally("failures", dict.fromkeys(names, 1), self.chance.choice([60.0, 0.001]))
        await self.index.lease(f"job {self.chance.randrange(3)}", self.owner, 60.0)
        await self.index.release(f"job {self.chance.randrange(3)}", self.owner)
        token, who = f"t{self.chance.randrange(99)}", f"i{self.chance.randrange(3)}"
        await self.index.invite(Invitation(token, b"s", who, ("front",)), -1e9 if self.chance.random() < 0.5 else 60.0)
        await self.index.use_token(token, b"r", b"a", 9e9)
        await self.index.count_guess(token)

    async def rest(self) -> None:
        if self.chance.random() < 0.3:
            await self.index.rest()

    def calls(self) -> list[Callable[[], Awaitable[None]]]:
        often = [self.deliver, self.deliver, self.reconcile, self.walk, self.change, self.change, self.queue, self.epoch]
        return [*often, self.abort, self.believe, self.confirm, self.accounts, self.checkpoint, self.rounds, self.heads,
                self.members, self.shared, self.rest]  # fmt: skip

    async def run(self, calls: int) -> int:
        """How many of the calls came to their ends."""
        done = 0
        for _ in range(calls):
            with suppress(*QUIET):
                await self.chance.choice(self.calls())()
                done += 1
        return done


def dawdle(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Transactions hold what they have for a while before they go on, so that there are others meanwhile."""
    statement, chance = getattr(Writer, name), random.Random(name)

    async def later(self: Writer, *args: Any, **named: Any) -> Any:
        if chance.random() < 0.3:
            await asyncio.sleep(chance.random() * 0.01)
        return await statement(self, *args, **named)

    monkeypatch.setattr(Writer, name, later)


@pytest_asyncio.fixture
async def processes(shared_rig: PostgresRig) -> AsyncIterator[list[PostgresIndex]]:
    made = [PostgresIndex(shared_rig.world, shared_rig.url) for _ in range(PROCESSES)]
    for index in made:
        await index.open()
        index.settled()
    yield made
    for index in made:
        await index.close()


async def test_all_who_write_at_once_wait_for_each_other_and_never_in_a_ring(
    shared_rig: PostgresRig, processes: list[PostgresIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the server counts as deadlocks stays 0; a process is told of each, and so is this test."""
    rings: list[str] = []
    attempt = PostgresIndex._attempt

    async def watched(self: PostgresIndex, link: Any, call: Any, args: Any) -> Any:
        try:
            return await attempt(self, link, call, args)
        except BaseException as error:
            for each in (error, error.__cause__, error.__context__):
                if isinstance(each, asyncpg.DeadlockDetectedError):
                    rings.append(f"{getattr(call, '__name__', call)}: {each.detail} {each.context}")
                    break
            raise

    monkeypatch.setattr(PostgresIndex, "_attempt", watched)
    for name in ("rows", "one", "rows_in", "change", "many", "change_in"):
        dawdle(monkeypatch, name)
    writers = [
        Writing(index, random.Random(100 * number + each), f"{number}-{each}")
        for number, index in enumerate(processes)
        for each in range(AT_ONCE)
    ]
    await writers[0].accounts()
    done = sum(await asyncio.gather(*[writer.run(CALLS) for writer in writers]))
    assert done > len(writers) * CALLS // 4, "else this shows nothing"
    assert rings == []
    async with shared_rig.beside() as beside:  # its counts are written down when a session ends, at the latest
        count = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        assert await beside.fetchval(count) == 0


# -- one after the other -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def held(rig: PostgresRig, statement: str, *values: Any) -> AsyncIterator[Any]:
    """Somebody else has done this, and has not committed it; given up at the end."""
    async with rig.beside() as other:
        work = other.transaction()
        await work.start()
        await other.execute(statement, *values)
        yield other
        if not other.is_closed():
            await work.rollback()


async def is_free(rig: PostgresRig, statement: str, *values: Any) -> bool:
    """True if nobody holds what this touches."""
    async with rig.beside() as other, _undone(other):
        await other.execute("SET LOCAL lock_timeout = 20")
        try:
            return bool(await other.fetch(statement, *values))
        except asyncpg.LockNotAvailableError:
            return False


@asynccontextmanager
async def _undone(connection: Any) -> AsyncIterator[None]:
    work = connection.transaction()
    await work.start()
    try:
        yield
    finally:
        await work.rollback()


async def waits_first(
    rig: PostgresRig, call: Callable[[], Awaitable[Any]], first: tuple[Any, ...], later: tuple[Any, ...]
) -> Any:
    """While somebody has what comes first in the order, who waits for it has nothing of what comes later."""
    async with held(rig, *first):
        task = asyncio.ensure_future(call())
        async with rig.beside() as watch:
            await blocked(watch)
        assert await is_free(rig, *later), "it was locked before what comes first"
        assert not task.done()
    return await task


LOCK_BOX, LOCK_ROW = (f"SELECT 1 FROM {table} WHERE id = $1 FOR UPDATE" for table in ("mailboxes", "queue"))
LOCK_KEY = "SELECT 1 FROM messages WHERE key = $1 FOR UPDATE"
NEW_KEY = "INSERT INTO messages VALUES ($1, 0, '', 0, 0, 2, 0) RETURNING key"


async def three_boxes(rig: PostgresRig) -> list[int]:
    """Ids of three mailboxes, whose rows lie in the other direction."""
    boxes = sorted([(await rig.index.make_mailbox(name, "INBOX")).id for name in ("ann", "bob", "cid")])
    async with rig.beside() as beside:
        for box in reversed(boxes):
            await beside.execute("UPDATE mailboxes SET octets = octets WHERE id = $1", box)
    return boxes


async def test_mailboxes_that_lose_their_checkpoints_are_locked_by_id(shared_rig: PostgresRig) -> None:
    boxes = await three_boxes(shared_rig)
    async with shared_rig.beside() as beside:
        await beside.execute("INSERT INTO holders VALUES (7, 'a b'), (8, 'a')")
        for box in reversed(boxes):
            await beside.execute("UPDATE mailboxes SET holders = $2 WHERE id = $1", box, 7 + box % 2)
    lost = await waits_first(
        shared_rig, lambda: shared_rig.index.checkpoints_lost("a"), (LOCK_BOX, boxes[0]), (LOCK_BOX, boxes[2])
    )
    assert lost == 3


@pytest.mark.parametrize("what", ["copy", "move", "expunge"])
async def test_keys_of_entries_are_locked_before_their_mailboxes(shared_rig: PostgresRig, what: str) -> None:
    """Law 8: else who delivers there, or deletes elsewhere, waits in a ring with it."""
    index, (first, second, _) = shared_rig.index, await three_boxes(shared_rig)
    owners = {facts.id: facts.account for facts in await index.mailboxes(0, 9)}
    await deliver(index, 1, 2, to=[inbox(owners[first])])
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "copy": lambda: index.copy(first, [1, 2], second),
        "move": lambda: index.move(first, [1, 2], second),
        "expunge": lambda: index.expunge(first, [1, 2]),
    }
    await waits_first(shared_rig, calls[what], (LOCK_KEY, key(2)), (LOCK_BOX, first))
    assert await uids(index, first) == ([1, 2] if what == "copy" else [])


async def three_rows(rig: PostgresRig) -> list[int]:
    """Ids of three rows of the queue, likewise."""
    await deliver(rig.index, 1, to=[elsewhere(f"far{number}@example.net") for number in range(3)])
    rows = sorted(row.id for row in await rig.index.lease_due("me", 9e9, 600.0, 9))
    async with rig.beside() as beside:
        for row in reversed(rows):
            await beside.execute("UPDATE queue SET octets = octets WHERE id = $1", row)
    return rows


@pytest.mark.parametrize("what", ["all", "some", "release"])
async def test_rows_of_the_queue_are_locked_by_id(shared_rig: PostgresRig, what: str) -> None:
    index, rows = shared_rig.index, await three_rows(shared_rig)
    numbers = [] if what == "all" else list(reversed(rows))

    def call() -> Awaitable[Any]:
        return index.release_leases("me") if what == "release" else index.queue_set(numbers, True, None)

    done = await waits_first(shared_rig, call, (LOCK_ROW, rows[0]), (LOCK_ROW, rows[2]))
    assert done in (3, None)


@pytest.mark.parametrize("how", ["reconcile", "walk"])
async def test_what_nodes_hold_is_entered_and_buried_in_one_order(shared_rig: PostgresRig, how: str) -> None:
    """A message comes into the last mailbox, one that died leaves the first: both are locked before either is done."""
    index, (first, _, last) = shared_rig.index, await three_boxes(shared_rig)
    owners = {facts.id: facts.account for facts in await index.mailboxes(0, 9)}
    await deliver(index, 1, to=[inbox(owners[first])])
    await index.raise_epoch([], "a test says so")
    assert await index.begin_epoch(index.epoch)
    found = commit(2, inbox(owners[last]))
    if how == "walk":
        items = [(key(2), Held.LIVE, FAR), (key(1), Held.DEAD, FAR)]
        done = await waits_first(
            shared_rig,
            lambda: index.settle_inventory("c", End(incarnation("c"), FAR), items, START, {key(2): found}, True),
            (LOCK_BOX, first),
            (LOCK_BOX, last),
        )
    else:
        batch = Batch("c", incarnation("c"), START, FAR, FAR, [(key(2), FAR, Origin.DELIVERY)], [key(1)], {key(2): found})
        done = await waits_first(shared_rig, lambda: index.reconcile(batch), (LOCK_BOX, first), (LOCK_BOX, last))
    assert done.moved and done.entered == 1
    assert await index.fates([key(1), key(2)]) == {key(1): Fate.DEAD, key(2): Fate.LIVE}
    await index.caught_up(index.epoch)


async def test_a_walk_takes_the_keys_of_tombstones_with_those_of_mail(shared_rig: PostgresRig) -> None:
    index = shared_rig.index
    items = [(key(5), Held.LIVE, FAR), (key(1), Held.DEAD, FAR)]

    def call() -> Awaitable[Any]:
        return index.settle_inventory("c", End(incarnation("c"), FAR), items, START, {key(5): commit(5)}, True)

    done = await waits_first(shared_rig, call, (NEW_KEY, key(1)), (NEW_KEY, key(5)))
    assert done.moved and await index.fates([key(1), key(5)]) == {key(1): Fate.DEAD, key(5): Fate.LIVE}


@pytest.mark.parametrize("what", ["deliver", "believe", "reconcile"])
async def test_a_set_of_nodes_is_made_before_any_key_is_locked(shared_rig: PostgresRig, what: str) -> None:
    """Else who made it first, and waits for the key, would be waited for."""
    index = shared_rig.running
    await deliver(index, 1)
    batch = Batch("c", incarnation("c"), START, FAR, FAR, [(key(2), FAR, Origin.DELIVERY)], [], {key(2): commit(2)})
    calls: dict[str, tuple[str, Callable[[], Awaitable[Any]], tuple[Any, ...]]] = {
        "deliver": ("a c", lambda: index.deliver(delivery(2, nodes=("a", "c"))), (NEW_KEY, key(2))),
        "believe": ("a b c", lambda: index.believe([key(1)], "c", end_of("c", FAR)), (LOCK_KEY, key(1))),
        "reconcile": ("c", lambda: index.reconcile(batch), (NEW_KEY, key(2))),
    }
    nodes, call, later = calls[what]
    first = "INSERT INTO placements VALUES ($1, $2)", set_number(nodes, 0), nodes
    await waits_first(shared_rig, call, first, later)
    assert [facts.nodes for facts in await index.messages([key(1), key(2)])][-1] == tuple(nodes.split())


async def test_the_layout_is_locked_before_the_node_that_leaves_it(shared_rig: PostgresRig) -> None:
    index = shared_rig.index
    await index.change_layout([LayoutChange(node, group) for node, group in NODES.items()])
    layout = "SELECT 1 FROM counters WHERE name = 'layout' FOR UPDATE"
    node = "SELECT 1 FROM nodes WHERE id = $1 FOR UPDATE"
    assert await waits_first(shared_rig, lambda: index.expel("c"), (layout,), (node, "c"))


async def test_the_count_of_slots_is_locked_before_the_slot_that_is_over(shared_rig: PostgresRig) -> None:
    index = shared_rig.running
    await deliver(index, 1)
    mine = {link.slot.number for link in index._writers.all if link.slot is not None}
    for link in index._writers.all:
        link.drop()
    sequence = "SELECT 1 FROM counters WHERE name = 'sequence' FOR UPDATE"
    slots = "SELECT 1 FROM writers WHERE id = ANY($1) FOR UPDATE"
    await waits_first(shared_rig, lambda: index.abort(key(2), []), (sequence,), (slots, sorted(mine)))
    assert await index.lost(Mark()) == ""


async def test_what_left_a_mailbox_is_forgotten_by_key_when_it_is_purged(shared_rig: PostgresRig) -> None:
    index = shared_rig.index
    await deliver(index, 1, 2, 3)
    box = await mailbox(index)
    for uid in (3, 2, 1):
        await index.expunge(box, [uid])
    gone = "SELECT 1 FROM gone WHERE key = $1 FOR UPDATE"
    await waits_first(shared_rig, lambda: index.purge("ann"), (gone, key(1)), (gone, key(3)))


async def test_ends_of_windows_and_returns_are_cleared_in_the_order_in_which_they_are_touched(shared_rig: PostgresRig) -> None:
    """By code point, whatever the collation of the database makes of capitals."""
    index = shared_rig.index
    async with shared_rig.beside() as beside:
        for name in ("a", "b", "B"):
            await beside.execute("INSERT INTO tallies VALUES ('kind', $1, 1, 1)", name)
            await beside.execute("INSERT INTO returns VALUES ($1, 'x', 1)", name)
    of = "SELECT 1 FROM tallies WHERE name = $1 FOR UPDATE"
    await waits_first(shared_rig, lambda: index.tally("kind", {"c": 1}, 60.0), (of, "B"), (of, "a"))
    of = "SELECT 1 FROM returns WHERE address = $1 FOR UPDATE"
    assert await waits_first(shared_rig, lambda: index.forget_returns(2.0), (of, "B"), (of, "a")) == 3
