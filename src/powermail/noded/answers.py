"""Owns what each verb of the node protocol does: an operation becomes a call of the storage contract, its result an answer.

What answers with a list is asked of the node in slices, and only as far as the answer has room: nothing is held that a peer
asked for beyond `answer_octets`. No key comes twice in one operation.

What the table of verbs cannot say about roles is said here: a commit of a repair, and one without a stamp, is a keeper's
(law 2); a front end's mark raises no epoch and retires nobody; it aborts only what it brought itself (`noded.claims`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any, Final

from powermail.base import limits
from powermail.base.errors import NodeTrouble
from powermail.base.world import World
from powermail.cluster import node_values as values
from powermail.noded.claims import Claims
from powermail.storage.contract import Held, Mark, Origin, Position, Rank, Receipt, Stamp, StorageNode, Unread, Whole
from powermail.wire import node_forms as forms
from powermail.wire.node_identity import Peer
from powermail.wire.node_server import Ask
from powermail.wire.node_verbs import VERBS, Role

Answered = tuple[Any, bytes]
_new: Final = tuple.__new__  # of a named tuple, without the function in between: one for each message
_DELIVERY: Final = Origin.DELIVERY
_DONE: Final[Answered] = (forms.NOTHING, b"")
_WHOLE_OCTETS: Final = 64  # what a message and each chunk take beside their octets
_ITEM_OCTETS: Final = 512  # what one of a list takes, as a value and as it is written down
RECORDS: Final = frozenset({VERBS["READ_COMMIT"].number, VERBS["READ_CHUNK"].number})  # answer with one record, of any size
_ANSWER_OCTETS: Final = {
    VERBS["READ_SMALL"].number: limits.NODE_PAGE_OCTETS + limits.READ_SMALL_ALL_OCTETS_MAX,
    VERBS["REREAD"].number: limits.NODE_READING_OCTETS_MAX,
    VERBS["CHECKPOINTS"].number: limits.NODE_READING_OCTETS_MAX,
    VERBS["END"].number: limits.NODE_MARK_OCTETS_MAX,
}
_HAS: Final = VERBS["HAS"].number


class NotAllowed(Exception):
    """The certificate's role may ask this, but not so; `why` is a word for counting."""

    def __init__(self, why: str, text: str) -> None:
        super().__init__(text)
        self.why = why


class Answers:
    """What one node answers, whoever asks."""

    def __init__(self, world: World, node: StorageNode) -> None:
        self.node = node
        self.claims = Claims()
        self._world = world
        self._monotonic = world.clock.monotonic
        self._newest: Stamp | None = None  # that was ever given to a peer
        self._table: dict[int, Callable[[Peer, Any, bytes], Awaitable[Answered]]] = {
            VERBS[name].number: answer
            for name, answer in (
                ("APPEND", self._append),
                ("CANCEL", self._cancel),
                ("ABORT", self._abort),
                ("DELETE", self._delete),
                ("DROP", self._drop),
                ("DISCARD", self._discard),
                ("READ_COMMIT", self._read_commit),
                ("READ_CHUNK", self._read_chunk),
                ("READ_SMALL", self._read_small),
                ("HAS", self._has),
                ("VERIFY", self._verify),
                ("SCAN", self._scan),
                ("REREAD", self._reread),
                ("LIVE_KEYS", self._live_keys),
                ("FENCE", self._fence),
                ("MARK", self._mark),
                ("END", self._end),
                ("PROBE", self._probe),
                ("REBIRTH", self._rebirth),
                ("LIFT_BIRTH", self._lift_birth),
                ("PUT_CHECKPOINT", self._put_checkpoint),
                ("CHECKPOINTS", self._checkpoints),
                ("COMPACTABLE", self._compactable),
                ("COMPACT", self._compact),
                ("OPEN", self._open),
                ("INITIALISE", self._initialise),
            )
        }

    async def answer(self, peer: Peer, ask: Ask) -> Answered:
        """Meta and body of the REPLY. Raises what the contract raises, NotAllowed, Malformed, Unsupported."""
        return await self._table[ask.verb](peer, ask.meta, ask.body)

    def stamp(self) -> forms.StampForm:
        """The node's stamp now (law 2)."""
        stamp = self.node.stamp()
        if stamp is not None:
            self._newest = stamp
        return values.stamp_form(stamp)

    def figures(self) -> forms.StatForm:
        """What is pushed."""
        return values.stat_form(self.node.stat(), self.node.incarnation)

    async def look(self) -> None:
        """Once a second: claims grow old, also while the node does not say where its log ends."""
        end = None
        with suppress(NodeTrouble, TimeoutError):
            async with asyncio.timeout(limits.NODE_PING_INTERVAL_S):  # law 14: no other node waits for it
                end = (await self.node.facts()).end
        self.claims.turn(self._monotonic(), end)

    # -- copies ----------------------------------------------------------------------------------------------------

    def commit(self, peer: Peer, delivers: bool, meta: forms.Commit, body: bytes) -> Awaitable[Receipt]:
        """Asks the node to commit, at once; `delivers` if the peer is a front end.

        Raises NotAllowed, Malformed, Unsupported; the rest comes with the result.
        """
        key, record, boot = meta.key, meta.record, meta.boot
        if record > len(body):
            raise values.Malformed(f"a record of {record} octets in a body of {len(body)}")
        chunks = values.chunks_of(meta.chunks, body, record)
        stamp: Stamp | None = _new(Stamp, (boot, meta.at)) if boot else None
        origin = _DELIVERY
        if meta.origin or stamp is None or not delivers:
            origin = self._origin(peer, meta.origin, stamp)
        newest = self._newest
        if stamp is not None and newest is not None and stamp[1] > newest[1]:
            self._was_given(stamp)
        self.claims.bring(key, peer.id)
        return self.node.commit(key, chunks, body[:record], meta.count, stamp, origin)

    def _origin(self, peer: Peer, number: int, stamp: Stamp | None) -> Origin:
        origin = values.origin_of(number)
        if Role.KEEPER not in peer.roles:
            if origin is Origin.REPAIR:
                raise NotAllowed("role", "only a keeper repairs")
            if stamp is None:
                raise NotAllowed("role", "law 2: a front end's commit brings a stamp")
        if origin is Origin.DELIVERY and Role.FRONT not in peer.roles:
            raise NotAllowed("role", "only a front end delivers")
        return origin

    def _was_given(self, stamp: Stamp) -> None:
        """Law 2: a stamp from the future would never grow too old."""
        newest = self._newest
        if newest is not None and stamp[1] > newest[1] and stamp[0] == newest[0]:
            raise NotAllowed("stamp", "law 2: a stamp that this node has not given yet")

    async def _append(self, peer: Peer, meta: forms.Append, body: bytes) -> Answered:
        chunks = values.chunks_of(meta.chunks, body, 0)
        self.claims.bring(meta.key, peer.id)
        await self.node.append(meta.key, chunks)
        return _DONE

    async def _cancel(self, peer: Peer, meta: forms.KeyForm, body: bytes) -> Answered:
        await self.node.cancel(meta.key)
        return _DONE

    async def _abort(self, peer: Peer, meta: forms.Abort, body: bytes) -> Answered:
        form, body = values.split_mark(meta.mark, body)
        keys = self._keys(body)
        mark = await self._mark_by(peer, form)
        if Role.KEEPER not in peer.roles:
            await self._check_theirs(peer, keys)
        stamp = values.stamp_of(meta.stamp)
        if stamp is None:
            raise NotAllowed("stamp", "law 5: an abort brings the stamp of its delivery")
        self._was_given(stamp)
        end = await self.node.delete(keys, mark, meta.at, stamp)
        return forms.EndForm(end.incarnation, *end.position), b""

    async def _check_theirs(self, peer: Peer, keys: list[bytes]) -> None:
        """What a front end aborts came with its own certificate's id, and was not here before. Raises NotAllowed."""
        for key in keys:
            floor = self.claims.floor(key, peer.id)
            if floor is None:
                raise NotAllowed("not_theirs", "a key that did not come from this certificate's id")
            before = (int.from_bytes(key, "big") - 1).to_bytes(16, "big") if any(key) else b""
            for item in await self.node.inventory(before, 1):
                if item.key == key and item.held is Held.LIVE and item.position < floor:
                    raise NotAllowed("not_theirs", "a copy that was here before")

    async def _delete(self, peer: Peer, meta: forms.Delete, body: bytes) -> Answered:
        mark, body = values.split_mark(meta.mark, body)
        end = await self.node.delete(self._keys(body), values.mark_of(mark), meta.at)
        return forms.EndForm(end.incarnation, *end.position), b""

    async def _drop(self, peer: Peer, meta: forms.Marked, body: bytes) -> Answered:
        mark, body = values.split_mark(meta.mark, body)
        if len(body) > limits.NODE_KEYS_MAX * values.COPY_OCTETS:
            raise values.Malformed(f"{len(body) // values.COPY_OCTETS} copies in one operation")
        done = await self.node.drop(values.split_copies(body), values.mark_of(mark))
        return forms.EndForm(done.end.incarnation, *done.end.position), values.join_keys(done.live)

    async def _discard(self, peer: Peer, meta: forms.Discard, body: bytes) -> Answered:
        mark = values.mark_of(_only_mark(meta.mark, body))
        return values.held_form(await self.node.discard(meta.key, mark)), b""

    # -- reading ---------------------------------------------------------------------------------------------------

    async def _read_commit(self, peer: Peer, meta: forms.KeyForm, body: bytes) -> Answered:
        return forms.NOTHING, await self.node.read_commit(meta.key)

    async def _read_chunk(self, peer: Peer, meta: forms.ReadChunk, body: bytes) -> Answered:
        chunk = await self.node.read_chunk(meta.key, meta.number)
        return values.chunk_form(chunk), chunk.stored

    async def _read_small(self, peer: Peer, meta: forms.Nothing, body: bytes) -> Answered:
        """What is more than a page comes as None: it is read by itself."""
        keys, found = self._keys(body), list[forms.WholeForm | None]()
        left = limits.NODE_PAGE_OCTETS
        for some in _slices(keys):
            if left <= 0:
                found += [None] * len(some)
                continue
            for whole in await self.node.read_small(some):
                if whole is not None:
                    left -= _octets_of(whole)
                found.append(values.whole_form(whole if left >= 0 else None))
        return forms.NOTHING, forms.encode(found)

    async def _has(self, peer: Peer, meta: forms.Nothing, body: bytes) -> Answered:
        found = [values.join_held(await self.node.has(some)) for some in _slices(self._keys(body))]
        return forms.NOTHING, b"".join(found)

    async def _verify(self, peer: Peer, meta: forms.KeyForm, body: bytes) -> Answered:
        return forms.PositionForm(*await self.node.verify(meta.key)), b""

    # -- keeping ---------------------------------------------------------------------------------------------------

    async def _scan(self, peer: Peer, meta: forms.ScanAsk, body: bytes) -> Answered:
        return values.scan_forms(await self.node.scan(Position(meta.segment, meta.offset), meta.limit, meta.age_s))

    async def _reread(self, peer: Peer, meta: forms.UnreadForm, body: bytes) -> Answered:
        scan = await self.node.reread(Unread(Position(meta.segment, meta.offset), meta.octets))
        if scan is None:
            nowhere = forms.PositionForm(0, 0)
            return forms.ScanHead("", nowhere, nowhere, gone=True), b""
        return values.scan_forms(scan)

    async def _live_keys(self, peer: Peer, meta: forms.Page, body: bytes) -> Answered:
        return forms.NOTHING, values.items_form(await self.node.inventory(meta.after, meta.limit))

    async def _fence(self, peer: Peer, meta: forms.StampForm, body: bytes) -> Answered:
        stamp = Stamp(meta.boot, meta.at)
        self._was_given(stamp)
        return forms.PositionForm(*await self.node.fence(stamp)), b""

    async def _mark(self, peer: Peer, meta: forms.Marked, body: bytes) -> Answered:
        await self.node.put_mark(await self._mark_by(peer, _only_mark(meta.mark, body)))
        return _DONE

    async def _mark_by(self, peer: Peer, form: forms.MarkForm) -> Mark:
        """A keeper's mark is heard whole. Others raise no epoch; who is retired is not heard from a front end."""
        mark = values.mark_of(form)
        if Role.KEEPER in peer.roles:
            return mark
        known = (await self.node.facts()).mark
        if mark.epoch > known.epoch:
            raise NotAllowed("epoch", f"epoch {mark.epoch} is not known here yet: a keeper brings it")
        retired = mark.retired if Role.OPERATOR in peer.roles else ()
        return Mark(mark.sequence, mark.slots, mark.epoch, mark.uidvalidity, retired)

    async def _end(self, peer: Peer, meta: forms.Nothing, body: bytes) -> Answered:
        return forms.NOTHING, forms.encode(values.facts_form(await self.node.facts()))

    async def _probe(self, peer: Peer, meta: forms.Nothing, body: bytes) -> Answered:
        await self.node.probe()
        return _DONE

    async def _rebirth(self, peer: Peer, meta: forms.Nothing, body: bytes) -> Answered:
        birth = await self.node.rebirth()
        return forms.EndForm(self.node.incarnation, *birth), b""

    async def _lift_birth(self, peer: Peer, meta: forms.Nothing, body: bytes) -> Answered:
        await self.node.lift_birth()
        return _DONE

    async def _put_checkpoint(self, peer: Peer, meta: forms.PutCheckpoint, body: bytes) -> Answered:
        rank = Rank(meta.epoch, meta.uidvalidity, meta.modseq)
        mark, record = values.split_mark(meta.mark, body)
        await self.node.put_checkpoint(meta.name, meta.number, record, values.mark_of(mark), rank)
        return _DONE

    async def _checkpoints(self, peer: Peer, meta: forms.CheckpointsAsk, body: bytes) -> Answered:
        names = min(meta.limit, limits.NODE_PAGE_NAMES)
        records, following = await self.node.checkpoints_page(meta.after, names, meta.skip)
        return forms.CheckpointsHead(following), forms.encode([forms.CheckpointForm(*record) for record in records])

    async def _compactable(self, peer: Peer, meta: forms.Compactable, body: bytes) -> Answered:
        keys = await self.node.compactable(Position(meta.segment, meta.offset), meta.at)
        return forms.CompactableHead(keys is not None), values.join_keys(keys or [])

    async def _compact(self, peer: Peer, meta: forms.Compact, body: bytes) -> Answered:
        mark, body = values.split_mark(meta.mark, body)
        below = Position(meta.segment, meta.offset)
        freed = await self.node.compact(below, values.split_keys(body), values.mark_of(mark))
        return forms.Freed(max(0, freed)), b""

    # -- life ------------------------------------------------------------------------------------------------------

    async def _open(self, peer: Peer, meta: forms.Nothing, body: bytes) -> Answered:
        await self.node.open()
        await self.look()
        return _DONE

    async def _initialise(self, peer: Peer, meta: forms.Nothing, body: bytes) -> Answered:
        await self.node.initialise()
        return _DONE

    def _keys(self, body: bytes) -> list[bytes]:
        if len(body) > limits.NODE_KEYS_MAX * values.KEY_OCTETS:
            raise values.Malformed(f"{len(body) // values.KEY_OCTETS} keys in one operation")
        keys = values.split_keys(body)
        if len(set(keys)) < len(keys):
            raise values.Malformed("a key that comes twice in one operation")
        return keys


def _only_mark(octets: int, body: bytes) -> forms.MarkForm:
    """A body that is a mark. Raises Malformed."""
    form, rest = values.split_mark(octets, body)
    if rest:
        raise values.Malformed(f"{len(rest)} octets behind a mark")
    return form


def _slices(keys: list[bytes]) -> Iterator[list[bytes]]:
    """Keys as they are asked of a node: others get their turn between."""
    size = limits.NODE_SLICE_KEYS
    return (keys[start : start + size] for start in range(0, len(keys), size))


def answer_octets(ask: Ask, record: int) -> int:
    """What the answer to a read takes of memory at most while it is made; `record` is what one record is taken to have."""
    verb = ask.verb
    if verb in RECORDS:
        return record
    if verb == _HAS:
        return 8 * len(ask.body)
    return _ANSWER_OCTETS.get(verb) or _ITEM_OCTETS * int(ask.meta.limit)


def _octets_of(whole: Whole) -> int:
    return len(whole.commit) + sum(len(part) + _WHOLE_OCTETS for part in whole.parts) + _WHOLE_OCTETS
