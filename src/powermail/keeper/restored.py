"""Owns what a mailbox was, put together from the checkpoints that nodes hold of it (law 13).

The newest state that is complete and decodes: a whole checkpoint and the newest tail of that whole. A tail that was rewritten
replaces the older one, because each holds all that came behind the whole. Pure but for reading records.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from powermail.index import laws
from powermail.index.contract import Head
from powermail.index.laws import Numbers
from powermail.index.rebuilding import RecordPlace
from powermail.index.view import Entry, Op, View
from powermail.keeper.checkpoint_form import (
    BadRecord,
    Delta,
    FirstBody,
    Kind,
    Whole,
    decode_first,
    decode_head,
    decode_tail,
    decode_whole,
    first_entries,
    is_first_release,
)

T = TypeVar("T")
Read = Callable[[RecordPlace], Awaitable[list[bytes]]]
Bad = Callable[[RecordPlace, BadRecord], None]
FIRST = 0  # kind of the first release's records, of which whole ones and deltas lie under one name


class Restored(NamedTuple):
    """A mailbox as its checkpoints show it. `gone`: expunged key to whether its account has it nowhere any more."""

    numbers: Numbers
    view: View
    gone: dict[bytes, bool]
    keywords: dict[str, int]


class _Option(NamedTuple):
    """One way to put a mailbox together; the higher the better.

    Of two that reach the same MODSEQ, that on the later whole one names more of what was expunged: it was written for that.
    """

    uidvalidity: int
    modseq: int
    base: int
    rank: int
    form: int
    whole: bytes
    tail: bytes


def _options(places: Iterable[RecordPlace]) -> list[_Option]:
    """The best first."""
    wholes = {place.tag: place for place in places if place.kind == Kind.WHOLE}
    tails = {place.tag: place for place in places if place.kind == Kind.TAIL}
    options = {_Option(place.uidvalidity, place.modseq, place.base, place.rank, 1, tag, b"") for tag, place in wholes.items()}
    for tag, tail in tails.items():
        for on, whole in wholes.items():
            if (whole.uidvalidity, whole.base) == (tail.uidvalidity, tail.base):
                modseq = max(tail.modseq, whole.modseq)
                options.add(_Option(tail.uidvalidity, modseq, whole.base, whole.rank + tail.rank, 2, on, tag))
    options |= {_Option(place.uidvalidity, place.modseq, 0, 0, FIRST, b"", b"") for place in places if place.kind == FIRST}
    return sorted(options, reverse=True)


async def restored(places: Sequence[RecordPlace], seen: Sequence[Head], read: Read, bad: Bad) -> Restored | None:
    """The newest state that can be read; None if there is none. `seen`: the numbers that any record shows."""
    for option in _options(places):
        state: Restored | None
        if option.form == FIRST:
            state = await _first(places, read, bad)
        else:
            whole = await _decoded(places, option.whole, decode_whole, read, bad)
            tail = await _decoded(places, option.tail, decode_tail, read, bad) if option.tail else None
            state = None if whole is None or (option.tail and tail is None) else merged(whole, tail)
        if state is not None:
            return state._replace(numbers=_highest(state.numbers, seen))
    return None


def _highest(numbers: Numbers, seen: Sequence[Head]) -> Numbers:
    """The state's numbers, raised to the farthest that any record shows, each from its own epoch (law 11).

    A later UIDVALIDITY that no complete checkpoint stands under means a fresh one: nothing is known of how far this one got.
    """
    farthest = numbers
    for head in seen:
        farthest = laws.learned(farthest, head)
    uidvalidity = numbers.uidvalidity if all(head.uidvalidity <= numbers.uidvalidity for head in seen) else 0
    return farthest._replace(uidvalidity=uidvalidity, base_uid=farthest.uid_next, base_modseq=farthest.modseq)


def shown_by(numbers: Numbers, seen: Sequence[tuple[str, Head]]) -> int:
    """Nodes of how many groups show that a mailbox may have got so far (law 11)."""
    uids, modseqs = set(), set()
    for group, head in seen:
        if head.uidvalidity == numbers.uidvalidity:
            uid_next, modseq = laws.reached(head, numbers.epoch)
            uids |= {group} if uid_next >= numbers.uid_next else set()
            modseqs |= {group} if modseq >= numbers.modseq else set()
    return min(len(uids), len(modseqs))


async def _decoded(
    places: Sequence[RecordPlace], tag: bytes, decode: Callable[[Sequence[bytes]], T], read: Read, bad: Bad
) -> T | None:
    """What the records of one writing say, from the first node where they decode; None if there is none."""
    for place in places:
        if place.tag != tag or place.kind == FIRST:
            continue
        try:
            records = [octets for octets in await read(place) if decode_head(octets).tag == tag]
            return decode(records)
        except BadRecord as error:
            bad(place, error)
    return None


def merged(whole: Whole, tail: Delta | None) -> Restored:
    """The state that a whole checkpoint and its tail describe."""
    view, gone, keywords = whole.view, dict(whole.gone), whole.keywords
    head = whole.head
    if tail is not None:
        head, keywords = tail.head, {**keywords, **tail.keywords}
        last = view.uids[-1] if view.uids else 0
        view.arrive(entry for entry in tail.entries if entry[0] > last)  # the whole one may be a little later than its plan
        expunged = _keys_of(view, tail)
        for change in tail.changes:
            view.apply(change)
        named = dict(tail.gone)
        if not head.skipped:
            # What was expunged and is not named among those that live elsewhere was dead then.
            gone.update(dict.fromkeys(expunged, True))
        gone.update(named)
    uid_next, modseq = max(head.uid_next, view.uid_next), max(head.modseq, view.modseq)
    return Restored(Numbers(uid_next, modseq, head.uidvalidity, head.epoch, 0, uid_next, modseq), view, gone, keywords)


def _keys_of(view: View, tail: Delta) -> list[bytes]:
    """Keys that the tail's changes expunge."""
    places = (view.place(uid) for change in tail.changes if change.op is Op.EXPUNGE for uid in change.uids)
    return [view.key(place) for place in places if place >= 0]


# -- the first release ---------------------------------------------------------------------------------------------------------


async def _first(places: Sequence[RecordPlace], read: Read, bad: Bad) -> Restored | None:
    """A state of the first release: its deltas may lie on other nodes than the whole one, and stand one on the other."""
    bodies: list[FirstBody] = []
    for place in places:
        if place.kind != FIRST:
            continue
        for octets in await read(place):
            try:
                if is_first_release(octets):
                    bodies.append(decode_first(octets))
            except BadRecord as error:
                bad(place, error)
    return first_merged(bodies)


def first_merged(bodies: Iterable[FirstBody]) -> Restored | None:
    """The state that records of the first release describe; None without a whole one."""
    complete = _complete(bodies)
    wholes = [one for one in complete if one[0].since == 0]
    if not wholes:
        return None
    state = max(wholes, key=lambda one: (one[0].uidvalidity, one[0].modseq, one[0].at))
    uidvalidity = state[0].uidvalidity
    deltas: dict[int, list[FirstBody]] = {}
    for one in sorted(complete, key=lambda one: (one[0].modseq, one[0].at)):
        if one[0].since and one[0].uidvalidity == uidvalidity:
            deltas[one[0].since] = one  # the newer for the same base replaces the older
    entries: dict[int, Entry] = {entry[0]: entry for entry in first_entries(state)}
    gone: dict[bytes, bool] = {}
    while (delta := deltas.pop(state[0].modseq, None)) is not None:
        for uid in (uid for body in delta for uid in body.expunged):
            if (entry := entries.pop(uid, None)) is not None:
                gone[entry[1]] = True  # nothing was copied or moved in that release
        entries.update({entry[0]: entry for entry in first_entries(delta)})
        state = delta
    head = state[0]
    view = View(uidvalidity, 1, 0)
    view.arrive(entries[uid] for uid in sorted(entries))
    uid_next, modseq = max(head.uid_next, view.uid_next), max(head.modseq, view.modseq)
    return Restored(Numbers(uid_next, modseq, uidvalidity, 0, 0, uid_next, modseq), view, gone, {})


def _complete(bodies: Iterable[FirstBody]) -> list[list[FirstBody]]:
    """Checkpoints of which every part is there, as their parts in order."""
    parts: dict[tuple[int, int, int, float], dict[int, FirstBody]] = {}
    for body in bodies:
        parts.setdefault((body.uidvalidity, body.since, body.modseq, body.at), {})[body.part] = body
    found = []
    for known in parts.values():
        ends = [number for number, body in known.items() if body.last]
        if ends and all(number in known for number in range(min(ends) + 1)):
            found.append([known[number] for number in range(min(ends) + 1)])
    return found
