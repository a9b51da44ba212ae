"""Owns one opening of the index in memory: transactions, its writer slot, numbers, and the ends of messages.

Everything here runs without waiting, so each transaction is alone. Danger: only `transact` may change the state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from powermail.base import limits
from powermail.base.errors import IndexLost, IndexTrouble
from powermail.base.world import World
from powermail.index import laws
from powermail.index.contract import EntryFacts, Fate, QueueRow, Release
from powermail.index.memory.state import Gone, KeyRow, Lease, MailboxRow, MemoryStore, Slot, State
from powermail.index.view import Change, Op, View
from powermail.mail.envelope import Commit, Target
from powermail.storage.contract import Mark, Position, Unread

T = TypeVar("T")
# What was not numbered for so many unclean starts is checkpointed behind its leap, before the leap is too far (law 11).
STARTS_BEHIND = limits.EPOCH_JUMP // limits.UNCLEAN_JUMP // 2


class Undo(Exception):
    """Ends a transaction that must change nothing, with its answer."""

    def __init__(self, answer: Any) -> None:
        super().__init__(answer)
        self.answer = answer


class Transactions:
    """What all parts of the index in memory stand on."""

    def __init__(self, world: World, store: MemoryStore | None = None, alone: bool = True) -> None:
        """`alone`: it answers as where one process writes (SQLite); else as where others may, on other machines."""
        self._world = world
        self._alone = alone
        self.backing = store or MemoryStore()
        self.backing.clock = self.backing.clock or world.clock
        self._failures: deque[bool] = deque()
        self._lost = "", 0  # what this process itself met that proves lost commits, and in which epoch
        self._slot, self._tag, self._count = 0, "", 0
        self._life = 0  # of the store, when this process last connected
        self._known = Mark()  # as the last transaction of this process found it
        self.numbered = 0
        self._unsettled = False

    @property
    def state(self) -> State:
        """What is committed, or about to be."""
        return self.backing.state

    @property
    def _why_lost(self) -> str:
        """What this process itself met that proves lost commits, until anybody has raised the epoch."""
        why, epoch = self._lost
        return why if self.state.epoch <= epoch else ""

    @_why_lost.setter
    def _why_lost(self, why: str) -> None:
        self._lost = why, self.state.epoch

    @property
    def cluster(self) -> str:
        """Name of the cluster this index belongs to."""
        return self.state.cluster

    async def open(self, cluster: str = "") -> None:
        """Opens the store, or makes it with the name of a cluster."""

        def opening() -> None:
            s = self.state
            s.cluster = s.cluster or cluster
            s.uidvalidity = s.uidvalidity or laws.fresh_uidvalidity(0, self._world.clock.now())
            if not self._alone:
                self._unsettled = True  # law 10: nothing was compared yet
                return
            last = s.slots.get(s.sequence)
            self._unsettled = last is not None and not last.stopped
            if self._unsettled:
                s.starts += 1  # law 10: a hot copy put back leaves no other sign
                s.uidvalidity += limits.UNCLEAN_JUMP
                for row in s.mailboxes.values():
                    if row.due is None and s.starts - row.numbers.start >= STARTS_BEHIND:
                        s.mailboxes[row.id] = row._replace(due=self._world.clock.now())
            for number, slot in s.slots.items():
                if slot.ended is None:  # there is one writer, so all others are over
                    s.slots[number] = slot._replace(ended=s.round)

        self.transact(opening, anew=True)

    def now(self) -> float:
        """UTC by the one clock of all who share the store: leases are taken, kept and lost by it."""
        assert self.backing.clock is not None
        return self.backing.clock.now()

    async def close(self) -> None:
        """Nothing waits, so there is nothing to finish."""

    def fail_next(self, kept: bool) -> None:
        """The next transaction is IndexTrouble: its outcome is unknown to who asked; `kept` if it did commit."""
        self._failures.append(kept)

    # -- transactions ---------------------------------------------------------------------------------------------------

    def transact(self, work: Callable[[], T], anew: bool = False, stopping: bool = False) -> T:
        """Runs `work` as one transaction. `anew` takes a new writer slot instead of counting in the old one; `stopping` notes
        in it that this process stops in good order.
        """
        before = self.backing.snapshot()
        mine = self._slot, self._tag, self._count
        known, life = self._known, self._life
        failure = self._failures.popleft() if self._failures else None
        answer: T
        try:
            if not anew:
                self._connect()
            answer = work()
            if anew or self._life != self.backing.lives:
                self._take_slot()  # law 10: of a new connection, too
            else:
                self._raise_count(stopping)  # law 10: last in each transaction
            self._life, self._known = self.backing.lives, self._committed()
        except Undo as undo:
            self.backing.state = before
            self._slot, self._tag, self._count = mine
            answer = undo.answer
        except BaseException as error:
            self.backing.state = before
            self._slot, self._tag, self._count = mine
            if isinstance(error, IndexLost):
                self._why_lost = str(error)
            raise
        if failure is None:
            return answer
        if not failure:
            self.backing.state = before
        self._known, self._life = known, life  # the process heard nothing
        if self._slot != mine[0]:
            self._slot, self._tag, self._count = mine
        elif self._count != mine[2]:
            self._count -= 1  # as it was read in this transaction
        raise IndexTrouble("the index did not answer")

    def _take_slot(self) -> None:
        s = self.state
        s.sequence += 1
        self._slot, self._tag, self._count = s.sequence, self._world.entropy.octets(8).hex(), 0
        s.slots[self._slot] = Slot(self._tag, 0)

    @property
    def connection(self) -> int:
        """Which connection to the store is used: putting it back ends those there are."""
        return self.backing.lives

    def _committed(self) -> Mark:
        """All slots and the epoch, as this transaction finds them."""
        s = self.state
        slots = {number: (slot.tag, slot.commits) for number, slot in s.slots.items() if not slot.left_out}
        return Mark(s.sequence, slots, s.epoch, s.uidvalidity, s.retired)

    def mark(self) -> Mark:
        """What this process knows to be committed (law 10)."""
        return self._known

    def prove(self) -> Mark:
        """All slots, read behind all that was read before over this connection (law 10). Raises IndexLost."""
        try:
            if self._life != self.backing.lives or not self._look():
                self.transact(lambda: None)  # a new slot first
        except IndexLost as error:
            self._why_lost = str(error)
            raise
        self._known = self._committed()
        return self._known

    @property
    def unsettled(self) -> bool:
        """Readers wait: after an unclean start, and over a new connection."""
        return self._unsettled or self._life != self.backing.lives

    def settled(self) -> None:
        """Listings are complete again."""
        if self._life != self.backing.lives:
            self.prove()
        self._unsettled = False

    def _connect(self) -> None:
        """Law 10: over a new connection a process first looks at its old slot, and at all that it knew of the others, and
        readers wait. Raises IndexLost.
        """
        if self._life == self.backing.lives:
            return
        self._unsettled = True
        s = self.state
        slots = {number: (slot.tag, slot.commits) for number, slot in s.slots.items()}
        if why := laws.loss(self._known, s.epoch, s.sequence, slots, "this process"):
            raise IndexLost(why)
        if self._look():
            self.state.slots[self._slot] = self.state.slots[self._slot]._replace(ended=self.state.round)

    def _look(self) -> bool:
        """Whether this process's slot is there; False if it was pruned, or is in no mark any more: nodes would refuse whatever
        names it again. Raises IndexLost if commits were lost (law 10).
        """
        s = self.state
        slot = s.slots.get(self._slot)
        if slot is None and self._slot <= s.sequence:
            return False
        if slot is not None and slot.tag == self._tag and slot.commits == self._count + 1:
            self._count += 1  # this process's own commit, whose answer it never heard
        elif slot is None or slot.tag != self._tag or slot.commits != self._count:
            raise IndexLost(f"writer slot {self._slot} is not where this process left it")
        return not slot.left_out

    def _raise_count(self, stopping: bool) -> None:
        """Law 10: counts this transaction, or finds that commits were lost. Raises IndexLost."""
        s = self.state
        if not self._look():
            self._take_slot()
            return
        self._count += 1
        s.slots[self._slot] = Slot(self._tag, self._count, stopping, s.round if stopping else None)

    def complete(self) -> None:
        """Raises IndexTrouble while a listing might be short (P7)."""
        if self._why_lost:
            raise IndexLost(self._why_lost)
        if self.state.catching_up or self.unsettled:
            raise IndexTrouble("the index is catching up with the storage nodes")

    # -- numbers ----------------------------------------------------------------------------------------------------------

    def mailbox(self, mailbox: int) -> MailboxRow:
        """A mailbox's row. Raises KeyError."""
        return self.state.mailboxes[mailbox]

    def rows_of(self, mailbox: int) -> list[EntryFacts]:
        """Entries of a mailbox in order of UID."""
        return [entry for (owner, _), entry in sorted(self.state.entries.items()) if owner == mailbox]

    def changes_of(self, mailbox: int, above: int) -> list[Change]:
        """Changes of a mailbox above a MODSEQ, in order."""
        return [each for (owner, modseq), each in sorted(self.state.changes.items()) if owner == mailbox and modseq > above]

    def view_of(self, mailbox: int) -> View:
        """The stored view with its tail."""
        row, view = self.mailbox(mailbox), self.state.views[mailbox].copy()
        entries = [entry for entry in self.rows_of(mailbox) if entry.uid >= view.uid_next]
        view.follow(row.numbers.uid_next, row.numbers.modseq, entries, self.changes_of(mailbox, view.modseq))
        return view

    def make(self, account: str, name: str) -> int:
        """Id of the mailbox of that name, made if it does not exist."""
        s = self.state
        for row in s.mailboxes.values():
            if (row.account, row.name) == (account, name):
                return row.id
        self._may_number()
        s.last_mailbox += 1
        s.uidvalidity = laws.fresh_uidvalidity(s.uidvalidity, self._world.clock.now())
        numbers = laws.Numbers(1, 1, s.uidvalidity, s.epoch, s.starts, 1, 1)
        s.mailboxes[s.last_mailbox] = MailboxRow(s.last_mailbox, account, name, numbers)
        s.views[s.last_mailbox] = View(s.uidvalidity, 1, 0)
        self._touch(s.last_mailbox)
        return s.last_mailbox

    def number(self, mailbox: int, count: int) -> MailboxRow:
        """Makes a mailbox ready for `count` more UIDs, or for one change if 0 (laws 10, 11). Raises IndexTrouble."""
        self._may_number()
        s = self.state
        row = s.mailboxes[mailbox]
        fresh = laws.fresh_uidvalidity(s.uidvalidity, self._world.clock.now())
        try:
            numbers = laws.renumbered(row.numbers, s.epoch, s.starts, fresh, count)
        except laws.NumbersSpent as error:
            raise IndexTrouble(f"mailbox {mailbox}: {error}") from error
        began_anew = numbers.uidvalidity != row.numbers.uidvalidity
        s.mailboxes[mailbox] = row._replace(numbers=numbers)
        if began_anew:
            s.uidvalidity = fresh
            self._begin_anew(mailbox)
        return s.mailboxes[mailbox]

    def _begin_anew(self, mailbox: int) -> None:
        """UIDs ran short: under the fresh UIDVALIDITY what is here gets the first ones, and every old view is void (law 11)."""
        s = self.state
        row = s.mailboxes[mailbox]
        modseq = row.numbers.modseq + 1
        entries = self.rows_of(mailbox)
        view = s.views[mailbox].copy()
        view.follow(0, 0, [e for e in entries if e.uid >= view.uid_next], self.changes_of(mailbox, view.modseq))
        facts = [
            entry._replace(uid=uid, flags=flags, modseq=modseq)
            for uid, (entry, flags) in enumerate(zip(entries, view.flags, strict=True), 1)
        ]
        s.entries = {at: entry for at, entry in s.entries.items() if at[0] != mailbox}
        s.entries.update({(mailbox, entry.uid): entry for entry in facts})
        s.changes = {at: change for at, change in s.changes.items() if at[0] != mailbox}
        following = len(facts) + 1
        fresh = View(row.numbers.uidvalidity, 1, modseq)
        fresh.arrive(facts)
        s.views[mailbox] = fresh
        numbers = row.numbers._replace(uid_next=following, modseq=modseq, base_uid=following)
        s.mailboxes[mailbox] = row._replace(numbers=numbers, trimmed=modseq, base=0)

    def _may_number(self) -> None:
        if self._why_lost:
            raise IndexLost(self._why_lost)
        if not self.state.numbering:
            raise IndexTrouble("commits were lost: no numbers before the new epoch has begun")  # law 11

    def _touch(self, mailbox: int) -> None:
        """Something changed: a checkpoint falls due (law 13), at once when numbers are running out (law 11)."""
        row, now = self.mailbox(mailbox), self._world.clock.now()
        due = now + limits.CHECKPOINT_INTERVAL_S if row.due is None else row.due
        if laws.needs_checkpoint(row.numbers):
            due = min(due, now)
        self.state.mailboxes[mailbox] = row._replace(due=due)

    def arrive(self, mailbox: int, rows: Iterable[tuple[bytes, int, int, float]], together: bool) -> list[int]:
        """Entries for (key, flags, octets, date) with the next UIDs, which are returned; each with a MODSEQ of its own, or
        all with one if they came `together`.
        """
        s, rows = self.state, list(rows)
        self.numbered += len(rows)
        row = self.number(mailbox, len(rows))
        uid, modseq = row.numbers.uid_next, row.numbers.modseq + (1 if together else 0)
        for key, flags, octets, date in rows:
            modseq += 0 if together else 1
            s.entries[mailbox, uid] = EntryFacts(uid, key, flags, modseq, octets, date)
            s.gone.pop((mailbox, key), None)
            uid += 1
        numbers, uids = row.numbers._replace(uid_next=uid, modseq=modseq), range(row.numbers.uid_next, uid)
        total = sum(octets for _, _, octets, _ in rows)
        s.mailboxes[mailbox] = row._replace(numbers=numbers, messages=row.messages + len(rows), octets=row.octets + total)
        self._touch(mailbox)
        return list(uids)

    def change(self, mailbox: int, op: Op, flags: int, uids: Iterable[int]) -> int:
        """One row of changes, whatever its size; its MODSEQ."""
        self.numbered += 1
        row = self.number(mailbox, 0)
        numbers = row.numbers._replace(modseq=row.numbers.modseq + 1)
        self.state.mailboxes[mailbox] = row._replace(numbers=numbers)
        self.state.changes[mailbox, numbers.modseq] = Change(numbers.modseq, op, flags, tuple(uids))
        self._touch(mailbox)
        return numbers.modseq

    # -- the life of a message ----------------------------------------------------------------------------------------------

    def enter(self, key: bytes, commit: Commit, nodes: Iterable[str]) -> Fate:
        """A row for a new key, with references for all its targets, believed to lie on `nodes`; dead if no target is left."""
        s = self.state
        targets = [target for target in commit.targets if target.destination or target.account not in s.purged]  # law 13
        s.keys[key] = KeyRow(Fate.LIVE, s.round, len(targets), commit.shown_octets, bytes.fromhex(commit.sha256))
        for node in nodes:
            s.copies[key, node] = None
        for target in targets:
            if target.destination:
                self._queue_row(key, commit, target)
            else:
                mailbox = self.make(target.account, target.mailbox)
                self.arrive(mailbox, [(key, target.flags, commit.shown_octets, commit.received_at)], together=False)
        if not targets:
            self._die(key)
        return s.keys[key].fate

    def _queue_row(self, key: bytes, commit: Commit, target: Target) -> None:
        s = self.state
        s.last_queue += 1
        s.leases[s.last_queue] = Lease()
        s.queue[s.last_queue] = QueueRow.of(s.last_queue, key, commit, target)
        if target.original:
            address, until = target.reverse_path.lower(), commit.received_at + limits.RETURN_S
            s.returns[address] = target.original, max(until, s.returns.get(address, ("", 0.0))[1])

    def refer(self, key: bytes, count: int) -> None:
        """More references to a live message (law 8)."""
        row = self.state.keys[key]
        assert row.fate is Fate.LIVE
        self.state.keys[key] = row._replace(refs=row.refs + count)

    def dereference(self, key: bytes) -> bool:
        """One reference fewer; True if the message died with it (law 8)."""
        row = self.state.keys[key]
        self.state.keys[key] = row._replace(refs=row.refs - 1)
        if row.refs == 1:
            self._die(key)
        return row.refs == 1

    def _die(self, key: bytes) -> None:
        """live -> dead, and orders for every node believed or suspected to hold a copy, in one transaction (law 8)."""
        s = self.state
        holders = {node for held, node in (*s.copies, *s.suspects) if held == key}
        self.decide(key, Fate.DEAD)
        for node in sorted(holders):
            self.order(node, key)
            s.copies.pop((key, node), None)
            s.suspects.pop((key, node), None)

    def decide(self, key: bytes, fate: Fate) -> None:
        """Decides a key in this round (laws 3, 9)."""
        row = self.state.keys.get(key, KeyRow(fate, 0))
        self.state.keys[key] = row._replace(fate=fate, round=self.state.round)

    def order(self, node: str, key: bytes) -> None:
        """A tombstone that a member is to write; whoever orders raises the key's round (law 8)."""
        if node in self.state.nodes:
            self.state.orders[node, key] = None
            self.state.keys[key] = self.state.keys[key]._replace(round=self.state.round)

    def drop(self, node: str, key: bytes, position: Position) -> None:
        """A copy that a member is to drop (laws 6, 12)."""
        self.state.drops[node, key, position] = None

    def note_unread(self, node: str, notes: Iterable[Unread]) -> None:
        """What could not be read holds back forgetting (law 9). Of two notes that begin at one place the longer stays."""
        unread = self.state.unread
        for note in notes:
            longest = max([note, *(known for at, known in unread if at == node and known.position == note.position)])
            for at in [at for at in unread if at[0] == node and at[1].position == note.position]:
                del unread[at]
            unread[node, longest] = None

    def leave(self, mailbox: int, uids: Iterable[int], moved: Mapping[bytes, Gone] | None = None) -> Release:
        """Expunges those of `uids` that exist, as one change; `moved` says where keys went that were moved (law 13)."""
        s = self.state
        here = [uid for uid in sorted(set(uids)) if (mailbox, uid) in s.entries]
        if not here:
            return Release(0, 0)
        modseq = self.change(mailbox, Op.EXPUNGE, 0, here)
        leaving = [s.entries.pop((mailbox, uid)) for uid in here]
        row = self.mailbox(mailbox)
        octets = row.octets - sum(entry.octets for entry in leaving)
        s.mailboxes[mailbox] = row._replace(messages=row.messages - len(leaving), octets=octets)
        staying = {entry.key for (owner, _), entry in s.entries.items() if owner == mailbox}
        moved = moved or {}
        dead = 0
        for entry in leaving:
            dead += self.dereference(entry.key)
            if entry.key not in staying:  # noted also of what died, until it is forgotten (law 13)
                to = moved.get(entry.key, Gone(0, 0, 0))
                s.gone[mailbox, entry.key] = to._replace(modseq=modseq)
                if to.to:  # what came here by a move, and moves on, is where it moves to now
                    came = {at: gone for at, gone in s.gone.items() if at[1] == entry.key and gone.to == mailbox}
                    s.gone.update({at: to._replace(modseq=gone.modseq) for at, gone in came.items()})
        return Release(len(here), dead)

    def lose_checkpoints(self, node: str) -> int:
        """What had its checkpoint there gets a whole one at once (law 13); how many mailboxes."""
        rows = [row for row in self.state.mailboxes.values() if node in row.holders]
        for row in rows:
            self.state.mailboxes[row.id] = row._replace(base=0, written=0, holders=(), due=laws.LOST_DUE)
        return len(rows)
