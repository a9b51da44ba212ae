"""Both machines of the node protocol without a socket: frames, order, roles, windows, pieces, and what neither believes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from powermail.base import limits
from powermail.wire import node_forms as forms
from powermail.wire import node_verbs as verbs
from powermail.wire.node_client import Acks, Answer, Failed, GoneAway, Lost, NodeClient, Stat
from powermail.wire.node_frames import HEADER, HEADER_OCTETS, FrameReader, add_frames, pieces_of
from powermail.wire.node_identity import Name, NotOurs, is_node, parse_names, peer_of
from powermail.wire.node_server import ACK, Ask, NodeServer, State, Stop
from powermail.wire.node_verbs import TABLE, VERBS, Failure, Role, Way
from tests.noded.speaking import KEY, Session, check, frame, hello, load, operation, said

DIALOGS = sorted(Path("tests/noded/dialogs").glob("*.txt"))
ALL = frozenset({Role.FRONT, Role.KEEPER, Role.OPERATOR})


def opened(roles: frozenset[Role] = ALL, **other: Any) -> Session:
    """A session after its HELLO."""
    session = Session(roles)
    session.hear(frame("HELLO", 1, hello(**other)))
    assert said(session.out)[0][0] == "REPLY"
    session.out = b""
    return session


# -- dialogs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DIALOGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("cut", ["lines", "whole", "octets", "trailing"])
def test_dialog(path: Path, cut: str) -> None:
    dialog = load(path)
    session = Session(dialog.roles)
    octets = b"".join(dialog.client)
    if cut == "lines":
        pieces = dialog.client
    elif cut == "octets":
        pieces = [octets[n : n + 1] for n in range(len(octets))]
    else:
        pieces = [octets + frame("PING", 1000)[: -1 if dialog.end else 20]] if cut == "trailing" else [octets]
    for piece in pieces:
        session.hear(piece)
    check(dialog.node, said(session.out))
    assert session.end == dialog.end
    assert (session.machine.state is State.OVER) is bool(dialog.end)


# -- frames --------------------------------------------------------------------------------------------------------


def test_a_frame_is_what_the_document_says_octet_by_octet() -> None:
    octets = operation("PING", 7, forms.NOTHING, b"")
    assert len(octets) == HEADER_OCTETS + 1 and octets[HEADER_OCTETS:] == b"\x90"
    assert octets[:16] == bytes([1, 0, 0, 0, 2, 0, 1, 0, 7, 0, 0, 0, 0, 0, 0, 0])
    text = Path("docs/peer-protocol.md").read_text()
    assert octets[:16].hex(" ") in text and octets[16:24].hex(" ") in text


@settings(max_examples=40, deadline=None)
@given(
    some.lists(
        some.tuples(
            some.sampled_from(TABLE), some.integers(0, 2**64 - 1), some.binary(max_size=60), some.binary(max_size=3000)
        ),
        max_size=6,
    ),
    some.integers(1, 500),
)
def test_what_is_framed_is_read_back_for_every_chunking(told: list[tuple[verbs.Verb, int, bytes, bytes]], size: int) -> None:
    out: list[bytes | memoryview] = []
    for verb, number, meta, body in told:
        add_frames(out, verb.number, number, meta, pieces_of(body))
    octets = b"".join(out)
    whole, parts = FrameReader(), FrameReader()
    found = whole.feed(octets)
    assert found == [(verb.number, 0, number, meta, body) for verb, number, meta, body in told]
    assert [one for at in range(0, len(octets), size) for one in parts.feed(octets[at : at + size])] == found
    assert not whole.begun and not parts.begun


def test_a_large_body_travels_in_pieces_and_comes_back_whole() -> None:
    body = random.Random(1).randbytes(3 * limits.NODE_PIECE_OCTETS + 5)
    out: list[bytes | memoryview] = []
    octets = add_frames(out, 4, 9, b"meta", pieces_of(body))
    frames = FrameReader().feed(b"".join(out))
    assert octets == 4 + len(body)
    assert [len(one[4]) for one in frames] == [limits.NODE_PIECE_OCTETS] * 3 + [5]
    assert [one[1] for one in frames] == [1, 1, 1, 0] and [one[3] for one in frames] == [b"meta", b"", b"", b""]
    assert b"".join(one[4] for one in frames) == body


@pytest.mark.parametrize("claim", [2**32 - 1, 2**31, limits.NODE_PAYLOAD_OCTETS_MAX + 1])
def test_a_frame_that_claims_too_much_ends_the_connection_and_takes_no_memory(claim: int) -> None:
    session = opened()
    session.hear(HEADER.pack(claim, 2, 0, 0, 2, 0) + b"x" * 100)
    assert session.end == "oversized" and session.machine.refused == ["oversized"]
    assert said(session.out)[-1][0] == "GOAWAY"
    session.hear(frame("PING", 3))
    assert session.machine.state is State.OVER and len(said(session.out)) == 1, "nothing is heard behind it"


def test_a_meta_that_is_longer_than_its_frame_ends_the_connection() -> None:
    session = opened()
    session.hear(HEADER.pack(3, 2, 0, 4, 2, 0) + b"abc")
    assert session.end == "oversized"


@pytest.mark.parametrize("at", [16, 24, 30, 60])
def test_an_octet_that_changed_on_the_way_is_noticed(at: int) -> None:
    session = opened()
    octets = bytearray(frame("COMMIT", 2, [KEY, 1, "b", 0.0, 0, 6, [[0, 0, 4, 4]]], b"recordbody"))
    octets[at] ^= 1
    session.hear(bytes(octets))
    assert session.end == "checksum"


# -- the serving end -----------------------------------------------------------------------------------------------

_METAS: dict[str, list[Any]] = {
    "COMMIT": [KEY, 1, "boot", 1.0, 0, 0, []],
    "APPEND": [KEY, []],
    "CANCEL": [KEY],
    "ABORT": [0.0, 0, ["boot", 1.0]],
    "DELETE": [0.0, 0],
    "DROP": [0],
    "DISCARD": [KEY, 0],
    "READ_COMMIT": [KEY],
    "READ_CHUNK": [KEY, 0],
    "VERIFY": [KEY],
    "SCAN": [0, 0, 10, 0.0],
    "REREAD": [0, 0, 0],
    "LIVE_KEYS": [b"", 10],
    "FENCE": ["boot", 1.0],
    "MARK": [0],
    "PUT_CHECKPOINT": [KEY, 0, 0],
    "CHECKPOINTS": [b"", 10],
    "COMPACTABLE": [0, 0, 0.0],
    "COMPACT": [0, 0, 0],
    "BLOCK": [True],
    "SET_LAYOUT": [2, 1],
    "EXPEL": [["front-1"]],
    "FOLLOW": [2],
}
_ALLOWED = {
    "front": "PING COMMIT APPEND CANCEL ABORT READ_COMMIT READ_CHUNK READ_SMALL HAS VERIFY MARK END PROBE OPEN LAYOUT FOLLOW",
    "keeper": "PING COMMIT APPEND CANCEL DELETE DROP DISCARD READ_COMMIT READ_CHUNK READ_SMALL HAS VERIFY SCAN REREAD "
    "LIVE_KEYS FENCE MARK END PROBE REBIRTH LIFT_BIRTH PUT_CHECKPOINT CHECKPOINTS COMPACTABLE COMPACT OPEN "
    "LAYOUT SET_LAYOUT EXPEL FOLLOW EXPELLED",
    "operator": "PING MARK END PROBE OPEN INITIALISE BLOCK LAYOUT SET_LAYOUT EXPEL FOLLOW EXPELLED",
}


@pytest.mark.parametrize("role", list(_ALLOWED))
@pytest.mark.parametrize("verb", [verb.name for verb in TABLE if verb.way is Way.ASK and verb.name != "HELLO"])
def test_each_role_may_ask_what_it_may_and_nothing_else(role: str, verb: str) -> None:
    """Every verb by every role; what may be asked is spelled out above once more, so that no edit of the table slips by."""
    session = opened(frozenset({Role(role)}))
    session.hear(frame(verb, 2, _METAS.get(verb, [])))
    answer, number, meta, _ = said(session.out)[0]
    if verb in _ALLOWED[role].split():
        assert answer in ("REPLY", "ACKS")
    else:
        assert (answer, number, meta[0]) == ("ERROR", 2, Failure.ROLE) and session.machine.refused == ["role"]
        session.hear(frame("PING", 3))
        assert said(session.out)[-1][0] == "REPLY", "the connection goes on"


@pytest.mark.parametrize("roles", [frozenset(), frozenset({Role.NODE})])
def test_who_has_no_role_that_asks_is_heard_in_nothing(roles: frozenset[Role]) -> None:
    session = Session(roles)
    session.hear(frame("HELLO", 1, hello()))
    assert said(session.out)[0][:2] == ("ERROR", 1) and session.machine.state is State.GREETING
    session.hear(frame("COMMIT", 2, _METAS["COMMIT"]))
    assert session.end == "order"


@pytest.mark.parametrize("name", sorted(_METAS))
def test_metas_that_are_cut_short_or_of_other_types_are_refused_one_by_one(name: str) -> None:
    session = opened(frozenset({*ALL}))
    good, number = _METAS[name], 1
    bad: list[Any] = [b"\xc1", 5, "text", {"a": 1}]
    for place, value in enumerate(good):
        bad.append([*good[:place], {"x": 1} if not isinstance(value, dict) else 5, *good[place + 1 :]])
    for meta in bad:
        number += 1
        session.hear(frame(name, number, meta))
        answer = said(session.out)[-1]
        assert answer[:2] == ("ERROR", number) and answer[2][0] == Failure.MALFORMED, (meta, answer)
    session.hear(frame("PING", number + 1))
    assert said(session.out)[-1][0] == "REPLY" and session.machine.unanswered == 0


@pytest.mark.parametrize("key", [b"", b"k" * 15, b"k" * 17, b"../" * 5, b"k" * 4096, "ключ", None])
def test_a_key_is_sixteen_octets_and_nothing_else(key: Any) -> None:
    """R06."""
    session = opened()
    session.hear(frame("READ_COMMIT", 2, [key]))
    assert said(session.out)[-1][2][0] == Failure.MALFORMED


@pytest.mark.parametrize("at", [float("nan"), float("inf"), float("-inf")])
def test_a_moment_that_compares_to_nothing_is_refused(at: float) -> None:
    """Law 2: such a stamp would pass every comparison."""
    session = opened()
    session.hear(frame("COMMIT", 2, [KEY, 1, "boot", at, 0, 0, []]) + frame("FENCE", 3, ["boot", at]))
    assert [answer[2][0] for answer in said(session.out)] == [Failure.MALFORMED] * 2


def test_more_operations_than_the_window_holds_end_the_connection() -> None:
    machine = NodeServer(ALL)
    asks = [event for event in machine.receive(frame("HELLO", 1, hello())) if isinstance(event, Ask)]
    machine.welcome(asks[0].number, forms.Welcome(1, "ours", "a", "", 0, 4 << 20, 3))
    events: list[Any] = []
    for number in range(2, 8):
        events += machine.receive(frame("CANCEL", number, [KEY]))
    assert [type(event) for event in events] == [Ask, Ask, Ask, Stop] and events[-1].why == "credits"


def test_more_octets_than_the_window_holds_end_the_connection() -> None:
    machine = NodeServer(ALL)
    asks = [event for event in machine.receive(frame("HELLO", 1, hello())) if isinstance(event, Ask)]
    machine.welcome(asks[0].number, forms.Welcome(1, "ours", "a", "", 0, 100_000, 1024))
    octets = operation("APPEND", 2, [KEY, [[0, 0, 200_000, 200_000]]], b"x" * 200_000)
    events = list(machine.receive(octets))
    assert [type(event) for event in events] == [Ask], "one that is alone may be larger"
    assert machine.held_octets > 200_000
    (stop,) = machine.receive(frame("CANCEL", 3, [KEY]))
    assert isinstance(stop, Stop) and stop.why == "credits"
    machine = NodeServer(ALL)
    asks = [event for event in machine.receive(frame("HELLO", 1, hello())) if isinstance(event, Ask)]
    machine.welcome(asks[0].number, forms.Welcome(1, "ours", "a", "", 0, 100_000, 1024))
    assert len(list(machine.receive(octets))) == 1
    machine.reply(2)
    assert machine.held_octets == 0 and len(list(machine.receive(frame("PING", 3)))) == 1, "an answer gives the room back"


def test_a_ping_takes_nothing_of_the_windows() -> None:
    """It is answered whatever else is open: an operation that fills the window, as many as there may be, or both."""
    machine = NodeServer(ALL)
    asks = [event for event in machine.receive(frame("HELLO", 1, hello())) if isinstance(event, Ask)]
    machine.welcome(asks[0].number, forms.Welcome(1, "ours", "a", "", 0, 100_000, 2))
    assert len(list(machine.receive(operation("APPEND", 2, [KEY, []], b"x" * 200_000)))) == 1
    for number in (3, 4, 5):
        (ping,) = machine.receive(frame("PING", number))
        assert isinstance(ping, Ask)
        machine.reply(number)
    machine.reply(2)
    assert [len(list(machine.receive(frame("CANCEL", number, [KEY])))) for number in (6, 7)] == [1, 1]
    assert isinstance(next(machine.receive(frame("PING", 8))), Ask)
    machine.reply(8)
    (stop,) = machine.receive(frame("CANCEL", 9, [KEY]))
    assert isinstance(stop, Stop)


def test_what_is_short_goes_out_before_the_large_answers_that_wait() -> None:
    """And of these only as much as is asked for, in whole pieces, every octet in the end."""
    machine = opened().machine
    for number in (2, 3, 4):
        list(machine.receive(frame("READ_COMMIT", number, [KEY])))
    body = random.Random(5).randbytes(300_000)
    machine.reply(2, forms.NOTHING, body)
    machine.reply(3, forms.NOTHING, body)
    (ping,) = machine.receive(frame("PING", 5))
    assert isinstance(ping, Ask)
    machine.reply(5, forms.StampForm("boot", 1.5))
    reader, first = FrameReader(), machine.to_send(0)
    assert [one[2] for one in reader.feed(first)] == [5] and machine.large_octets > 600_000
    some = reader.feed(machine.to_send(1))
    assert [len(one[4]) for one in some] == [limits.NODE_PIECE_OCTETS], "a piece at a time"
    machine.fail(4, Failure.COPY_MISSING, "no")
    rest = reader.feed(machine.to_send(1 << 30))
    assert rest[0][2] == 4 and machine.large_octets == 0 and machine.to_send() == b""
    assert b"".join(one[4] for one in [*some, *rest[1:]]) == body + body
    client = asking("PING", "READ_COMMIT", "READ_COMMIT")
    whole = [b"".join(frame(one[0], one[2], one[3], one[4], one[1]) for one in [*some, *rest[1:]])]
    assert [event.body for event in client.receive(whole[0]) if isinstance(event, Answer)] == [body, body]


def test_nothing_waits_to_be_sent_to_who_broke_the_protocol() -> None:
    machine = opened().machine
    list(machine.receive(frame("READ_COMMIT", 2, [KEY])))
    machine.reply(2, forms.NOTHING, bytes(300_000))
    (stop,) = machine.receive(frame("PING", 2))
    assert isinstance(stop, Stop) and [one[0] for one in said(machine.to_send(0))] == ["GOAWAY"]


def test_a_refusal_for_an_old_fence_brings_the_layout_in_pieces() -> None:
    layout = random.Random(9).randbytes(3 * limits.NODE_PIECE_OCTETS)
    machine = NodeServer(ALL)
    list(machine.receive(frame("HELLO", 1, hello())))
    machine.refuse(1, "too old", 7, layout)
    octets = machine.to_send(0)
    client = asking("HELLO")
    (event,) = client.receive(octets)
    assert event == Failed(1, Failure.FENCED, "too old", None, 7, layout) and client.unanswered == 0
    parts = asking("HELLO")
    assert [one for at in range(0, len(octets), 777) for one in parts.receive(octets[at : at + 777])] == [event]


def test_an_operation_that_never_ends_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "NODE_OPERATION_OCTETS_MAX", 300_000)
    for roles, verb in ((ALL, "APPEND"), (frozenset({Role.OPERATOR}), "APPEND")):
        session = opened(roles, octets=100_000)
        for _ in range(6):
            session.hear(frame(verb, 2, [KEY, []] if not session.machine.unfinished[0] else None, b"x" * 65_536, 1))
        assert session.end == "oversized", "also one that was refused in its first piece"


def test_pieces_without_octets_and_operations_without_ends_are_cut_off() -> None:
    session = opened(operations=4)
    session.hear(frame("APPEND", 2, [KEY, []], b"", 1))
    assert session.end == "malformed"
    session = opened(frozenset({Role.OPERATOR}), operations=4)
    for number in range(2, 10):
        session.hear(frame("APPEND", number, [KEY, []], b"x", 1))
    assert session.end == "credits", "although each was refused"


def test_receipts_are_gathered_by_incarnation() -> None:
    machine = opened().machine
    for number in range(2, 6):
        list(machine.receive(frame("COMMIT", number, _METAS["COMMIT"])))
    for number, incarnation in ((2, "x"), (4, "x"), (3, "y"), (5, "x")):
        machine.ack(number, incarnation, number, 1 << 40)
    assert said(machine.to_send()) == [
        ("ACKS", 0, ["x"], [(2, 2, 1 << 40), (4, 4, 1 << 40)]),
        ("ACKS", 0, ["y"], [(3, 3, 1 << 40)]),
        ("ACKS", 0, ["x"], [(5, 5, 1 << 40)]),
    ]
    assert machine.to_send() == b"" and machine.unanswered == 0


# -- the asking end ------------------------------------------------------------------------------------------------


def asking(*names: str) -> NodeClient:
    """A client that has asked these, with numbers from 1 on."""
    client = NodeClient()
    for name in names:
        client.ask(VERBS[name], forms.encode(_METAS.get(name, [])))
    return client


def test_an_answer_is_of_the_form_that_its_verb_names() -> None:
    client = asking("VERIFY", "PING", "COMMIT")
    octets = (
        frame("REPLY", 2, ["boot", 2.5, "later field"]) + frame("REPLY", 1, [7, 9]) + frame("ACKS", 0, ["i"], ACK.pack(3, 4, 5))
    )
    whole = client.receive(octets)
    assert whole == [
        Answer(2, forms.StampForm("boot", 2.5), b""),
        Answer(1, forms.PositionForm(7, 9), b""),
        Acks("i", [(3, 4, 5)], [None]),
    ]
    assert client.unanswered == 0 and client.open_octets == 0
    client = asking("VERIFY", "PING", "COMMIT")
    assert [event for n in range(len(octets)) for event in client.receive(octets[n : n + 1])] == whole


def test_a_definite_refusal_is_one_of_a_commit_only() -> None:
    """Law 5."""
    client = asking("COMMIT", "APPEND", "CANCEL")
    events = client.receive(b"".join(frame("ERROR", n, [Failure.COMMIT_REFUSED, "no"]) for n in (1, 2, 3)))
    assert [event.failure for event in events if isinstance(event, Failed)] == [
        Failure.COMMIT_REFUSED,
        Failure.TROUBLE,
        Failure.TROUBLE,
    ]


def test_a_class_that_is_not_known_is_trouble() -> None:
    (event,) = asking("COMMIT").receive(frame("ERROR", 1, [200, "of a later version", 0, "more"]))
    assert event == Failed(1, Failure.TROUBLE, "of a later version")


LIES = {
    "an answer to what was not asked": frame("REPLY", 9, [1, 2]),
    "an answer that came before": frame("REPLY", 1, [1, 2]) * 2,
    "a receipt of what is no commit": frame("ACKS", 0, ["i"], ACK.pack(1, 4, 5)),
    "a receipt twice": frame("ACKS", 0, ["i"], ACK.pack(2, 4, 5) * 2),
    "a receipt cut short": frame("ACKS", 0, ["i"], ACK.pack(2, 4, 5)[:-1]),
    "a reply to a commit": frame("REPLY", 2, []),
    "an error of what was not asked": frame("ERROR", 9, [1, "x"]),
    "an ask": frame("DELETE", 1, [0.0, []]),
    "a verb that nobody knows": frame(99, 1, []),
    "another form": frame("REPLY", 1, ["text"]),
    "no form": frame("REPLY", 1, b"\xc1"),
    "a reply without its meta": frame("REPLY", 1),
    "an oversized frame": HEADER.pack(2**32 - 1, 129, 0, 0, 1, 0),
    "another checksum": frame("REPLY", 1, [1, 2])[:-1] + b"\x7f",
    "a flag that nobody knows": frame("REPLY", 1, [1, 2], b"", 4),
    "a piece without octets": frame("REPLY", 3, [], b"", 1),
    "a piece with a second meta": frame("REPLY", 3, [], b"x", 1) + frame("REPLY", 3, [], b"y"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_node_that_breaks_the_protocol_is_lost(lie: str) -> None:
    client = asking("VERIFY", "COMMIT", "READ_COMMIT")
    events = client.receive(LIES[lie])
    assert isinstance(events[-1], Lost) and client.over
    assert client.receive(frame("REPLY", 3, [])) == [], "nothing is believed behind it"
    parts = asking("VERIFY", "COMMIT", "READ_COMMIT")
    assert [event for n in range(len(LIES[lie])) for event in parts.receive(LIES[lie][n : n + 1])] == events


def test_an_answer_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "NODE_ANSWER_OCTETS_MAX", 100_000)
    client = asking("READ_COMMIT")
    events: list[Any] = []
    for _ in range(4):
        events += client.receive(frame("REPLY", 1, [] if not events and not client.over else None, b"x" * 60_000, 1))
    assert isinstance(events[-1], Lost)


def test_the_window_is_kept() -> None:
    client = NodeClient()
    client.window_octets, client.window_operations = 1000, 3
    assert client.may_ask(5000), "one that is alone may be larger"
    client.ask(VERBS["APPEND"], b"\x90", pieces_of(b"x" * 900))
    assert client.may_ask(99) and not client.may_ask(100)
    client.ask(VERBS["PING"])
    client.ask(VERBS["PING"])
    assert not client.may_ask(1)
    client.receive(frame("REPLY", 1, []))
    assert client.may_ask(900)


def test_what_is_pushed_needs_no_asking() -> None:
    stat = forms.StatForm("read-write", "", "inc", 1, 2, 3, 4, 5, 6, 7, 8, 0.5, 0.25)
    octets = frame("STAT", 0, [*msgspec.to_builtins(stat), "later"]) + frame("GOAWAY", 0, [1, "bye"])
    assert asking().receive(octets) == [Stat(stat), GoneAway("bye")]


@settings(max_examples=25, deadline=None)
@given(
    some.lists(some.tuples(some.sampled_from(["COMMIT", "HAS", "READ_COMMIT", "PING"]), some.binary(max_size=90)), max_size=20),
    some.integers(1, 300),
)
def test_the_two_machines_understand_each_other_for_every_chunking(told: list[tuple[str, bytes]], size: int) -> None:
    client, session = NodeClient(), Session(ALL)
    client.ask(VERBS["HELLO"], msgspec.msgpack.encode(hello()))
    session.hear(client.to_send())
    client.receive(session.out)
    session.out = b""
    asked = {client.ask(VERBS[name], forms.encode(_METAS.get(name, [])), pieces_of(body)): name for name, body in told}
    octets = client.to_send()
    for at in range(0, len(octets), size):
        session.hear(octets[at : at + size])
    answered: list[int] = []
    for at in range(0, len(session.out), size):
        for event in client.receive(session.out[at : at + size]):
            if isinstance(event, Acks):
                assert all(asked[number] == "COMMIT" for number, _, _ in event.receipts)
                answered += [number for number, _, _ in event.receipts]
            else:
                assert isinstance(event, Answer)
                answered.append(event.number)
    assert sorted(answered) == list(asked) and client.unanswered == session.machine.unanswered == 0
    assert client.open_octets == session.machine.held_octets == 0


# -- who a certificate is ------------------------------------------------------------------------------------------


def test_names_of_certificates() -> None:
    given = [
        ("DNS", "powermail://c/front/x"),
        ("URI", "powermail://c/front/x"),
        ("URI", "powermail://c/keeper/x"),
        ("URI", "powermail://c/dancer/x"),
        ("URI", "powermail://c/front/x/y"),
        ("URI", "https://c/front/x"),
        ("URI", "powermail://c/front/../x"),
        ("URI", "powermail://other/front/z"),
    ]
    names = parse_names(given)
    assert names == [Name("c", Role.FRONT, "x"), Name("c", Role.KEEPER, "x"), Name("other", Role.FRONT, "z")]
    peer = peer_of(names, "c")
    assert (peer.id, peer.roles) == ("x", frozenset({Role.FRONT, Role.KEEPER}))
    assert not is_node(names, "c", "x") and is_node([Name("c", Role.NODE, "a")], "c", "a")
    assert not is_node([Name("c", Role.NODE, "a")], "d", "a")
    for bad, why in (([], "no_name"), (names, "cluster"), ([*names, Name("c", Role.FRONT, "w")], "name")):
        with pytest.raises(NotOurs) as info:
            peer_of(bad, "d" if why == "cluster" else "c")
        assert info.value.why == why
