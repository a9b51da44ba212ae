"""P19: both ends understand, octet by octet, what both ends of earlier releases said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import inspect

from powermail.wire import node_forms as forms
from powermail.wire.node_client import Acks, Answer, Failed, GoneAway, NodeClient, Stat
from powermail.wire.node_frames import FrameReader
from powermail.wire.node_server import Ask, NodeServer
from powermail.wire.node_verbs import BY_NUMBER, META_DECODERS, REPLY_DECODERS, VERBS, Failure
from tests.noded.golden import ALL, Golden, Turn, named, sample

RELEASES = sorted(Path("tests/noded/golden").glob("*.json"))
WHOLE = 1 << 40


def load(path: Path) -> Golden:
    """What a release kept."""
    return msgspec.json.decode(path.read_bytes(), type=Golden)


def says(now: Any, was: Any) -> bool:
    """True if a form has all that it had, with the same values; fields may have been appended."""
    if isinstance(was, dict):
        return isinstance(now, dict) and list(now)[: len(was)] == list(was) and all(says(now[name], was[name]) for name in was)
    if isinstance(was, list):
        return isinstance(now, list) and len(now) == len(was) and all(map(says, now, was))
    return bool(now == was)


def test_the_releases_are_there() -> None:
    assert [path.stem for path in RELEASES] == ["1"]
    assert {turn.verb for turn in load(RELEASES[0]).turns} >= {"HELLO", "COMMIT", "APPEND", "SCAN", "READ_SMALL", "SET_LAYOUT"}


@pytest.mark.parametrize("path", RELEASES, ids=lambda path: f"release {path.stem}")
@pytest.mark.parametrize("cut", [1, 7, WHOLE])
def test_a_node_of_now_hears_what_a_client_of_then_asks(path: Path, cut: int) -> None:
    server = NodeServer(ALL)
    for turn in load(path).turns:
        octets, heard = bytes.fromhex(turn.asked), list[Any]()
        for start in range(0, len(octets), cut):
            heard += server.receive(octets[start : start + cut])
        (ask,) = heard
        assert isinstance(ask, Ask) and server.refused == [], (turn.verb, ask)
        assert (BY_NUMBER[ask.verb].name, ask.number, ask.body.hex()) == (turn.verb, turn.number, turn.body)
        assert says(named(ask.meta), turn.meta), turn.verb
        if turn.verb == "HELLO":
            server.welcome(ask.number, forms.Welcome(1, "ours", "a", "inc", 0, 1 << 22, 1024))
        elif turn.kind == "ACKS":
            server.ack(ask.number, "inc", 1, 8)
        else:
            server.reply(ask.number)
        server.to_send(WHOLE)


@pytest.mark.parametrize("path", RELEASES, ids=lambda path: f"release {path.stem}")
@pytest.mark.parametrize("cut", [1, 7, WHOLE])
def test_a_client_of_now_hears_what_a_node_of_then_answers(path: Path, cut: int) -> None:
    client, golden = NodeClient(), load(path)

    def heard(octets: bytes) -> list[Any]:
        found: list[Any] = []
        for start in range(0, len(octets), cut):
            found += client.receive(octets[start : start + cut])
        return found

    for turn in golden.turns:
        assert client.ask(VERBS[turn.verb], token=turn.verb) == turn.number
        client.to_send()
        (event,) = heard(bytes.fromhex(turn.answered))
        _check_answer(turn, event)
    stat, gone = heard(bytes.fromhex(golden.pushed))
    assert isinstance(stat, Stat) and says(named(stat.stat), golden.stat)
    assert isinstance(gone, GoneAway) and gone.text == "it was enough"


def _check_answer(turn: Turn, event: Any) -> None:
    if turn.kind == "ACKS":
        assert isinstance(event, Acks) and event.tokens == [turn.verb]
        assert event.receipts == [(turn.number, *turn.answer["place"])]
    elif turn.kind == "ERROR":
        assert isinstance(event, Failed) and (event.failure, event.text) == (Failure.TROUBLE, turn.answer["text"])
    else:
        assert isinstance(event, Answer) and says(named(event.meta), turn.answer), (turn.verb, event)
        assert event.body.hex() == turn.answer_body


@pytest.mark.parametrize("path", RELEASES, ids=lambda path: f"release {path.stem}")
def test_what_is_said_now_has_the_fields_of_then_in_their_places(path: Path) -> None:
    """Who reads by the forms of then passes over the rest: fields are only ever appended, also within lists."""
    for turn in load(path).turns:
        verb = VERBS[turn.verb]
        asked = FrameReader().feed(bytes.fromhex(turn.asked))[0][3]
        _check_fields(turn.verb, forms.encode(META_DECODERS[verb.number](asked)), asked)
        if turn.kind == "REPLY":
            answered = FrameReader().feed(bytes.fromhex(turn.answered))[0][3]
            _check_fields(turn.verb, forms.encode(REPLY_DECODERS[verb.number](answered or b"\x90")), answered or b"\x90")


def _check_fields(verb: str, now: bytes, was: bytes) -> None:
    assert begins(msgspec.msgpack.decode(now), msgspec.msgpack.decode(was)), verb


def begins(now: Any, was: Any) -> bool:
    """True if each array begins with what was in it."""
    if isinstance(was, list):
        return isinstance(now, list) and len(now) >= len(was) and all(map(begins, now, was))
    return bool(now == was)


def test_a_form_that_gained_fields_says_what_it_said_and_one_that_lost_or_moved_some_does_not() -> None:
    """The checks themselves."""
    was = {"key": "aa", "place": {"segment": 1, "offset": 2}}
    assert says({**was, "later": 1}, was) and says({**was, "place": {**was["place"], "age": 0}}, was)  # type: ignore[dict-item]
    assert not says({"place": was["place"], "key": "aa"}, was) and not says({"key": "aa"}, was)
    assert begins([1, [2, 3, 4], 5], [1, [2, 3]]) and not begins([1, [3, 2]], [1, [2, 3]]) and not begins([1], [1, 2])
    one, other = (sample(inspect.type_info(forms.ScanHead), seed) for seed in (1, 2))
    assert one != other and named(one)["following"]["offset"] == one.following.offset
