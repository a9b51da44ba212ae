"""Who may come in, what each may do, and what becomes of peers that are slow, loud, late or not who they should be."""

from __future__ import annotations

import asyncio
import datetime
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from powermail.base import limits
from powermail.base.errors import CommitRefused, NodeTrouble, OperatorError
from powermail.storage.contract import Chunk, Mark, NodeState, Origin, Position, Receipt
from powermail.wire import node_forms as forms
from powermail.wire.node_frames import HEADER
from powermail.wire.node_verbs import Failure
from tests.noded.certificates import uris
from tests.noded.installation import CLUSTER, SOON_S, Installation, Raw, installation, until
from tests.noded.speaking import frame, hello, operation
from tests.storage.support import key

NO_MARK = Mark()


@pytest.fixture
async def there(tmp_path: Path) -> AsyncIterator[Installation]:
    """A node that is served."""
    async with installation(tmp_path) as made:
        yield made


def commit(number: int, which: int, stamp: Any, octets: bytes = b"octets", origin: int = 0) -> bytes:
    """A COMMIT of a small message."""
    boot, at = stamp or ("", 0.0)
    meta = [key(which), 1, boot, at, origin, 2, [[0, 0, len(octets), len(octets)]]]
    return frame("COMMIT", number, meta, b"{}" + octets)


def abort(number: int, which: int, stamp: Any) -> bytes:
    """An ABORT of one key."""
    return frame("ABORT", number, [0.0, 0, list(stamp)], key(which))


def marking(number: int, *fields: Any) -> bytes:
    """A MARK with these fields."""
    octets = msgspec.msgpack.encode(fields)
    return frame("MARK", number, [len(octets)], octets)


async def held(there: Installation, *numbers: int) -> list[str]:
    """What the node says of keys."""
    return [answer.value for answer in await there.node.has([key(number) for number in numbers])]


async def answered(raw: Raw, *numbers: int) -> dict[int, str]:
    """How these operations were answered; receipts come together."""
    found: dict[int, str] = {}
    while not found.keys() >= set(numbers):
        verb, number, _, rest = await raw.hear()
        found.update({receipt[0]: verb for receipt in rest} if verb == "ACKS" else {number: verb})
    return found


async def stamped(raw: Raw, number: int = 2) -> tuple[str, float]:
    """A stamp, as a ping brings it."""
    raw.say(frame("PING", number))
    _, _, (boot, at), _ = await raw.hear("REPLY")
    return boot, at


# -- certificates --------------------------------------------------------------------------------------------------


async def test_who_shows_no_good_certificate_is_not_heard_and_is_counted(there: Installation) -> None:
    """R01: refused before a frame is looked at."""
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nobody.check_hostname = False
    nobody.load_verify_locations(there.authority.path)
    foreign = there.foreign.client(*uris(CLUSTER, "front-1", "front"))
    foreign.load_verify_locations(there.authority.path)
    expired = there.client("front-1", ends_in=datetime.timedelta(hours=-1))
    old_tls = there.client()
    old_tls.minimum_version = ssl.TLSVersion.TLSv1_2
    old_tls.maximum_version = ssl.TLSVersion.TLSv1_2
    for context, why in (
        (nobody, "tls.no_certificate"),
        (foreign, "tls.foreign"),
        (expired, "tls.expired"),
        (old_tls, "tls.failed"),
    ):
        try:
            raw = await there.raw(context)
            raw.say(frame("HELLO", 1, hello(cluster=CLUSTER)))
            assert await raw.end() == []
        except (ssl.SSLError, ConnectionError):
            pass
        await until(lambda why=why: there.refused(why) == 1)
        node = there.remote(context=context)
        with pytest.raises(NodeTrouble):
            await node.open()
        assert node.state is NodeState.MISSING and node.stamp() is None
        await node.close()
    assert there.asked() == []


async def test_plain_octets_are_no_handshake(there: Installation) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", there.port)
    writer.write(frame("HELLO", 1, hello(cluster=CLUSTER)))
    assert frame("REPLY", 1)[:1] not in await reader.read()
    writer.close()
    await until(lambda: there.refused("tls.failed") == 1)


async def test_a_certificate_says_which_cluster_and_who(there: Installation) -> None:
    """R15, R07; the peer is told why."""
    for names, why in (
        ([], "no_name"),
        (uris("theirs", "front-1", "front"), "cluster"),
        ([*uris(CLUSTER, "x", "front"), *uris(CLUSTER, "y", "keeper")], "name"),
    ):
        raw = await there.raw(there.authority.client(*names))
        raw.say(frame("HELLO", 1, hello(cluster=CLUSTER)))
        ((verb, _, (_, text), _),) = await raw.end()
        assert verb == "GOAWAY" and "certificate" in text
        assert there.refused(why) == 1
        node = there.remote(context=there.authority.client(*names))
        with pytest.raises(NodeTrouble):
            await node.open()
        await node.close()
    node_itself = await there.raw(there.client("b", "node"))
    assert (await node_itself.hello())[2][0] == Failure.ROLE
    node_itself.say(frame("COMMIT", 2, []))
    assert [said[0] for said in await node_itself.end()] == ["GOAWAY"]
    assert there.asked() == []


async def test_who_was_expelled_is_cut_off_and_stays_out(there: Installation) -> None:
    raw = await there.welcomed("front-1")
    other = await there.welcomed("front-2")
    keeper = await there.welcomed("keeper-1", "keeper")
    keeper.say(frame("EXPEL", 2, [["front-1"]]))
    assert (await keeper.hear())[:2] == ("REPLY", 2) and await raw.end() == []
    again = await there.raw(there.client("front-1"))
    ((verb, _, (_, text), _),) = await again.end()
    assert verb == "GOAWAY" and "expelled" in text and there.refused("expelled") == 1
    await stamped(other)


async def test_a_certificate_that_ends_ends_its_connections(there: Installation) -> None:
    raw = await there.welcomed()
    there.service.now = lambda: datetime.datetime.now(datetime.UTC).timestamp() + 2 * 86_400
    await there.service.sweep(asyncio.get_running_loop().time())
    assert (await raw.end())[-1][0] == "GOAWAY" and there.refused("expired") == 1


@pytest.mark.parametrize(
    ("names", "ours"),
    [
        (uris(CLUSTER, "b", "node"), True),
        (uris("theirs", "a", "node"), True),
        (uris(CLUSTER, "a", "front"), True),
        (uris(CLUSTER, "a", "node"), False),
    ],
)
async def test_a_node_that_is_not_the_one_is_told_nothing(there: Installation, names: list[str], ours: bool) -> None:
    """Whoever holds its address, or another certificate of the cluster: no HELLO, no mail."""
    await there.service.close(0.0)
    authority = there.authority if ours else there.foreign
    context = authority.server(*names)
    context.load_verify_locations(there.authority.path)
    await there.serve(context)
    node = there.remote()
    with pytest.raises(OperatorError if ours else NodeTrouble) as info:
        await node.open()
    assert "certificate" in str(info.value).lower()
    with pytest.raises(NodeTrouble):
        await node.commit(key(1), [Chunk(0, 0, b"x", 1)], b"{}", 1, None, Origin.DELIVERY)
    assert there.service.describe()["sessions"] == 0 and there.asked() == []


# -- HELLO, sessions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"cluster": "theirs"}, "cluster"),
        ({"node": "b"}, "node"),
        ({"first": 2, "last": 9}, "version"),
        ({"first": 0, "last": 0}, "version"),
    ],
)
async def test_a_hello_for_somebody_else_is_refused_with_the_reason(
    there: Installation, other: dict[str, Any], why: str
) -> None:
    """R15, P19."""
    raw = await there.raw()
    _, _, (failure, text), _ = await raw.hello(**other)
    assert failure == Failure.REFUSED and there.refused(why) == 1 and text
    raw.say(commit(2, 1, None))
    assert await raw.end() == [] and there.asked() == []


async def test_what_is_sent_behind_a_hello_is_heard_when_it_was_answered(there: Installation) -> None:
    raw = await there.raw()
    raw.say(frame("HELLO", 1, hello(cluster=CLUSTER)), frame("PING", 2), frame("HAS", 3, [], key(1)))
    assert [(await raw.hear())[:2] for _ in range(3)] == [("REPLY", 1), ("REPLY", 2), ("REPLY", 3)]


async def test_a_later_session_ends_the_older_so_that_nothing_lands_behind_an_abort(there: Installation) -> None:
    """R09: fenced by the number of the session; octets of a dead connection are never heard."""
    old = await there.welcomed()
    stamp = await stamped(old)
    late = commit(3, 1, stamp)
    old.say(late[:40])
    await stamped(await there.welcomed("front-1", session=1, lane=1))
    new = await there.raw()
    assert (await new.hello(session=2))[0] == "REPLY"
    old.say(late[40:], commit(4, 2, stamp))
    assert await old.end() == []
    assert there.world.counters.get("noded.superseded") == 2, "both connections of the older session"
    await stamped(new)
    assert there.node.calls.count("commit") == 0 and await held(there, 1, 2) == ["absent", "absent"]
    for session, lane, why in ((1, 0, "stale_session"), (2, 0, "replayed")):
        raw = await there.raw()
        _, _, (failure, _), _ = await raw.hello(session, lane)
        assert failure == Failure.REFUSED and there.refused(why) == 1, "R02: a HELLO that was there before"
    await there.welcomed("front-1", session=2, lane=1)
    await stamped(new, 3)


async def test_a_session_ends_those_of_its_own_certificate_and_instance_only(there: Installation) -> None:
    one = await there.welcomed("front-1", session=1)
    await there.welcomed("front-2", session=9)
    await there.welcomed("front-1", session=9, instance=b"j" * 16)
    await stamped(one)
    assert there.world.counters.get("noded.superseded") == 0


async def test_what_an_older_session_waits_for_is_let_go(there: Installation) -> None:
    there.node.hold()
    old = await there.welcomed()
    old.say(marking(2, 0, {}, 0, 7, []))
    await until(lambda: "put_mark" in there.node.calls)
    await there.welcomed(session=2)
    assert await old.end() == []


async def test_who_goes_by_an_older_layout_is_refused_and_cut_off(there: Installation) -> None:
    raw = await there.welcomed(fence=3)
    keeper = await there.welcomed("keeper-1", "keeper", fence=3)
    keeper.say(frame("SET_LAYOUT", 2, [5, 4], b"layout 5"))
    assert (await keeper.hear())[:3] == ("REPLY", 2, [5, 4]) and await raw.end() == []
    late = await there.raw()
    _, _, (failure, text, version), layout = await late.hello(session=2, fence=3)
    assert (failure, version, layout) == (Failure.FENCED, 5, b"layout 5") and "layout 3" in text and there.refused("fence") == 1
    assert await late.end() == [], "it takes the layout and asks again"
    _, _, welcome, _ = await (await there.raw()).hello(session=3, fence=4)
    assert welcome[4] == 4
    await stamped(keeper, 3)


async def test_instances_are_forgotten_only_without_connections(there: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "NODE_SESSIONS_MAX", 2)
    first = await there.welcomed(session=5)
    for number in range(4):
        raw = await there.welcomed("front-2", instance=bytes([number]) * 16)
        raw.close()
        await until(lambda: there.service.describe()["connections"] == 1)
    assert there.service.describe()["sessions"] <= 3
    assert (await (await there.raw()).hello(session=4))[2][0] == Failure.REFUSED
    await stamped(first)


# -- what a front end may not --------------------------------------------------------------------------------------


async def test_a_front_end_commits_deliveries_with_stamps_and_nothing_else(there: Installation) -> None:
    """Law 2."""
    raw = await there.welcomed()
    boot, at = await stamped(raw)
    raw.say(
        commit(3, 1, None),
        commit(4, 2, (boot, at), origin=1),
        commit(5, 3, (boot, at), origin=2),
        commit(6, 4, (boot, at), origin=77),
        commit(7, 5, (boot, at + 3600.0)),
    )
    failures = {said[1]: said[2][0] for said in [await raw.hear() for _ in range(5)]}
    assert failures == {
        3: Failure.ROLE, 4: Failure.ROLE, 5: Failure.UNSUPPORTED, 6: Failure.UNSUPPORTED, 7: Failure.ROLE,
    }  # fmt: skip
    assert "commit" not in there.node.calls and there.refused("stamp") == 1
    raw.say(commit(8, 6, (boot, at)))
    assert (await raw.hear())[0] == "ACKS"
    keeper = await there.welcomed("keeper-1", "keeper")
    keeper.say(commit(2, 7, None, origin=1), commit(3, 8, (boot, at)))
    assert {(await keeper.hear())[0] for _ in range(2)} == {"ACKS", "ERROR"}
    assert await held(there, 6, 7, 8) == ["live", "live", "absent"]


async def test_sizes_that_lie_and_flags_of_later_versions_are_refused(there: Installation) -> None:
    """R04, R14."""
    raw = await there.welcomed()
    boot, at = await stamped(raw)
    for number, (record, chunks, body, failure) in enumerate(
        [
            (9, [[0, 0, 4, 4]], b"{}body", Failure.MALFORMED),
            (2, [[0, 0, 5, 5]], b"{}body", Failure.MALFORMED),
            (2, [[0, 0, 3, 3]], b"{}body", Failure.MALFORMED),
            (2, [[0, 0, 4, 4], [1, 0, 4, 4]], b"{}body", Failure.MALFORMED),
            (2, [[0, 0, 4, 400]], b"{}body", Failure.MALFORMED),
            (2, [[0, 2, 4, 4]], b"{}body", Failure.UNSUPPORTED),
            (2, [[0, 0, 2**40, 4]], b"{}body", Failure.MALFORMED),
            (2, [[-1, 0, 4, 4]], b"{}body", Failure.MALFORMED),
        ],
        3,
    ):
        raw.say(frame("COMMIT", number, [key(number), 1, boot, at, 0, record, chunks], body))
        verb, answered, meta, _ = await raw.hear()
        assert (verb, answered, meta[0]) == ("ERROR", number, failure), chunks
    raw.say(frame("HAS", 50, [], b"k" * 17), frame("APPEND", 51, [key(9), [[0, 0, 9, 9]]], b"short"))
    assert [(await raw.hear())[2][0] for _ in range(2)] == [Failure.MALFORMED] * 2
    assert not {"commit", "append"} & {*there.node.calls}


async def test_a_front_end_aborts_what_it_brought_and_nothing_else(there: Installation) -> None:
    """By the certificate's id; a tombstone of a front end's would else be a deletion of anybody's mail."""
    await there.node.commit(key(1), [Chunk(0, 0, b"old", 3)], b"{}", 1, None, Origin.DELIVERY)
    await there.service.close(0.0)
    await there.serve()
    mine, other = await there.welcomed("front-1"), await there.welcomed("front-2")
    stamp, _ = await stamped(mine), await stamped(other)
    mine.say(commit(3, 2, stamp), frame("APPEND", 4, [key(3), [[0, 0, 1, 1]]], b"x"), commit(5, 1, stamp))
    await answered(mine, 3, 4, 5)
    other.say(commit(3, 2, stamp), frame("APPEND", 4, [key(3), [[0, 0, 1, 1]]], b"x"), commit(5, 4, stamp))
    await answered(other, 3, 4, 5)
    other.say(abort(6, 2, stamp), abort(7, 3, stamp), abort(8, 9, stamp))
    assert [(await other.hear())[2][0] for _ in range(3)] == [Failure.ROLE] * 3
    assert await held(there, 2, 3, 9) == ["live", "absent", "absent"] and there.refused("not_theirs") == 3
    mine.say(abort(6, 1, stamp))
    assert (await mine.hear())[2][0] == Failure.ROLE, "it was here before, whoever brings its key once more"
    mine.say(frame("ABORT", 7, [0.0, 0, []], key(2)))
    assert (await mine.hear())[2][0] == Failure.ROLE, "law 5: with the stamp of its delivery"
    mine.say(abort(8, 2, stamp), abort(9, 3, stamp))
    assert [(await mine.hear())[0] for _ in range(2)] == ["REPLY", "REPLY"]
    assert await held(there, 1, 2, 3, 4) == ["live", "dead", "dead", "live"]


async def test_claims_outlive_their_generation_and_no_longer(there: Installation) -> None:
    raw = await there.welcomed()
    stamp = await stamped(raw)
    raw.say(commit(3, 1, stamp), commit(4, 2, stamp))
    await answered(raw, 3, 4)
    claims = there.service._answers["a"].claims
    end = (await there.node.facts()).end
    claims.turn(1e9, end)
    raw.say(abort(5, 1, stamp))
    assert await answered(raw, 5) == {5: "REPLY"}
    claims.turn(2e9, end)
    raw.say(abort(6, 2, stamp))
    assert await answered(raw, 6) == {6: "ERROR"}
    raw.say(commit(7, 2, stamp), abort(8, 2, stamp))
    assert (await raw.hear("ERROR"))[1] == 8, "nor again by asking once more"


async def test_a_front_end_raises_no_epoch_and_retires_nobody(there: Installation) -> None:
    raw, keeper = await there.welcomed(), await there.welcomed("keeper-1", "keeper")
    raw.say(marking(2, 1, {1: ["t", 5]}, 0, 9, ["gone"]), marking(3, 0, {}, 7, 0, []))
    assert [(await raw.hear())[:2] for _ in range(2)] == [("REPLY", 2), ("ERROR", 3)]
    assert (await there.node.facts()).mark == Mark(1, {1: ("t", 5)}, 0, 9) and there.refused("epoch") == 1
    keeper.say(marking(2, 0, {}, 7, 0, ["gone"]))
    assert (await keeper.hear())[0] == "REPLY"
    operator = await there.welcomed("operator-1", "operator")
    operator.say(marking(2, 0, {}, 8, 0, []), marking(3, 0, {}, 7, 0, ["out"]))
    assert await answered(operator, 2, 3) == {2: "ERROR", 3: "REPLY"}
    mark = (await there.node.facts()).mark
    assert (mark.epoch, mark.retired) == (7, ("gone", "out"))


# -- slow and loud peers -------------------------------------------------------------------------------------------


async def swept(there: Installation, *after_s: float) -> None:
    """Looks at deadlines as if so much later."""
    now = asyncio.get_running_loop().time()
    for seconds in after_s:
        await there.service.sweep(now + seconds)


async def test_who_says_no_hello_is_let_go(there: Installation) -> None:
    raw = await there.raw()
    await until(lambda: there.service.describe()["connections"] == 1)
    await swept(there, limits.NODE_HELLO_TIMEOUT_S - 1)
    await swept(there, limits.NODE_HELLO_TIMEOUT_S + 1)
    assert (await raw.end())[-1][0] == "GOAWAY" and there.refused("no_hello") == 1


async def test_a_peer_that_sends_an_octet_a_second_is_let_go(there: Installation) -> None:
    """Progress is whole frames, not octets."""
    raw = await there.welcomed()
    octets = frame("PING", 2)
    for second in range(14):
        raw.say(octets[second : second + 1])
        await asyncio.sleep(0.001)
        await swept(there, float(second))
    assert (await raw.end())[-1][0] == "GOAWAY" and there.refused("slow_frame") == 1


async def test_an_operation_whose_rest_does_not_come_is_let_go_although_pings_do(there: Installation) -> None:
    raw = await there.welcomed()
    raw.say(frame("APPEND", 2, [key(1), [[0, 0, 8, 8]]], b"half", 1))
    number = 2
    for second in (0.0, 5.0, 11.0):
        number += 1
        await stamped(raw, number)
        await swept(there, second)
    assert (await raw.end())[-1][0] == "GOAWAY" and there.refused("slow_operation") == 1
    assert "append" not in there.node.calls


async def test_a_silent_peer_is_let_go_and_one_that_pings_is_not(there: Installation) -> None:
    raw = await there.welcomed()
    await swept(there, limits.NODE_SILENCE_S - 1)
    await stamped(raw)
    await swept(there, limits.NODE_SILENCE_S + 60)
    assert (await raw.end())[-1][0] == "GOAWAY" and there.refused("silent") == 1


async def test_a_flood_of_pings_is_cut_off(there: Installation) -> None:
    """R12."""
    raw = await there.welcomed()
    raw.say(*[frame("PING", number) for number in range(2, 500)])
    said = await raw.end()
    assert said[-1][0] == "GOAWAY" and len(said) <= limits.NODE_PINGS_PER_S_MAX + 1 and there.refused("pings") == 1


async def test_a_peer_that_does_not_read_holds_up_itself_and_is_cut_off(there: Installation) -> None:
    """Its reads wait, so that no more than some answers lie in memory; others are served meanwhile."""
    large = bytes(256 * limits.KIB)
    await there.node.commit(key(1), [Chunk(0, 0, large, len(large))], b"{}", 1, None, Origin.DELIVERY)
    raw = await there.welcomed()
    raw.writer.transport.pause_reading()  # type: ignore[attr-defined]
    before = len(there.node.calls)
    raw.say(*[frame("READ_CHUNK", number, [key(1), 0]) for number in range(2, 800)])
    other = await there.welcomed("front-2")
    for number in range(2, 12):
        await stamped(other, number)
        await asyncio.sleep(0.01)
    begun = len(there.node.calls) - before
    most = limits.NODE_ANSWERS_OCTETS_MAX // len(large) + limits.NODE_READS_AT_ONCE + 40  # and what the sockets hold
    assert begun < most
    await swept(there, 1.0, limits.NODE_WRITE_TIMEOUT_S + 2)
    assert there.refused("not_reading") == 1


async def test_more_than_the_window_is_cut_off(there: Installation) -> None:
    there.node.hold()
    raw = await there.welcomed(operations=8)
    raw.say(*[frame("CANCEL", number, [key(number)]) for number in range(2, 12)])
    assert (await raw.end())[-1][0] == "GOAWAY" and there.refused("credits") == 1


async def test_an_oversized_frame_is_cut_off(there: Installation) -> None:
    raw = await there.welcomed()
    raw.say(HEADER.pack(2**32 - 1, 3, 0, 0, 2, 0), bytes(100_000))
    assert (await raw.end())[-1][0] == "GOAWAY" and there.refused("oversized") == 1


async def test_a_frame_that_comes_again_is_cut_off(there: Installation) -> None:
    """R02."""
    raw = await there.welcomed()
    stamp = await stamped(raw)
    raw.say(commit(3, 1, stamp))
    await raw.hear("ACKS")
    raw.say(commit(3, 1, stamp))
    assert (await raw.end())[-1][0] == "GOAWAY" and there.refused("replayed") == 1
    assert there.node.calls.count("commit") == 1


async def test_connections_and_handshakes_are_bounded(there: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "NODE_HANDSHAKES_MAX", 2)
    idle = [await asyncio.open_connection("127.0.0.1", there.port) for _ in range(3)]
    await until(lambda: there.refused("connections") == 1)
    for _, writer in idle:
        writer.close()
    monkeypatch.setattr(limits, "NODE_HANDSHAKES_MAX", 64)
    monkeypatch.setattr(limits, "NODE_CONNECTIONS_MAX", 1)
    await there.welcomed()
    with pytest.raises((ConnectionError, ssl.SSLError)):
        await there.raw()
    assert there.refused("connections") == 2


async def test_who_connects_and_says_nothing_keeps_nobody_out(there: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger without a certificate: the oldest of those who have not said who they are makes room."""
    monkeypatch.setattr(limits, "NODE_HANDSHAKES_MAX", 2)
    idle = [await asyncio.open_connection("127.0.0.1", there.port) for _ in range(2)]
    for session in (1, 2):
        await there.welcomed(session=session)
    assert there.refused("connections") == 1, "a handshake that is over takes no room"
    async with asyncio.timeout(SOON_S):
        assert await idle[0][0].read() == b""
    for _, writer in idle:
        writer.close()


async def test_while_too_much_is_held_the_bulk_connections_wait(there: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "NODE_HELD_OCTETS_MAX", 100_000)
    there.node.hold()
    small, bulk = await there.welcomed(), await there.welcomed(lane=1)
    chunk = bytes(150_000)
    bulk.say(operation("APPEND", 2, [key(1), [[0, 0, len(chunk), len(chunk)]]], chunk))
    await until(lambda: there.world.counters.get("noded.held_back") == 1)
    bulk.say(frame("PING", 3))
    await stamped(small)
    there.node.release()
    assert [(await bulk.hear())[:2] for _ in range(2)] == [("REPLY", 2), ("REPLY", 3)]


# -- the end -------------------------------------------------------------------------------------------------------


async def test_a_service_that_stops_answers_what_was_asked(there: Installation) -> None:
    there.node.hold()
    raw = await there.welcomed()
    stamp = await stamped(raw)
    raw.say(commit(3, 1, stamp))
    await until(lambda: "commit" in there.node.calls)
    closing = asyncio.ensure_future(there.service.close())
    assert (await raw.hear("GOAWAY"))[0] == "GOAWAY"
    there.node.release()
    assert (await raw.hear("ACKS"))[3][0][0] == 3
    assert await raw.end() == []
    await closing
    with pytest.raises((ConnectionError, ssl.SSLError)):
        await there.raw()


async def test_a_bug_of_ours_ends_one_operation_and_is_written_down(there: Installation) -> None:
    raw = await there.welcomed()

    async def broken(keys: Any) -> Any:
        raise ZeroDivisionError("a bug")

    there.node.has = broken  # type: ignore[method-assign]
    raw.say(frame("HAS", 2, [], key(1)))
    assert (await raw.hear())[2] == [Failure.TROUBLE, "a fault of ours"], "and no word of what it was"
    await stamped(raw, 3)
    lines: list[str] = there.world.log.lines  # type: ignore[attr-defined]
    assert any("ZeroDivisionError" in line for line in lines)
    lines.clear()


async def test_what_came_together_is_answered_one_by_one_where_the_node_does_so(
    there: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first receipt brings those along that are there; what is not yet is answered when it is, a refusal as one."""
    asked: dict[bytes, asyncio.Future[Receipt]] = {}

    def commits(name: bytes, *_: Any) -> asyncio.Future[Receipt]:
        return asked.setdefault(name, asyncio.get_running_loop().create_future())

    raw = await there.welcomed()
    stamp = await stamped(raw)
    monkeypatch.setattr(there.node, "commit", commits)
    raw.say(*(commit(number, number, stamp) for number in (3, 4, 5, 6)))
    await until(lambda: len(asked) == 4)
    first, second, third, fourth = asked.values()
    third.set_exception(CommitRefused("not here"))
    first.set_result(Receipt("a", "inc", Position(1, 8)))
    assert await answered(raw, 3, 5) == {3: "ACKS", 5: "ERROR"}
    fourth.set_result(Receipt("a", "inc", Position(1, 24)))
    assert await answered(raw, 6) == {6: "ACKS"}
    second.set_result(Receipt("a", "other", Position(2, 8)))
    assert (await raw.hear("ACKS"))[2:] == (["other"], [(4, 2, 8)])


async def test_a_definite_refusal_is_the_nodes_own(there: Installation) -> None:
    """Law 5: what the protocol refuses may be on its way, or here from before; only the node knows."""
    node = there.remote("front-1")
    await node.open()
    for stamp in (None, node.stamp()):
        if stamp is not None:
            there.node.block(True)
        with pytest.raises(NodeTrouble) as info:
            await node.commit(key(1), [Chunk(0, 0, b"x", 1)], b"{}", 1, stamp, Origin.DELIVERY)
        assert isinstance(info.value, CommitRefused) is (stamp is not None)


def test_the_table_of_forms_has_a_default_for_every_later_field() -> None:
    """P19: an older writer's meta is read; HELLO's first eight fields are those of version 1."""
    assert forms.Hello(1, 1, "c", "n", "", b"i" * 16, 1, 0).operations == limits.NODE_WINDOW_OPERATIONS


async def test_pushing_and_deadlines_survive_a_bug(there: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 14: a job that ended would be missed only when it is needed."""
    raw = await there.welcomed()
    there.node.stat = None  # type: ignore[assignment, method-assign]
    await until(lambda: "broken by" in there.service.worker.status)
    del there.node.stat
    await until(lambda: there.service.worker.status == "idle")
    await there.node.commit(key(1), [Chunk(0, 0, b"x", 1)], b"{}", 1, None, Origin.DELIVERY)
    await raw.hear("STAT")
    assert any("bug" in line for line in there.world.log.lines)  # type: ignore[attr-defined]
    there.world.log.lines.clear()  # type: ignore[attr-defined]
