"""What a link to a node is when windows are full, bodies are large, the node leaves or stands still: slow is not dead (P20)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from powermail.base import limits
from powermail.base.errors import NeverAsked, NodeTrouble
from powermail.cluster.node_connection import Disconnected, NodeConnection
from powermail.cluster.remote import RemoteNode
from powermail.storage.contract import Chunk, NodeState, Origin, Receipt
from powermail.wire import node_forms as forms
from powermail.wire.node_frames import FrameReader, pieces_of
from powermail.wire.node_server import ACK
from powermail.wire.node_verbs import BY_NUMBER, VERBS
from tests.noded.installation import Installation, installation, liar, until
from tests.noded.speaking import frame
from tests.storage.support import key


@pytest.fixture
async def there(tmp_path: Path) -> AsyncIterator[Installation]:
    """A node that is served."""
    async with installation(tmp_path) as made:
        yield made


@pytest.fixture
async def node(there: Installation) -> RemoteNode:
    """The same from far, for one who may ask all."""
    made = there.remote("front-1", "front", "keeper", "operator")
    await made.open()
    return made


def put(node: RemoteNode, number: int, octets: bytes = b"octets") -> asyncio.Future[Receipt]:
    """Commits a message with the stamp that is known."""
    chunk = Chunk(0, 0, octets, len(octets))
    return asyncio.ensure_future(node.commit(key(number), [chunk], b"{}", 1, node.stamp(), Origin.DELIVERY))


class Wire:
    """A transport that keeps what is written, and says that it is full when it is told to."""

    def __init__(self) -> None:
        self.connection = NodeConnection("a", self)
        self.connection.connection_made(self)  # type: ignore[arg-type]
        self.waiting = 0
        self.ended = ""
        self._frames = FrameReader()
        self._said: list[tuple[str, int, bool]] = []

    def set_write_buffer_limits(self, high: int) -> None:
        """Asked once."""

    def get_write_buffer_size(self) -> int:
        """What waits."""
        return self.waiting

    def is_closing(self) -> bool:
        """Nobody has closed it."""
        return False

    def write(self, octets: bytes) -> None:
        """Takes octets."""
        self._said += [(BY_NUMBER[verb].name, number, bool(flags)) for verb, flags, number, _, _ in self._frames.feed(octets)]

    def said(self) -> list[tuple[str, int, bool]]:
        """Frames since this was last asked: verb, number, MORE."""
        said, self._said = self._said, []
        return said

    def hear(self, *frames: bytes) -> None:
        """The node says these, in one read."""
        octets = b"".join(frames)
        room = self.connection.get_buffer(-1)
        room[: len(octets)] = octets
        self.connection.buffer_updated(len(octets))

    def close(self) -> None:
        """Closes."""

    def abort(self) -> None:
        """Closes at once."""

    def pushed(self, stat: forms.StatForm) -> None:
        """Figures."""

    def leaving(self) -> None:
        """It leaves."""

    def lost(self, connection: NodeConnection, why: str) -> None:
        """It is lost."""
        self.ended = why


async def turns(count: int = 3) -> None:
    """Lets the loop turn."""
    for _ in range(count):
        await asyncio.sleep(0)


# -- pings ---------------------------------------------------------------------------------------------------------


async def test_a_ping_waits_for_no_window(there: Installation, node: RemoteNode) -> None:
    there.node.hold()
    asked = [put(node, number) for number in range(1, limits.NODE_WINDOW_OPERATIONS + 40)]
    await until(lambda: there.node.calls.count("commit") >= limits.NODE_WINDOW_OPERATIONS - limits.NODE_PINGS_RESERVED)
    before = there.node.stamp()
    fresh = await node.fresh_stamp()
    assert before is not None and fresh is not None and fresh.at > before.at
    assert not any(call.done() for call in asked) and there.refused("credits") == 0
    there.node.release()
    await asyncio.gather(*asked)


async def test_a_ping_waits_behind_no_body() -> None:
    """Of 3 bodies of 1 MiB no more than the row that the transport takes goes out before it."""
    wire = Wire()
    connection = wire.connection
    bodies = [connection.ask(VERBS["APPEND"], b"\x90", pieces_of(bytes(limits.MIB)), limits.MIB) for _ in range(3)]
    await turns(1)
    first = wire.said()
    assert 0 < len(first) * limits.NODE_PIECE_OCTETS <= limits.NODE_UNSENT_OCTETS + limits.NODE_PIECE_OCTETS
    connection.pause_writing()
    await turns()
    wire.said()
    ping = connection.ping()
    await turns()
    assert [verb for verb, _, _ in wire.said()] == ["PING"], "also while nothing else is written"
    connection.resume_writing()
    read = connection.ask(VERBS["READ_COMMIT"], forms.encode(forms.KeyForm(key(1))))
    await turns(1)
    assert "READ_COMMIT" in [verb for verb, _, _ in wire.said()], "nor is what asks to read behind them"
    await turns(100)
    rest = wire.said()
    whole = [number for verb, number, more in rest if verb == "APPEND" and not more]
    assert len(whole) == 3 and not any(call.done() for call in (*bodies, ping, read))
    begun: list[int] = []
    for _, number, more in rest:
        assert not begun or begun == [number], "one body is whole before the next begins"
        begun = [number] if more else []
    connection.close("")


async def test_an_operation_that_fills_the_window_is_asked_alone_and_pings_go_on_behind_it() -> None:
    wire = Wire()
    connection = wire.connection
    first = connection.ask(VERBS["CANCEL"], forms.encode(forms.KeyForm(key(1))))
    octets = limits.NODE_WINDOW_OCTETS + 1
    large = connection.ask(VERBS["PUT_CHECKPOINT"], b"\x90", pieces_of(bytes(octets)), octets)
    behind = connection.ask(VERBS["CANCEL"], forms.encode(forms.KeyForm(key(2))))
    await turns(20)
    assert wire.said() == [("CANCEL", 1, False)]
    wire.hear(frame("REPLY", 1, []))
    await turns(200)
    assert {verb for verb, _, _ in wire.said()} == {"PUT_CHECKPOINT"} and first.done() and not behind.done()
    ping = connection.ping()
    await turns()
    assert wire.said() == [], "a node would take it for more than the window"
    wire.hear(frame("REPLY", 2, []))
    await turns()
    assert [verb for verb, _, _ in wire.said()] == ["PING", "CANCEL"] and large.done() and not ping.done()
    connection.close("")


async def test_a_fresh_stamp_is_of_a_ping_that_was_asked_for_it(there: Installation, node: RemoteNode) -> None:
    """Laws 9, 11: one that was on its way already may have been made before."""
    (small,) = [connection for connection in there.service._connections if not connection.bulk]
    known = node.stamp()
    before = there.node.stamp()
    fresh = await node.fresh_stamp()
    assert known and before and fresh and known.at < before.at < fresh.at
    small._transport.pause_reading()  # type: ignore[union-attr]
    early = asyncio.ensure_future(node.fresh_stamp())
    await turns()
    late = [asyncio.ensure_future(node.fresh_stamp()) for _ in range(100)]
    await turns()
    small._transport.resume_reading()  # type: ignore[union-attr]
    first, second = await early, await late[0]
    assert first and second and first.at < second.at
    assert {await call for call in late} == {second}, "one ping for all who came meanwhile"
    assert there.refused("pings") == 0


async def test_a_stamp_of_an_earlier_link_is_none(there: Installation, node: RemoteNode) -> None:
    """What the next link leads to may be another opening of the log (law 2)."""
    node.cut()
    await until(lambda: node.state is NodeState.MISSING)
    assert node._link.stamp is None and node.stamp() is None and node.stamp_age_s() > limits.STAMP_AGE_MAX_S


# -- slow is not dead ----------------------------------------------------------------------------------------------


async def test_a_node_that_says_anything_is_not_lost_and_one_that_says_nothing_is(
    there: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "NODE_PING_TIMEOUT_S", 0.4)
    silent, writers = asyncio.Event(), list[asyncio.StreamWriter]()
    stat = frame("STAT", 0, ["read-write", "", "inc", 1, 1, 1, 1, 1, 1, 0, 0, 0.0, 0.0])

    def answer(name: str, number: int, writer: asyncio.StreamWriter) -> bytes:
        writers.append(writer)
        return frame("REPLY", number, ["boot", 1.0]) if name == "PING" and len(writers) < 3 else b""

    server = await liar(there, answer, pings=True)
    node = there.remote()
    await node.open()
    until_s = time.monotonic() + 1.5
    while time.monotonic() < until_s and not silent.is_set():
        for writer in writers:
            if not writer.is_closing():
                writer.write(stat)
        await asyncio.sleep(0.02)
    assert there.world.counters.get("cluster.links_lost") == 0, "octets come: it is slow"
    assert node.stat().write_s > 0.4, "and counts as slow"
    await until(lambda: there.world.counters.get("cluster.links_lost") > 0)
    await node.close()
    server.close()


async def test_bulk_that_is_held_back_cuts_no_link(
    there: Installation, node: RemoteNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "NODE_PING_TIMEOUT_S", 0.1)
    monkeypatch.setattr(limits, "NODE_BULK_TIMEOUT_S", 1.0)
    monkeypatch.setattr(limits, "NODE_PING_INTERVAL_S", 0.02)
    node.cut()
    await until(lambda: node.state is NodeState.READ_WRITE)
    (bulk,) = [connection for connection in there.service._connections if connection.bulk]
    bulk.pause(True)
    append = asyncio.ensure_future(node.append(key(1), [Chunk(0, 0, b"x", 1)]))
    stamps = {node.stamp(): None}
    while len(stamps) < 10:  # pings on the other connection go on, for longer than it would take to give up
        await asyncio.sleep(0.03)
        stamps[node.stamp()] = None
    assert there.world.counters.get("cluster.links_lost") == 1 and not append.done()
    bulk.pause(False)
    await append
    assert there.world.counters.get("cluster.links_lost") == 1
    bulk.pause(True)
    await until(lambda: there.world.counters.get("cluster.links_lost") == 2)


async def test_who_stood_still_itself_does_not_call_the_node_dead(
    there: Installation, node: RemoteNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was stopped for a while finds all its deadlines over, and the answers in its socket."""
    monkeypatch.setattr(limits, "NODE_PING_TIMEOUT_S", 0.2)
    monkeypatch.setattr(limits, "NODE_PING_INTERVAL_S", 0.01)
    node.cut()
    await until(lambda: node.state is NodeState.READ_WRITE)
    there.node.hold()
    asked = asyncio.ensure_future(node._ask("MARK", forms.Marked(0), within_s=0.0))
    await until(lambda: "put_mark" in there.node.calls)
    there.node.release()
    time.sleep(1.2)  # noqa: ASYNC251  this process stands still
    await asked
    await node.hear()
    assert there.world.counters.get("cluster.links_lost") == 1


async def test_operations_that_are_never_answered_end_the_link(there: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they fill the window for ever, while the pings say that all is well."""
    monkeypatch.setattr(limits, "NODE_OVERDUE_S", 0.2)
    monkeypatch.setattr(limits, "NODE_CALL_GRACE_S", 0.05)
    server = await liar(there, lambda name, number, _: b"" if name == "HAS" else frame("REPLY", number, []))
    node = there.remote()
    await node.open()
    with pytest.raises(NodeTrouble, match="takes too long"):
        await node._ask("HAS", within_s=0.1)
    await until(lambda: there.world.counters.get("cluster.links_made") >= 2)
    await node.close()
    server.close()


async def test_a_late_answer_is_no_reason_to_end_the_link_while_others_come() -> None:
    wire = Wire()
    connection = wire.connection
    late = connection.ask(VERBS["CANCEL"], forms.encode(forms.KeyForm(key(1))), within_s=0.0)
    now = connection._loop.time() + limits.NODE_CALL_GRACE_S
    for number in range(2, 9):
        connection.ask(VERBS["CANCEL"], forms.encode(forms.KeyForm(key(1))), within_s=1000.0)
        await turns()
        wire.hear(frame("REPLY", number, []))
        now += limits.NODE_OVERDUE_S * 0.9
        connection._end_late(now)
    assert not wire.ended
    with pytest.raises(NodeTrouble, match="takes too long"):
        await late
    connection._end_late(now + limits.NODE_OVERDUE_S)
    assert "unanswered" in wire.ended


# -- a node that leaves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", range(3))
async def test_answers_that_come_with_a_goaway_are_heard(cut: int) -> None:
    """Whichever stands first in the read."""
    wire = Wire()
    connection = wire.connection
    commits = [connection.ask(VERBS["COMMIT"], b"\x90") for _ in range(2)]
    read = connection.ask(VERBS["READ_COMMIT"], b"\x90")
    await turns()
    said = [frame("ACKS", 0, ["i"], ACK.pack(1, 4, 5) + ACK.pack(2, 4, 6)), frame("REPLY", 3, [], b"record")]
    said.insert(cut, frame("GOAWAY", 0, [1, "bye"]))
    wire.hear(*said)
    assert all(call.done() for call in (*commits, read))
    assert [(await commit).position.offset for commit in commits] == [5, 6] and (await read).body == b"record"
    assert connection.closed


async def test_who_says_goaway_and_then_nothing_is_left(there: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "NODE_CLOSE_WAIT_S", 0.2)
    monkeypatch.setattr(limits, "NODE_CALL_GRACE_S", 0.1)
    monkeypatch.setattr(limits, "NODE_PING_INTERVAL_S", 0.05)
    server = await liar(there, lambda _, number, __: frame("GOAWAY", 0, [1, "bye"]))
    node = there.remote()
    await node.open()
    with pytest.raises(Disconnected) as info:
        await node.has([key(1)])
    assert not isinstance(info.value, NeverAsked)
    await until(lambda: there.world.counters.get("cluster.links_made") >= 2)
    await node.close()
    server.close()


async def test_nothing_new_is_asked_behind_a_goaway() -> None:
    wire = Wire()
    connection = wire.connection
    connection.welcomed(forms.Welcome(1, "ours", "a", "i", 0, 4096, 1 + limits.NODE_PINGS_RESERVED))
    open_one, waiting = (connection.ask(VERBS["COMMIT"], b"\x90") for _ in range(2))
    await turns()
    wire.hear(frame("GOAWAY", 0, [1, "bye"]))
    for never in (waiting, connection.ask(VERBS["COMMIT"], b"\x90"), connection.ping()):
        with pytest.raises(NeverAsked):
            await never
    wire.hear(frame("ACKS", 0, ["i"], ACK.pack(1, 4, 5)))
    assert (await open_one).position.offset == 5 and wire.said() == [("COMMIT", 1, False)] and connection.closed


async def test_a_node_that_lies_leaves_nobody_waiting() -> None:
    """A receipt that cannot be makes the others of its frame no better; whoever waits hears that nothing is known."""
    wire = Wire()
    asked = [wire.connection.ask(VERBS[name], b"\x90") for name in ("COMMIT", "HAS", "COMMIT")]
    await turns()
    wire.hear(frame("ACKS", 0, ["i"], ACK.pack(1, 4, 5) + ACK.pack(2, 4, 6)))
    assert wire.connection.closed and all(call.done() for call in asked)
    for call in asked:
        with pytest.raises(Disconnected) as info:
            await call
        assert not isinstance(info.value, NeverAsked)


# -- never asked ---------------------------------------------------------------------------------------------------


async def test_what_was_never_sent_was_never_asked(there: Installation, node: RemoteNode) -> None:
    """Law 5: a node that never heard of a commit holds none; of the others nothing is known."""
    there.node.hold()
    asked = [put(node, number) for number in range(1, limits.NODE_WINDOW_OPERATIONS + 40)]
    window = limits.NODE_WINDOW_OPERATIONS - limits.NODE_PINGS_RESERVED
    await until(lambda: there.node.calls.count("commit") == window)
    node.cut()
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(outcome, Disconnected) for outcome in outcomes)
    assert [isinstance(outcome, NeverAsked) for outcome in outcomes] == [n >= window for n in range(len(outcomes))]
    with pytest.raises(NeverAsked):
        await put(node, 1)
    there.node.release()


async def test_what_is_gathered_when_the_link_goes_was_never_asked(there: Installation, node: RemoteNode) -> None:
    asked = put(node, 1)
    node.cut()
    with pytest.raises(NeverAsked):
        await asked
    await until(lambda: node.state is NodeState.READ_WRITE)
    assert "commit" not in there.node.calls


async def test_a_commit_of_which_the_last_piece_is_missing_was_never_asked() -> None:
    wire = Wire()
    connection = wire.connection
    pieces = pieces_of(bytes(limits.MIB))
    half, whole = (connection.ask(VERBS["COMMIT"], b"\x90", pieces, limits.MIB) for _ in range(2))
    await turns(1)
    connection.pause_writing()
    await turns()
    assert 0 < len(wire.said()) < 16
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(asyncio.shield(half), 0.0)
    connection.abort("cut")
    for call in (half, whole):
        with pytest.raises(NeverAsked):
            await call
    wire = Wire()
    sent = wire.connection.ask(VERBS["COMMIT"], b"\x90", pieces, limits.MIB)
    await turns(30)
    assert len(wire.said()) == 16
    wire.connection.abort("cut")
    with pytest.raises(Disconnected) as info:
        await sent
    assert not isinstance(info.value, NeverAsked)


async def test_a_commit_that_finds_no_room_in_time_was_never_asked() -> None:
    """So that another node steps in, and nobody has to abort it here."""
    wire = Wire()
    connection = wire.connection
    connection.welcomed(forms.Welcome(1, "ours", "a", "i", 0, 4096, 1 + limits.NODE_PINGS_RESERVED))
    first, second, read = (connection.ask(VERBS[name], b"\x90") for name in ("COMMIT", "COMMIT", "HAS"))
    await turns()
    connection._end_late(connection._loop.time() + limits.NODE_ROOM_WAIT_S)
    with pytest.raises(NeverAsked, match="no room"):
        await second
    assert not first.done() and not read.done()
    wire.hear(frame("ACKS", 0, ["i"], ACK.pack(1, 4, 5)))
    await turns()
    assert [verb for verb, _, _ in wire.said()] == ["COMMIT", "HAS"]
    assert (await first).position.offset == 5
    connection.close("")


# -- the operator's switch -----------------------------------------------------------------------------------------


async def test_no_process_remembers_the_switch_for_the_operator(there: Installation, node: RemoteNode) -> None:
    """The node says how it is set. Who set it once, and was cut off when another set it anew, says nothing."""
    other = there.remote("front-2", "front", "operator")
    await other.open()
    node.block(True)
    assert node.state.value == "blocked", "at once, where it was asked for"
    await until(lambda: other.state is NodeState.BLOCKED)
    node.cut()
    other.block(False)
    await until(lambda: there.node.state is NodeState.READ_WRITE)
    made: Any = there.world.counters.get("cluster.links_made")
    await until(lambda: there.world.counters.get("cluster.links_made") > made or node.state is NodeState.READ_WRITE)
    await node.hear()
    assert there.node.state is node.state is other.state is NodeState.READ_WRITE
    node.cut()
    node.block(True)
    await until(lambda: node.state is NodeState.READ_WRITE)
    await node.hear()
    assert there.node.state is NodeState.READ_WRITE, "what could not be asked is the index's to say, when it is admitted"
