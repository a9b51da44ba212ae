"""Any sequence of operations gets the same answers from every implementation of the index, and shows the same after each."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from powermail.base.errors import IndexTrouble, OperatorError
from powermail.index.contract import Attempt, Batch, Delivery, FlagChange, Head, Index
from powermail.mail.envelope import Commit, Target
from powermail.storage.contract import START, Dropped, End, Held, Mark, Origin, Position, Receipt, Unread
from tests.index.support import ALONE, NODES, NOW, RIGS, SHARED, Rig, commit, elsewhere, inbox, key

SEEDS, SHARED_SEEDS, STEPS = 25, 2, 80
KEYS = 24
Call = Callable[[Index], Awaitable[Any]]
Kind = Callable[[Path, int], Rig]


class Twins:
    """The implementations, side by side."""

    def __init__(self, room: Path, seed: int, kinds: Sequence[Kind]) -> None:
        self.rigs: list[Rig] = [kind(room, seed) for kind in kinds]
        self.chance = random.Random(seed)
        self.said: list[str] = []

    async def ask(self, what: str, call: Call) -> Any:
        """The one answer of all. An answer may be that it cannot."""
        answers = []
        for rig in self.rigs:
            try:
                answers.append(await call(rig.index))
            except (IndexTrouble, KeyError, OperatorError, ValueError) as error:
                answers.append(type(error).__name__)
                self.said.append(f"{type(rig).__name__}: {error!r} of {error.__cause__!r}")
        self.said.append(f"{what} -> {answers[0]!r}")
        assert all(answer == answers[0] for answer in answers), "\n".join([*self.said[-12:], f"{what}: {answers!r}"])
        return answers[0]

    async def start(self) -> None:
        for rig in self.rigs:
            await rig.start()

    async def restart(self, clean: bool) -> None:
        for rig in self.rigs:
            await (rig.stop() if clean else rig.die())
            await rig.start()


async def shown(index: Index) -> dict[str, Any]:
    """All that an index shows of itself, but what is random in it."""
    keys = [key(number) for number in range(1, KEYS + 1)]
    boxes = await index.mailboxes(0, 99)
    mark, nodes = index.mark(), await index.node_rows()
    names = [row.id for row in nodes]
    state: dict[str, Any] = {
        "mark": (mark.sequence, sorted(mark.slots), mark.epoch, mark.uidvalidity, mark.retired),
        "states": (index.catching_up, index.numbering, await index.dead_total(), await index.purged("", 99)),
        "nodes": nodes,
        "fates": await index.fates(keys),
        "messages": await index.messages(keys),
        "orders": {node: await index.orders(node, 999) for node in names},
        "drops": {node: await index.drops(node, 999) for node in names},
        "suspects": {node: await index.suspects(node, b"", 999) for node in names},
        "unread": {node: await index.unread(node, 99) for node in names},
        "copies": {node: await index.copies_on(node, b"", 999) for node in names},
        "under": [await index.under_copied(NODES, required, b"", 999, least) for required, least in ((2, 0), (2, 1), (3, 2))],
        "queue": (await index.queue_rows(0, 999), await index.queue_open(0, 999), await index.held_domains()),
        "attempts": [await index.queue_attempts(row.id) for row in await index.queue_rows(0, 999)],
        "boxes": boxes,
        "accounts": await index.accounts("", 99),
        "due": await index.checkpoint_due(NOW + 1e7, 99),
        "totals": await index.totals(),
        "thin": await index.thin_checkpoints(),
    }
    if not index.catching_up:
        for facts in boxes:
            view = await index.view(facts.id)
            entries = await index.entries(facts.id, 0, 2**32, 9999)
            state[f"view {facts.id}"] = view.uidvalidity, view.uid_next, view.modseq, list(view.rows()), entries
            state[f"keywords {facts.id}"] = await index.keywords(facts.id)
    return state


class Operations:
    """Random things to do, the same for all."""

    def __init__(self, twins: Twins) -> None:
        self.twins, self.chance = twins, twins.chance
        self.known: dict[int, tuple[int, int]] = {}  # what a session knows of a mailbox: MODSEQ, UIDNEXT
        self.plans: list[Any] = []

    def number(self) -> int:
        return self.chance.randint(1, KEYS)

    def some(self, count: int = 4) -> list[int]:
        return self.chance.sample(range(1, KEYS + 1), self.chance.randint(1, count))

    def position(self) -> Position:
        return Position(self.chance.randint(1, 4), self.chance.randrange(0, 500, 100))

    def record(self, number: int) -> Commit:
        chance = random.Random(number)
        choices: list[Target] = [
            inbox(),
            inbox("bob", flags=number % 4),
            inbox("ann", "Work"),
            elsewhere(f"x@d{number % 3}.example"),
        ]
        return commit(number, *chance.sample(choices, chance.randint(1, 3)))

    def commits(self, numbers: list[int]) -> dict[bytes, Commit]:
        return {key(number): self.record(number) for number in numbers if self.chance.random() < 0.9}

    async def box(self) -> int:
        boxes = await self.twins.rigs[0].index.mailboxes(0, 99)
        return self.chance.choice(boxes).id if boxes else 1

    async def node(self) -> Any:
        rows = await self.twins.rigs[0].index.node_rows()
        return self.chance.choice(rows) if rows else None

    async def step(self) -> None:
        names = [name for name in dir(self) if name.startswith("do_")]
        weights = [6 if name in ("do_deliver", "do_reconcile") else 3 if name in _OFTEN else 1 for name in names]
        await getattr(self, self.chance.choices(names, weights)[0])()

    async def do_deliver(self) -> None:
        number, place = self.number(), self.position()
        rows = await self.twins.rigs[0].index.node_rows()
        chosen = self.chance.sample(rows, min(2, len(rows)))
        receipts = tuple(
            Receipt(row.id, row.incarnation if self.chance.random() < 0.95 else "other", max(place, row.watermark))
            if self.chance.random() < 0.9
            else Receipt(row.id, row.incarnation, place)
            for row in chosen
        )
        delivery = Delivery(key(number), self.record(number), receipts)

        async def deliver(index: Index) -> Any:
            return await index.deliver(delivery)

        await self.twins.ask(f"deliver {number} {receipts}", deliver)

    async def do_abort(self) -> None:
        number, asked = self.number(), self.chance.sample("abcd", 2)
        await self.twins.ask(f"abort {number} {asked}", lambda index: index.abort(key(number), asked))

    async def do_reconcile(self) -> None:
        row = await self.node()
        if row is None:
            return
        numbers = self.some()
        copies = [(key(n), self.position(), self.chance.choice(list(Origin))) for n in numbers]
        dead = [key(n) for n in self.some(2)] if self.chance.random() < 0.2 else []
        to = max(row.watermark, self.position()) if self.chance.random() < 0.7 else row.watermark
        unread = [Unread(self.position(), self.chance.choice([0, 7]))] if self.chance.random() < 0.1 else []
        read = await self.twins.ask("unread", lambda index: index.unread(row.id, 2)) if self.chance.random() < 0.2 else []
        end = to if self.chance.random() < 0.3 else max(to, row.end_seen)
        from_ = row.watermark if self.chance.random() < 0.95 else Position(9, 9)
        birth = self.position() if self.chance.random() < 0.1 else START
        batch = Batch(row.id, row.incarnation, from_, to, end, copies, dead, self.commits(numbers), birth, unread, None, read)
        await self.twins.ask(f"reconcile {batch}", lambda index: index.reconcile(batch))

    async def do_settle(self) -> None:
        row, enter = await self.node(), self.chance.random() < 0.4
        if row is None:
            return
        numbers = self.some()
        items = [(key(n), self.chance.choice(list(Held)), self.position()) for n in numbers]
        records, birth = self.commits(numbers), self.chance.choice([START, self.position()])
        end = End(row.incarnation, row.end_seen if self.chance.random() < 0.8 else self.position())
        await self.twins.ask(
            f"settle {row.id} {items} {birth} {enter} {end}",
            lambda index: index.settle_inventory(row.id, end, items, birth, records, enter),
        )

    async def do_believe(self) -> None:
        number, node = self.number(), self.chance.choice("abcd")
        end = End(f"{node}-{self.chance.choice([1, 1, 1, 2])}", self.position())
        await self.twins.ask(f"believe {number} {node} {end}", lambda index: index.believe([key(number)], node, end))

    async def do_disbelieve(self) -> None:
        keys, (node, end) = [key(number) for number in self.some()], await self.end()
        await self.twins.ask(f"disbelieve {keys} {node} {end}", lambda index: index.disbelieve(node, keys, end))

    async def do_note_bad(self) -> None:
        number, node = self.number(), self.chance.choice("abcd")
        await self.twins.ask(f"note bad {number} {node}", lambda index: index.note_bad(key(number), node, "why"))

    async def do_clear_suspect(self) -> None:
        number, (node, end) = self.number(), await self.end()
        await self.twins.ask(f"clear {number} {node} {end}", lambda index: index.clear_suspect(key(number), node, end))

    async def do_confirm(self) -> None:
        row = await self.node()
        if row is None:
            return
        keys = await self.twins.ask("orders", lambda index: index.orders(row.id, 5))
        end = End(row.incarnation if self.chance.random() < 0.9 else "another", self.position())
        await self.twins.ask(f"confirm {row.id} {keys} {end}", lambda index: index.confirm_orders(row.id, keys, end))
        drops = await self.twins.ask("drops", lambda index: index.drops(row.id, 3))
        done = Dropped(tuple([drop.key for drop in drops if self.chance.random() < 0.3]), end)
        await self.twins.ask(f"confirm {row.id} {drops} {done}", lambda index: index.confirm_drops(row.id, drops, done))

    async def do_round(self) -> None:
        number = await self.twins.ask("round", lambda index: index.raise_round())
        for row in await self.twins.rigs[0].index.node_rows():
            if self.chance.random() < 0.8:
                batch = Batch(
                    row.id, row.incarnation, row.watermark, row.watermark, row.end_seen, [], [], {}, START, (), number
                )
                await self.twins.ask(f"scan {batch}", lambda index, batch=batch: index.reconcile(batch))  # type: ignore[misc]
        await self.twins.ask("forget", lambda index: index.forget(99))
        keys = [key(number) for number in self.some()]
        await self.twins.ask(f"forgotten {keys}", lambda index: index.forgotten(keys))

    async def end(self) -> tuple[str, End]:
        """A node, and an end of its log that may be late, or of another disk."""
        node = self.chance.choice("abcd")
        rows = {row.id: row for row in await self.twins.rigs[0].index.node_rows()}
        if node in rows and self.chance.random() < 0.7:
            return node, End(rows[node].incarnation, rows[node].end_seen)
        return node, End(f"{node}-{self.chance.choice([1, 1, 1, 2])}", self.position())

    async def do_queue_plan(self) -> None:
        plan = await self.twins.ask("plan", lambda index: index.queue_plan(5))
        if self.chance.random() < 0.6:
            await self.twins.ask(f"written {plan}", lambda index: index.queue_done(plan))

    # -- nodes and epochs -------------------------------------------------------------------------------------------

    async def do_admit(self) -> None:
        node, place = self.chance.choice("abcd"), self.position()
        incarnation = f"{node}-{self.chance.randint(1, 4)}"
        await self.twins.ask(
            f"admit {incarnation} {place}", lambda index: index.admit_node(node, node, incarnation, "boot", place, place)
        )

    async def do_expel(self) -> None:
        if self.chance.random() < 0.3:
            node = self.chance.choice("abcd")
            await self.twins.ask(f"expel {node}", lambda index: index.expel(node))

    async def do_node_flags(self) -> None:
        node, blocked, since = (
            self.chance.choice("abcd"),
            self.chance.choice([None, True, False]),
            self.chance.choice([None, 3.0]),
        )
        await self.twins.ask(f"flags {node}", lambda index: index.set_node_flags(node, blocked, since))
        boots = self.chance.choice([["boot", "later"], ["boot"]])
        await self.twins.ask(f"boot {node} {boots}", lambda index: index.note_boot(node, f"{node}-1", boots))

    async def do_epoch(self) -> None:
        if self.chance.random() < 0.5:
            return
        mark = Mark(self.chance.randint(0, 9), {}, self.chance.randint(0, 3), 0, ("old",))
        await self.twins.ask("epoch", lambda index: index.raise_epoch([mark], "why"))
        boxes = await self.twins.rigs[0].index.mailboxes(0, 99)
        heads = [
            Head(
                f.account,
                f.name,
                f.uidvalidity + self.chance.choice([0, 0, 0, 1, -1]),
                f.uid_next + 3,
                f.modseq + 5,
                self.chance.choice([1, 2]),
            )
            for f in boxes
        ]
        await self.twins.ask(f"heads {heads}", lambda index: index.learn_heads(heads))
        far = await self.twins.ask("far heads", lambda index: index.far_heads(3))
        await self.twins.ask("heads written", lambda index: index.heads_written(far, index.epoch))
        await self.twins.ask("early", lambda index: index.caught_up(index.epoch))
        await self.do_deliver()
        await self.twins.ask("begin", lambda index: index.begin_epoch(index.epoch))

    async def do_walk(self) -> None:
        number = await self.twins.ask("round", lambda index: index.raise_round())
        for row in await self.twins.rigs[0].index.node_rows():
            place, bad = self.position(), [Unread(self.position(), 0)] if self.chance.random() < 0.2 else []
            await self.twins.ask(
                f"walked {row.id} {place} {bad}",
                lambda index, row=row, place=place, bad=bad: index.walked(  # type: ignore[misc]
                    row.id, row.incarnation, place, place, number, index.epoch, bad
                ),
            )
        await self.twins.ask("caught up", lambda index: index.caught_up(index.epoch))

    async def do_restart(self) -> None:
        clean = self.chance.random() < 0.5
        self.twins.said.append(f"restart, clean: {clean}")
        await self.twins.restart(clean)

    async def do_time(self) -> None:
        for rig in self.twins.rigs:
            rig.clock.at += 450.0

    # -- mailboxes ------------------------------------------------------------------------------------------------------

    async def uids(self, box: int) -> list[int]:
        """Mostly such that are there."""
        try:
            entries = await self.twins.rigs[0].index.entries(box, 0, 2**32, 999)
        except IndexTrouble:
            entries = []
        uids = [entry.uid for entry in entries] + [1, 2, 77]
        return self.chance.sample(uids, min(len(uids), self.chance.randint(1, 6)))

    async def do_store(self) -> None:
        box, how, flags = await self.box(), self.chance.choice(list(FlagChange)), self.chance.randrange(8)
        uids, since = await self.uids(box), self.chance.choice([None, self.known.get(box, (3, 3))[0]])
        await self.twins.ask(
            f"store {box} {uids} {how} {flags} {since}", lambda index: index.store(box, uids, how, flags, since)
        )

    async def do_copy(self) -> None:
        box, to = await self.box(), await self.box()
        uids = await self.uids(box)
        await self.twins.ask(f"copy {box} {uids} {to}", lambda index: index.copy(box, uids, to))

    async def do_move(self) -> None:
        box, to = await self.box(), await self.box()
        uids = await self.uids(box)
        await self.twins.ask(f"move {box} {uids} {to}", lambda index: index.move(box, uids, to))

    async def do_expunge(self) -> None:
        box = await self.box()
        uids = await self.uids(box)
        await self.twins.ask(f"expunge {box} {uids}", lambda index: index.expunge(box, uids))

    async def do_keyword(self) -> None:
        box, name = await self.box(), self.chance.choice(["one", "two", "three"])
        bit = await self.twins.ask(f"keyword {box} {name}", lambda index: index.keyword(box, name))
        if isinstance(bit, int):
            uids = await self.uids(box)
            await self.twins.ask(f"store {box} {uids}", lambda index: index.store(box, uids, FlagChange.ADD, bit, None))

    async def do_merge(self) -> None:
        box = await self.box()
        await self.twins.ask(f"merge {box}", lambda index: index.merge(box))

    async def do_tail(self) -> None:
        box = await self.box()
        modseq, uid_next = self.known.get(box, (1, 1))
        tail = await self.twins.ask(f"tail {box} {modseq}", lambda index: index.tail(box, modseq, uid_next))
        if tail is None or not isinstance(tail, str):
            facts = [each for each in await self.twins.rigs[0].index.mailboxes(0, 99) if each.id == box]
            self.known.update({each.id: (each.modseq, each.uid_next) for each in facts})
        known = {each: modseq for each, (modseq, _) in self.known.items()}
        await self.twins.ask(f"changed {known}", lambda index: index.changed(known))

    async def do_make(self) -> None:
        account, name = self.chance.choice(["ann", "bob"]), self.chance.choice(["INBOX", "Work", "Sent"])
        await self.twins.ask(f"make {account} {name}", lambda index: index.make_mailbox(account, name))
        await self.twins.ask(f"find {account}", lambda index: index.find_mailbox(account, name))
        await self.twins.ask(f"usage {account}", lambda index: index.usage(account))

    async def do_purge(self) -> None:
        if self.chance.random() < 0.2:
            if self.chance.random() < 0.3:
                await self.twins.ask("note", lambda index: index.note_purged("bob"))
            await self.twins.ask("purge", lambda index: index.purge("bob"))

    # -- queue and checkpoints ------------------------------------------------------------------------------------------

    async def do_queue(self) -> None:
        now, what = self.twins.rigs[0].clock.at, self.chance.randrange(6)
        rows = await self.twins.ask("lease", lambda index: index.lease_due("me", now + 100, 300.0, 3))
        if what == 0:
            await self.twins.ask("finish", lambda index: index.finish(list(rows), "me"))
        elif what == 1:
            told = [replace(row, delay_told=self.chance.random() < 0.5) for row in rows]
            attempt = Attempt(now, "hop", "", 1.5, "later")
            for _ in range(self.chance.choice([1, 1, 2])):  # an answer that was lost is asked for again
                await self.twins.ask("defer", lambda index: index.defer(told, [now + 50 for _ in rows], attempt, "me"))
        elif what == 2:
            await self.twins.ask("give back", lambda index: index.release_leases("me"))
        elif what == 3:
            await self.twins.ask("renew", lambda index: index.renew_leases("me", [row.id for row in rows], 300.0))
            await self.twins.ask("give some back", lambda index: index.give_back(list(rows[:1]), now + 20, "me"))
        elif what == 4:
            domain, stays = self.chance.choice(["example.net", "example.org"]), self.chance.random() < 0.5
            await self.twins.ask("hold", lambda index: index.hold_domain(domain, stays))
        held = self.chance.choice([None, True, False])
        await self.twins.ask("set", lambda index: index.queue_set([1, 2], held, now))

    async def do_plan(self) -> None:
        box, whole = await self.box(), self.chance.random() < 0.2
        plan = await self.twins.ask(f"plan {box} {whole}", lambda index: index.checkpoint_plan(box, whole))
        if plan is not None and not isinstance(plan, str):
            self.plans.append(plan)

    async def do_done(self) -> None:
        if self.plans:
            plan, nodes = self.plans.pop(), sorted(self.chance.sample("abc", 2))
            now = self.twins.rigs[0].clock.at
            await self.twins.ask(f"done {plan} {nodes}", lambda index: index.checkpoint_done(plan, nodes, now))

    async def do_lose_checkpoints(self) -> None:
        node = self.chance.choice("abc")
        await self.twins.ask(f"checkpoints lost {node}", lambda index: index.checkpoints_lost(node))


_OFTEN = {
    "do_store",
    "do_copy",
    "do_move",
    "do_expunge",
    "do_confirm",
    "do_settle",
    "do_round",
    "do_plan",
    "do_done",
    "do_abort",
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("others", ["alone", "shared"])
async def test_all_implementations_give_the_same_answers(room: Path, others: str) -> None:
    """Those where one process writes, and those where others write too: the first let numbers leap after a death (law 10)."""
    kinds: list[Kind] = [RIGS[name] for name in ALONE] if others == "alone" else list(SHARED.values())
    for seed in range(SEEDS if others == "alone" else SHARED_SEEDS):
        twins = Twins(room, seed, kinds)
        await twins.start()
        operations = Operations(twins)
        for node in "abc":
            await twins.ask(
                f"admit {node}",
                lambda index, node=node: index.admit_node(node, NODES[node], f"{node}-1", "boot", START, START),  # type: ignore[misc]
            )
        for _ in range(STEPS):
            await asyncio.sleep(0)
            await operations.step()
            states = [await shown(rig.index) for rig in twins.rigs]
            for state in states:
                different = {name: (states[0][name], value) for name, value in state.items() if states[0][name] != value}
                assert not different, "\n".join([f"seed {seed}", *twins.said[-12:], repr(different)])
        assert await twins.ask("audit", lambda index: index.audit()) == [], f"seed {seed}"
        for rig in twins.rigs:
            await rig.die()
