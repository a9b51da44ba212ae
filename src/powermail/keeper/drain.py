"""Owns emptying nodes and taking them out of the cluster, without losing a copy whatever crashes meanwhile.

The order (destructive changes of the layout): the layout says that the node takes no mail; that layout is durable on the node,
which refuses from then on who goes by an older one; a fence behind all that was asked before; its log is entered in the index
up to its end then, not only what the index knew. Repair makes the copies elsewhere, because what lies there counts no more.
Only when no message depends on the node, by the nodes that are there, and no checkpoint or note lies on too few groups without
it: `leaving`, by compare-and-set; the same once more; then it is expelled.

A node that was forced out, or whose disk was replaced, handed nothing on: those that stay do, and what lay there of
checkpoints is written anew.

A drain is a row of `moves`, and so is handing on: any keeper goes on with it. What it does twice does no harm.
Danger: a node that is expelled while the end of its log was not entered takes acknowledged mail with it (P1).
"""

from __future__ import annotations

from typing import Final, NamedTuple

from powermail.base import limits
from powermail.base.errors import IndexTrouble, NodeTrouble, NotRedundant, OperatorError
from powermail.base.log import Event
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.index.contract import Index
from powermail.index.sharing import HAND_ON, MoveRow
from powermail.keeper.belief import known_row
from powermail.keeper.checkpoint import hand_on, hand_on_of
from powermail.keeper.following import LayoutFollower
from powermail.keeper.reconcile import Reconciler
from powermail.storage.contract import Stamp, StorageNode
from powermail.storage.layout import LayoutChange, LayoutRow, Standing

_NO_STAMP: Final = Stamp("", 0.0)  # of no opening
DRAIN, REMOVE = "drain", "remove"
_STOPPING, _COPYING, _DRAINED, _LEAVING = "stopping", "copying", "drained", "leaving"


class Dependence(NamedTuple):
    """What depends on a node: copies that must be made elsewhere before it may go, their octets, and messages that are nowhere
    else (of them).
    """

    copies: int
    octets: int
    only_here: int

    def estimate_s(self) -> float:
        """How long moving them takes, about."""
        return max(self.copies / limits.MOVE_COPIES_PER_S, self.octets / limits.MOVE_OCTETS_PER_S)


async def dependence(index: Index, counted: dict[str, str], node: str, group: str, required: int) -> Dependence:
    """What of the redundancy that there is would be lost with a node, when the copies on `counted` (node to group) count beside
    it. Raises IndexTrouble.
    """
    others = {name: where for name, where in counted.items() if name != node}
    copies = octets = only_here = 0
    for number in range(1, required + 1):
        without = await index.under_copied_total(others, number)
        with_it = await index.under_copied_total({**others, node: group}, number)
        copies += max(0, without[0] - with_it[0])
        octets += max(0, without[1] - with_it[1])
        if number == 1:
            only_here = copies
    return Dependence(copies, octets, only_here)


def seconds_left(move: MoveRow, now: float) -> float | None:
    """How long a move still takes, as far as it can be told by what it has done."""
    if not move.done or move.done >= move.total or now <= move.began_at:
        return None
    return round((now - move.began_at) / move.done * (move.total - move.done), 1)


class Drainer:
    """Goes on with every drain. What keeps one waiting stands in its row."""

    def __init__(self, world: World, cluster: Cluster, index: Index, reconciler: Reconciler, following: LayoutFollower) -> None:
        self._world = world
        self._cluster = cluster
        self._index = index
        self._reconciler = reconciler
        self._following = following
        self._written_anew: dict[str, float] = {}  # by node: since when no checkpoint is to lie there (UTC)
        self._ended_in = 0  # version of the layout whose expelled nodes get no certificates any more
        self._handed_on: dict[str, dict[str, str]] = {}  # by move: from which nodes and incarnations, while others are away

    async def step(self) -> float:
        """One look at each node that is to be emptied. Raises IndexTrouble."""
        await self._end_expelled()
        if self._index.catching_up or not self._index.numbering:
            return limits.MOVE_LOOK_S
        began = self._world.clock.monotonic()
        await self._note_missing()
        moves = {move.name: move for move in await self._index.moves()}
        if moves:
            await self._following.refresh()  # behind the moves: who asked for one has changed the layout before
        wanted = {row.id: row for row in self._cluster.layout.members() if row.state in (Standing.DRAINING, Standing.LEAVING)}
        for name, move in moves.items():
            verb, _, node = name.partition(" ")
            if verb in (DRAIN, REMOVE) and node not in wanted:
                await self._index.end_move(name)  # it is out, or takes mail again
            elif verb == HAND_ON:
                await self._hand_on(node, move)
        for row in wanted.values():
            move = moves.get(f"{REMOVE} {row.id}") or moves.get(f"{DRAIN} {row.id}") or await self._begin(row)
            try:
                after = await self._go_on(row, move)
            except (NodeTrouble, NotRedundant, OperatorError) as error:
                after = move._replace(note=str(error))
            if after is not None and after != move:
                await self._index.note_move(after)
        # Counting goes through all messages: it is done seldom where there are many.
        took_s = self._world.clock.monotonic() - began
        return max(limits.MOVE_LOOK_S, took_s * limits.MOVE_LOOK_SHARE) if wanted else limits.MOVE_IDLE_S

    async def _hand_on(self, node: str, move: MoveRow) -> None:
        """What lay on a disk that went lies on R groups of those that stay (P10, laws 11, 13). Raises IndexTrouble."""
        counted = self._cluster.counted()
        there = [each for each in self._cluster.admitted() if each.id in counted]
        away = sorted(counted.keys() - {each.id for each in there})
        read = {each.id: each.incarnation for each in there}
        try:
            if read != self._handed_on.get(move.name):
                if (groups := len({each.group for each in there})) < self._cluster.copies_required:
                    raise NotRedundant(f"only {groups} groups are there")
                await self._index.checkpoints_lost(node)  # also what was being written there when it went
                await hand_on_of(self._cluster, there, await self._index.proof(self._index.connection))
                self._handed_on[move.name] = read
            why = f"what only {', '.join(away)} may have is handed on when it is back" if away else ""
        except (NodeTrouble, NotRedundant, OperatorError) as error:
            why = str(error)
        if why:
            if why != move.note:
                await self._index.note_move(move._replace(note=why))
            return
        self._handed_on.pop(move.name, None)
        await self._index.end_move(move.name, move.began_at)
        self._world.counters.add("keeper.handed_on")
        self._world.log.event(Event.MOVE, move=move.name, state="done")

    async def _end_expelled(self) -> None:
        """Law 9: whom the layout says to be expelled is no member, also in an index that was put back and has it as one.
        By compare-and-set: a new disk of that name may have entered meanwhile.
        """
        layout = self._cluster.layout
        expelled = {row.id for row in layout.rows if row.state is Standing.EXPELLED}
        for name in [row.id for row in await self._index.node_rows() if row.id in expelled] if expelled else ():
            if await self._index.expel(name, layout.version):
                self._world.counters.add("keeper.expelled_anew")
                self._world.log.event(Event.MOVE, move=f"{REMOVE} {name}", state="expelled anew")
        reached = {row.id for row in layout.rows if row.id in expelled and row.address}
        if reached and layout.version != self._ended_in:  # who expelled it may have died before its certificate ended
            known = {holder.identity for holder in await self._index.holders() if holder.expelled_at}
            for name in sorted(reached - known):
                await self._index.expel_identity(name)
        self._ended_in = layout.version

    async def _note_missing(self) -> None:
        """Since when a member was not heard: what it took later is not known. Admission ends it."""
        rows = await self._index.node_rows()
        there = {node.id for node in self._cluster.admitted()}
        for row in rows:
            away = row.id not in there
            if away is not bool(row.missing_since):
                await self._index.set_node_flags(row.id, None, self._world.clock.now() if away else 0.0)

    async def _begin(self, row: LayoutRow) -> MoveRow:
        found = await self._dependence(row)
        move = MoveRow(f"{DRAIN} {row.id}", _STOPPING, found.copies, 0, self._world.clock.now())
        await self._index.note_move(move)
        self._world.log.event(Event.MOVE, move=move.name, state="begun", copies=found.copies)
        return move

    async def _dependence(self, row: LayoutRow) -> Dependence:
        return await dependence(self._index, self._cluster.counted(), row.id, row.group, self._cluster.copies_required)

    async def _go_on(self, row: LayoutRow, move: MoveRow) -> MoveRow | None:
        """Where the move is then; None when it ended. Raises NodeTrouble, IndexTrouble."""
        node = self._cluster.nodes.get(row.id)
        if node is None or node not in self._cluster.admitted():
            return move._replace(note="the node is away: what it took last is not known; it is waited for")
        if move.phase == _STOPPING:
            if why := await self._enter_log(node):
                return move._replace(note=why)
            move = move._replace(phase=_COPYING, note="")
        left = (await self._dependence(row)).copies
        total = max(move.total, left)
        move = move._replace(total=total, done=total - left, note="")
        if left:
            return move._replace(phase=_COPYING)
        if why := await self._doubt(node):
            return move._replace(phase=_COPYING, note=why)
        if row.state is not Standing.LEAVING and not move.name.startswith(f"{REMOVE} "):
            if move.phase != _DRAINED:
                if why := await self._enter_log(node):  # it may have taken mail: the drain was taken back, and wanted again
                    return move._replace(phase=_COPYING, note=why)
                self._world.log.event(Event.MOVE, move=move.name, state=_DRAINED)
            return move._replace(phase=_DRAINED)
        return await self._leave(row, node, move._replace(phase=_LEAVING))

    async def _enter_log(self, node: StorageNode) -> str:
        """Everything in the node's log up to its end, after it stopped taking mail, is entered in the index; else why not yet.

        Raises NodeTrouble, IndexTrouble.
        """
        await self._following.fence(node)  # durable there: who goes by an older layout commits nothing any more
        stamp = await node.fresh_stamp() or _NO_STAMP  # a full or dying disk has none, and takes no commit in this opening
        end = await node.fence(stamp)  # law 2: nothing that was asked before comes in behind this end
        if not await self._reconciler.advance(node, 0.0, end):
            return "its log is not entered to its end yet"
        if await self._index.unread(node.id, 1):
            return "parts of its log cannot be read: mail may be there; it can only be expelled, with that risk"
        return ""

    async def _doubt(self, node: StorageNode) -> str:
        """Why copies may lie there that no belief tells of, and that may be the last ones; "" if none do."""
        known = await known_row(self._index, node)
        if known is None or known.owes_compare or not known.boot:
            return "what lies there was not compared with the index to its end yet"
        if await self._index.suspects(node.id, b"", 1):
            return "copies there are suspected to be bad, and may be the best there are: they are kept until others are good"
        return ""

    async def _risk(self, row: LayoutRow, node: StorageNode) -> str:
        """What would be less redundant without a node, counting only what is there; "" if nothing would."""
        others, required = self._cluster.counted_there(), self._cluster.copies_required
        if (groups := len(set(others.values()))) < required and row.state is not Standing.LEAVING:
            return f"only {groups} groups would be left that are there, for {required} copies"
        if left := (await dependence(self._index, others, row.id, row.group, required)).copies:
            return f"{left} copies elsewhere lie on nodes that are away: waiting for them, or for repair"
        # Law 13: whole checkpoints are written anew without it, before its own go.
        if await self._index.checkpoints_lost(row.id) or row.id not in self._written_anew:
            self._written_anew[row.id] = self._world.clock.now()
        if await self._index.checkpoint_due(self._written_anew[row.id], 1):
            return "checkpoints are written to other nodes first"
        if row.state is not Standing.LEAVING:  # nothing is counted there any more since (laws 11, 13)
            await hand_on(self._cluster, node, others, await self._index.proof(self._index.connection))
        return ""

    async def _leave(self, row: LayoutRow, node: StorageNode, move: MoveRow) -> MoveRow | None:
        """The last steps, each of which may be repeated. Raises NodeTrouble, IndexTrouble."""
        layout = self._cluster.layout
        if layout.row(row.id) != row:  # taken over since this look began: compare-and-set would name the newer version
            return move._replace(note="the layout has changed meanwhile: looked at again")
        if why := await self._risk(row, node):
            return move._replace(note=why)
        if row.state is not Standing.LEAVING:
            changed = await self._index.change_layout([LayoutChange(row.id, state=Standing.LEAVING)], layout.version)
            await self._following.refresh()
            if changed is None:
                return move._replace(note="the layout has changed meanwhile: looked at again")
            layout = changed
        for why in await self._following.fence_all():
            self._world.log.event(Event.TROUBLE, worker="drain", error=why)  # it is told when it is back
        if why := await self._enter_log(node):
            return move._replace(note=why)
        if left := (await self._dependence(row)).copies:  # repair goes on: what lies there counts no more
            return move._replace(phase=_COPYING, total=max(move.total, left), done=max(move.total, left) - left)
        if why := await self._doubt(node):
            return move._replace(note=why)
        if row.address:  # before the last step: a keeper that ends between the two leaves nothing undone
            await self._index.expel_identity(row.id)
        if not await self._index.expel(row.id, layout.version):
            await self._following.refresh()
            return move._replace(note="the layout has changed meanwhile: looked at again")
        self._written_anew.pop(row.id, None)
        await self._index.end_move(move.name)
        await self._index.end_move(f"{HAND_ON} {row.id}")  # that was done before it was leaving
        self._world.counters.add("keeper.removed_nodes")
        self._world.log.event(Event.MOVE, move=move.name, state="removed")
        try:
            await node.put_mark(await self._index.proof(self._index.connection))  # law 9: it knows that it never comes back
        except (NodeTrouble, IndexTrouble) as error:
            self._world.log.event(Event.TROUBLE, worker="drain", node=row.id, error=str(error))
        await self._following.refresh()
        return None
