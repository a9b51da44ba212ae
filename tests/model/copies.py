"""Owns the model of laws 1 to 12 for one key, and what must never be wrong with it.

One key on two or three nodes, R = 2. A delivery whose front end may sleep before each of its steps, transactions whose answers
get lost or that run late, nodes that check a stamp and append later, keepers that read a log and apply it late, orders, drops,
rounds, repair, compaction; restarts, bad copies, lost disks, older disks, expulsion, and an index that is restored from a
backup once or twice while keepers still hold what they read before.

Promises, at any moment: 451 was never listed and never is (P4); what was deleted is not listed (P8); once commits were lost, a
listing is whole or an error (P7). At rest: what was acknowledged is listed and has a copy (P1); belief and copies agree; there
is no orphan. From everywhere rest can be reached.

What is allowed, as the laws allow it or must: a deletion, or an abort, that the index lost shows until the node with its
tombstone is read (law 11); one that left no trace never was; P7 is asked only for acknowledged messages that had R copies when
commits were lost; a disk rolled back within one boot behind what the index was shown is not put back here (law 12).

Not modelled: unread records and their notes, the time that tombstones stay, references (COPY, MOVE, queue rows: one reader
deletes), import, a backup restored after an expulsion, more than one delivery of a key. Clauses that nothing here shows to be
necessary are in `configurations.NOT_SHOWN`. A stamp that equals a named one counts as older: a clock may stand still.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.model.copies_faults import backed_up, fault_steps, replaced, rolled_back_once
from tests.model.copies_keeping import keeper_steps
from tests.model.copies_mail import aborting, acknowledged, adopted, asked, delete, gives_up, mail_steps, refused
from tests.model.copies_state import (
    Bounds,
    Laws,
    Node,
    R,
    State,
    close,
    groups_of,
    live,
    rolled_back,
    served,
)
from tests.model.explorer import change


class Copies:
    """One key on two or three nodes."""

    def __init__(self, laws: Laws | None = None, bounds: Bounds | None = None) -> None:
        self.laws = laws or Laws()
        self.bounds = bounds or Bounds()
        groups = self.bounds.groups
        self._alone = len(set(groups)) == len(groups)

    def start(self) -> State:
        """Where the story begins.

        asked: a front end asked two nodes to commit; first: only one of them. closed: it asked both, and is gone. aborting: it
        asked for an abort, and then heard that both hold copies; giving up: it heard nothing yet; adopted: and what one node
        took was entered meanwhile, and listed; refused: it answered 451 with its asks still on their way. deleted: a listed
        message was deleted. acked: it answered 250 while
        the index was away, its transaction under way. listed: the message is entered. replaced: acked, and all disks were
        replaced, one after the other, since the backup of the index was made. rolled back: listed, and then the disks were
        rolled back, one after the other, since the backup was made.
        """
        state = State(tuple(Node() for _ in self.bounds.groups))
        kind, pair = self.bounds.start, (0, len(self.bounds.groups) - 1)
        if kind == "asked":
            return asked(state, *pair)
        if kind == "first":
            return asked(state, 0)
        if kind == "closed":
            return close(asked(state, *pair))
        if kind in ("aborting", "giving up"):
            state = aborting(state, *pair) if kind == "aborting" else gives_up(asked(state, *pair))
            return backed_up(state) if self.bounds.restores else state
        if kind == "refused":
            state = asked(state, *pair)
            return refused(backed_up(state) if self.bounds.restores else state, *pair)
        if kind == "adopted":
            return adopted(gives_up(asked(state, *pair)))
        if kind == "deleted":
            return delete(acknowledged(state, *pair, entered=True))
        if kind == "rolled back":
            return rolled_back_once(self.laws, acknowledged(state, *pair, entered=True))
        return acknowledged(replaced(state) if kind == "replaced" else state, *pair, entered=kind == "listed")

    def steps(self, state: State) -> Iterator[tuple[str, State]]:
        """All that may happen next."""
        yield from mail_steps(self.laws, self.bounds, state)
        yield from keeper_steps(self.laws, self.bounds, state)
        yield from fault_steps(self.laws, self.bounds, state)

    def canonical(self, state: State) -> State:
        """Nodes that are alone in their groups, or share one, are interchangeable."""
        nodes = sorted(state.nodes)
        if not self._alone:
            groups = self.bounds.groups
            nodes = []
            for group in dict.fromkeys(groups):
                nodes += sorted(n for n, g in zip(state.nodes, groups, strict=True) if g == group)
        ordered = tuple(nodes)
        return state if ordered == state.nodes else change(state, nodes=ordered)

    def wrong(self, state: State) -> str:
        """The promises P1, P4, P7, P8, at any moment, and at rest."""
        if state.answer == "451" and state.shown and not state.restores:
            return "451, and yet listed"
        if (state.deleted or state.answer == "451") and state.row == "live" and served(self.laws, self.bounds, state):
            if not (state.restores and any(self._unread_deletion(n) for n in state.nodes if n.known.member)):
                return "a deleted message is listed" if state.deleted else "451, and yet listed"
        if state.epoch and not state.restores:
            return "lost commits noticed where none were lost"
        if state.restores and state.answer == "250" and state.shown and not state.deleted and state.row != "live":
            if served(self.laws, self.bounds, state) and groups_of(self.bounds, self._holders(state)) >= R:
                return "a listing is short"
        return self._wrong_at_rest(state) if self._quiet(state) else ""

    def rests(self, state: State) -> bool:
        """Nothing is left to do, and the row is live or forgotten."""
        return state.row in ("", "live") and self._quiet(state)

    @staticmethod
    def _unread_deletion(node: Node) -> bool:
        """After lost commits a deletion may show again until the node that has its tombstone was read (law 11)."""
        if "t" not in node.log:
            return node.hand
        return node.known.owes or not node.met or node.log.index("t") >= node.known.mark

    def _holders(self, state: State) -> list[int]:
        return [i for i, n in enumerate(state.nodes) if n.known.member and live(n.log) >= 0]

    def _quiet(self, state: State) -> bool:
        """Nothing but faults, and messages that may arrive at any time, can change anything that matters."""
        if state.front != "done" or state.deliver or state.abort:
            return False
        for n in state.nodes:
            known = n.known
            if n.ask == "passed" or n.kept or n.repair or n.hand:
                return False
            if not known.member:
                continue
            if known.order or known.drop or known.owes or not n.met or known.mark != len(n.log):
                return False
            if n.inc != known.inc or rolled_back(self.laws, n) or n.epoch < state.epoch:
                return False
        return not state.stale or not any(n.ahead or n.epoch > state.epoch for n in state.nodes if n.known.member)

    def _wrong_at_rest(self, state: State) -> str:
        holders = self._holders(state)
        if state.answer == "250" and not state.deleted:
            if state.row != "live":
                return "an acknowledged message is not listed"
            if not holders:
                return "an acknowledged message has no copy"
        for i, n in enumerate(state.nodes):
            if n.known.copy and i not in holders:
                return "belief in a copy that is not there"
            if i in holders and state.row != "live":
                return "an orphan copy"
            if i in holders and not n.known.copy:
                return "a copy that nobody believes in"
        return ""
