"""What a connection may make a node hold: answers that wait, lists, keys, claims; and who is cut for not reading."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from powermail.base import limits
from powermail.noded.answers import answer_octets
from powermail.noded.claims import Claims
from powermail.storage.contract import Chunk, Mark, Origin, Position, Whole
from powermail.wire import node_forms as forms
from powermail.wire.node_server import Ask
from powermail.wire.node_verbs import READS, VERBS, Failure
from tests.noded.installation import Installation, Raw, installation, until
from tests.noded.speaking import frame
from tests.storage.support import key

NO_MARK = Mark()
LARGE = bytes(256 * limits.KIB)


@pytest.fixture
async def there(tmp_path: Path) -> AsyncIterator[Installation]:
    """A node that is served."""
    async with installation(tmp_path) as made:
        yield made


async def put(there: Installation, number: int, octets: bytes = LARGE) -> None:
    """A message of one chunk."""
    await there.node.commit(key(number), [Chunk(0, 0, octets, len(octets))], b"{}", 1, None, Origin.DELIVERY)


def connection_of(there: Installation, bulk: bool) -> Any:
    """The node's end."""
    (found,) = [each for each in there.service._connections if each.bulk is bulk]
    return found


async def unread(there: Installation, lane: int, count: int = 60) -> Raw:
    """A peer that asks for much and reads nothing of it."""
    await put(there, 1)
    raw = await there.welcomed(lane=lane)
    raw.writer.transport.pause_reading()  # type: ignore[attr-defined]
    raw.say(*[frame("READ_CHUNK", number, [key(1), 0]) for number in range(2, 2 + count)])
    connection = connection_of(there, bool(lane))
    await until(lambda: connection._full and connection._machine.large_octets > limits.NODE_ANSWERS_OCTETS_MAX)
    return raw


# -- not reading ---------------------------------------------------------------------------------------------------


async def test_a_peer_that_reads_slowly_is_not_one_that_does_not_read(there: Installation) -> None:
    """Progress counts, not emptiness: what waits for it is never nothing, for as long as it likes."""
    raw = await unread(there, lane=0, count=200)
    connection, now = connection_of(there, bulk=False), asyncio.get_running_loop().time()
    reader, frames, answered = raw._reader, raw._frames, 0
    raw.writer.transport.resume_reading()  # type: ignore[attr-defined]
    for look in range(1, 8):
        before = connection._written - connection._unsent()
        while connection._written - connection._unsent() < before + 2 * limits.NODE_PIECE_OCTETS:
            octets = await reader.read(1 << 18)
            answered += sum(not one[1] for one in frames.feed(octets))
        await there.service.sweep(now + look * (limits.NODE_WRITE_TIMEOUT_S - 1))
        connection._heard_at = now + look * (limits.NODE_WRITE_TIMEOUT_S - 1)  # it pings meanwhile
    assert not connection.closed and there.refused("not_reading") == 0
    while answered < 200:
        answered += sum(not one[1] for one in frames.feed(await reader.read(1 << 18)))


async def test_a_peer_that_reads_a_drop_now_and_then_does_not_read(there: Installation) -> None:
    raw = await unread(there, lane=0)
    connection, now = connection_of(there, bulk=False), asyncio.get_running_loop().time()
    await there.service.sweep(now + 1.0)
    for second in range(2, int(limits.NODE_WRITE_TIMEOUT_S) + 4):
        connection._written += 100  # as if so much had left
        connection._heard_at = now + second
        await there.service.sweep(now + second)
    assert there.refused("not_reading") == 1
    raw.close()


async def test_a_bulk_connection_that_is_not_read_cuts_no_link(there: Installation) -> None:
    """It holds up itself; its answers are bounded."""
    small = await there.welcomed()
    await unread(there, lane=1)
    bulk, now = connection_of(there, bulk=True), asyncio.get_running_loop().time()
    for second in (1.0, 20.0, 40.0):
        small.say(frame("PING", int(second) + 1))
        await small.hear("REPLY")
        bulk._heard_at = now + second
        connection_of(there, bulk=False)._heard_at = now + second
        await there.service.sweep(now + second)
    assert not bulk.closed and there.refused("not_reading") == 0
    there.service._paused = True  # all connections together hold too much
    bulk._heard_at = connection_of(there, bulk=False)._heard_at = now + 60.0
    await there.service.sweep(now + 60.0)
    there.service._paused = False
    assert bulk.closed and there.refused("not_reading") == 1


@pytest.mark.parametrize("lane", [0, 1])
async def test_a_ping_is_answered_before_all_that_waits(there: Installation, lane: int) -> None:
    """Behind what the transport has taken, and before more than ten times as much."""
    raw = await unread(there, lane, count=40)
    raw.say(frame("PING", 999))
    connection = connection_of(there, bool(lane))
    await until(lambda: connection._pings == 1)
    waited = connection._machine.large_octets
    raw.writer.transport.resume_reading()  # type: ignore[attr-defined]
    pieces = 0
    while (said := await raw.hear())[1] != 999:
        pieces += len(said[3])
    rest = 0
    while rest + pieces < 40 * len(LARGE):
        rest += len((await raw.hear())[3])
    assert rest > waited // 2


async def test_who_asks_on_and_reads_nothing_is_read_no_more(there: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that are short wait for nothing, so that they are bounded by what is asked."""
    monkeypatch.setattr(limits, "NODE_ANSWERS_OCTETS_MAX", 100_000)
    monkeypatch.setattr(limits, "NODE_UNSENT_OCTETS", 20_000)
    await put(there, 1, bytes(4000))
    raw = await there.welcomed()
    connection = connection_of(there, bulk=False)
    raw.writer.transport.pause_reading()  # type: ignore[attr-defined]
    number = 1
    while not connection._flooded:
        raw.say(*[frame("READ_CHUNK", number + more, [key(1), 0]) for more in range(1, 101)])
        number += 100
        await until(
            lambda upto=number: (
                connection._flooded or (connection._machine._last == upto and not connection._machine.unanswered)
            )
        )
    assert there.world.counters.get("noded.flooded") == 1 and connection._unsent() < 1_000_000
    raw.writer.transport.resume_reading()  # type: ignore[attr-defined]
    for _ in range(number - 1):
        assert len((await raw.hear("REPLY"))[3]) == 4000
    assert not connection._flooded, "when it reads again it is read again"


async def test_large_answers_count_in_what_all_connections_hold(there: Installation) -> None:
    await unread(there, lane=1)
    assert there.service.describe()["held_octets"] > limits.NODE_ANSWERS_OCTETS_MAX
    there.service.cut()
    assert there.service.describe()["held_octets"] == 0


# -- lists ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "meta"), [("READ_SMALL", []), ("HAS", []), ("ABORT", [0.0, 0, ["boot", 1.0]]), ("DELETE", [0.0, 0])]
)
async def test_no_key_comes_twice_in_one_operation(there: Installation, verb: str, meta: list[Any]) -> None:
    """Nor more than may be (X05); the numbers of a connection only rise, and what it brings is claimed in a bounded table."""
    raw = await there.welcomed("peer-1", "front", "keeper")
    raw.say(frame(verb, 2, meta, key(1) + key(2) + key(1)))
    assert (await raw.hear())[2][0] == Failure.MALFORMED and there.asked() == []
    too_many = b"".join(number.to_bytes(16, "big") for number in range(limits.NODE_KEYS_MAX + 1))
    raw.say(*_pieces(verb, 3, meta, too_many))
    assert (await raw.hear())[2][0] == Failure.MALFORMED and there.asked() == []


def _pieces(verb: str, number: int, meta: list[Any], body: bytes) -> list[bytes]:
    size = limits.NODE_PIECE_OCTETS
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    last = len(parts) - 1
    return [frame(verb, number, None if at else meta, part, int(at < last)) for at, part in enumerate(parts)]


async def test_our_client_names_no_key_twice(there: Installation) -> None:
    await put(there, 1, b"one")
    node = there.remote("peer-1", "front", "keeper")
    await node.open()
    asked = [key(1), key(2), key(1)]
    assert [held.value for held in await node.has(asked)] == ["live", "absent", "live"]
    assert [whole is not None for whole in await node.read_small(asked)] == [True, False, True]
    await node.delete(asked, NO_MARK, 0.0)
    assert [held.value for held in await node.has(asked)] == ["dead"] * 3


async def test_small_messages_are_read_in_slices_and_no_further_than_the_answer_has_room(
    there: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "NODE_SLICE_KEYS", 3)
    monkeypatch.setattr(limits, "NODE_PAGE_OCTETS", 2000)
    asked: list[int] = []

    async def read_small(keys: list[bytes]) -> list[Whole | None]:
        asked.append(len(keys))
        return [Whole(b"{}", [bytes(500)]) for _ in keys]

    there.node.read_small = read_small  # type: ignore[assignment,method-assign]
    raw = await there.welcomed()
    raw.say(frame("READ_SMALL", 2, [], b"".join(key(number) for number in range(1, 11))))
    found = msgspec.msgpack.decode((await raw.hear("REPLY"))[3])
    assert [whole is not None for whole in found] == [True] * 3 + [False] * 7 and asked == [3, 3], "and then not at all"


async def test_has_is_asked_in_slices(there: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "NODE_SLICE_KEYS", 4)
    await put(there, 6, b"six")
    before = there.node.calls.count("has")
    raw = await there.welcomed()
    raw.say(frame("HAS", 2, [], b"".join(key(number) for number in range(1, 11))))
    assert (await raw.hear("REPLY"))[3] == bytes([2] * 5 + [0] + [2] * 4)
    assert there.node.calls.count("has") - before == 3


async def test_reads_at_once_are_bounded_by_what_they_may_answer(there: Installation) -> None:
    held = asyncio.Event()
    begun: list[int] = []

    async def scan(*asked: Any) -> Any:
        begun.append(asked[1])
        await held.wait()
        raise AssertionError("nobody waits for it")

    there.node.scan = scan  # type: ignore[assignment,method-assign]
    raw = await there.welcomed("keeper-1", "keeper")
    raw.say(*[frame("SCAN", number, [0, 0, 10_000, 0.0]) for number in range(2, 30)], frame("PING", 99))
    assert (await raw.hear("REPLY"))[1] == 99
    (connection,) = there.service._connections
    await until(lambda: len(begun) == limits.NODE_READING_OCTETS_MAX // answer_octets(_ask("SCAN", 0, 0, 10_000, 0.0), 0))
    assert connection._reading_octets <= limits.NODE_READING_OCTETS_MAX and len(begun) < 5
    raw.close()


def _ask(verb: str, *fields: Any) -> Ask:
    return Ask(VERBS[verb].number, 2, VERBS[verb].meta(*fields), b"")


def test_every_read_says_what_its_answer_may_take() -> None:
    """And none may take more than all of them at once."""
    metas = {"SCAN": (0, 0, 10_000, 0.0), "LIVE_KEYS": (b"", 10_000), "REREAD": (0, 0, 0), "CHECKPOINTS": (b"", 8, 0)}
    metas |= {"READ_COMMIT": (key(1),), "READ_CHUNK": (key(1), 0)}
    for verb in VERBS.values():
        if verb.number in READS:
            octets = answer_octets(_ask(verb.name, *metas.get(verb.name, ())), limits.MIB)
            assert 0 <= octets <= limits.NODE_READING_OCTETS_MAX, verb.name
    assert answer_octets(Ask(VERBS["HAS"].number, 2, forms.NOTHING, bytes(1600)), 0) >= 1600


async def test_of_checkpoints_only_the_page_is_read(there: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "NODE_PAGE_OCTETS", 1000)
    for number in range(30):
        await there.node.put_checkpoint(key(1), number, bytes([number]) * 300, NO_MARK)
    raw = await there.welcomed("keeper-1", "keeper")
    skip, seen, asks = 0, list[int](), 0
    while asks == 0 or skip:
        asks += 1
        raw.say(frame("CHECKPOINTS", 1 + asks, [b"", 5, skip]))
        _, _, (skip,), body = await raw.hear("REPLY")
        assert len(body) < 1200
        seen += [number for _, number, _ in msgspec.msgpack.decode(body)]
    assert seen == list(range(30)) and asks == 10


# -- marks ---------------------------------------------------------------------------------------------------------

MANY = Mark(20_000, {number: (f"tag-{number:08x}", number) for number in range(1, 20_001)}, 3, 7, ("gone",))


async def test_a_mark_of_many_writers_goes_with_every_verb(there: Installation) -> None:
    """Law 10: a meta holds about 2,500 slots, an installation of many front ends has had more."""
    assert len(forms.encode(forms.MarkForm(MANY.sequence, MANY.slots))) > 5 * limits.NODE_META_OCTETS_MAX
    node = there.remote("peer-1", "front", "keeper")
    await node.open()
    await put(there, 1, b"one")
    await put(there, 2, b"two")
    await node.put_mark(MANY)
    assert (await node.facts()).mark == MANY
    await node.delete([key(1)], MANY, 0.0)
    await node.delete([key(1)], MANY, 0.0, node.stamp())
    await node.drop([(key(9), Position(1, 128))], MANY)
    await node.discard(key(2), MANY)
    await node.put_checkpoint(key(5), 0, b"record", MANY)
    assert await node.checkpoints(b"", 9) == [(key(5), 0, b"record")]
    await node.compact(Position(0, 0), [key(1)], MANY)
    assert [held.value for held in await node.has([key(1), key(2)])] == ["dead", "live"]


async def test_marks_that_lie_about_their_length_are_refused(there: Installation) -> None:
    raw = await there.welcomed("peer-1", "front", "keeper")
    good = forms.encode(forms.MarkForm())
    for number, (octets, body) in enumerate(
        [(len(good) + 1, good), (1, good), (len(good), good + b"x"), (9, b"\xc1" * 9), (limits.NODE_MARK_OCTETS_MAX + 1, good)],
        2,
    ):
        raw.say(frame("MARK", number, [octets], body))
        assert (await raw.hear())[2][0] == Failure.MALFORMED, (octets, body)
    raw.say(frame("DELETE", 20, [0.0, len(good)], good + b"short"), frame("MARK", 21, [0]))
    assert {(await raw.hear())[:2] for _ in range(2)} == {("ERROR", 20), ("REPLY", 21)}
    assert "delete" not in there.node.calls


# -- claims --------------------------------------------------------------------------------------------------------


async def test_claims_are_bounded_while_the_node_is_missing(there: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "NODE_CLAIMS_MAX", 100)
    there.node.miss()
    raw = await there.welcomed()
    raw.say(*[frame("APPEND", number, [number.to_bytes(16, "big"), []]) for number in range(2, 802)])
    for _ in range(800):
        assert (await raw.hear())[0] == "ERROR"
    await there.service.sweep(asyncio.get_running_loop().time())
    claims = there.service._answers["a"].claims
    assert len(claims._now) + len(claims._before) <= 200


def test_claims_grow_old_while_nobody_knows_where_the_log_ends() -> None:
    claims = Claims()
    claims.turn(0.0, Position(1, 100))
    claims.bring(key(1), "x")
    claims.turn(limits.NODE_CLAIM_S, None)
    assert claims.floor(key(1), "x") == Position(1, 100)
    claims.bring(key(2), "x")
    floor = claims.floor(key(2), "x")
    assert floor is not None and floor > Position(1 << 40, 0), "all that is there may be another's"
    claims.turn(limits.NODE_CLAIM_S + 1, Position(2, 500))
    assert claims.floor(key(2), "x") == Position(2, 500), "what was written since is not"
    claims.turn(2 * limits.NODE_CLAIM_S, None)
    claims.turn(3 * limits.NODE_CLAIM_S, None)
    assert claims.floor(key(1), "x") is None and claims.floor(key(2), "x") is None
