"""A message's story, from a log of either form."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from powermail.base.log import Event, StreamLog, format_json, format_stamp, format_text, json_lines, text_lines
from powermail.cli.tracing import parse, story
from tests.cli.support import powermail

KEYS = [b"\x01" * 16, b"\x02" * 16]
EVENTS: list[tuple[Event, dict[str, object]]] = [
    (Event.LOGIN, {"cid": "7", "account": "ann@example.org"}),
    (
        Event.RECIPIENT_REFUSED,
        {"cid": "8", "sender": "<spam@example.net>", "recipient": "bob@example.org", "cause": 'no "such" user'},
    ),
    (
        Event.DELIVERED,
        {"key": KEYS[0], "cid": "7", "to": "Bob@example.org", "message_id": "<One@example.net>", "sender": "<s@x.y>"},
    ),
    (Event.DELIVERED, {"key": KEYS[1], "cid": "7", "to": "cat@example.org", "message_id": "<two@example.net>", "sender": "<>"}),
    (Event.DEFERRED, {"key": KEYS[0], "to": "far@example.com", "host": "mx.example.com", "status": "451 later"}),
    (Event.SENT, {"key": KEYS[0], "to": "far@example.com", "host": "mx.example.com"}),
    (Event.SENT, {"key": KEYS[1], "to": "other@example.com"}),
    (Event.LOGIN_FAILED, {"cid": "9", "door": "popd", "name": "Dan@example.org", "reason": "digest malformed"}),
    (Event.RETRIEVED, {"cid": "10", "key": KEYS[1], "account": "cat@example.org"}),
    (Event.DELETED, {"cid": "10", "key": KEYS[1], "account": "cat@example.org"}),
]


@pytest.fixture(params=["text", "json", "journal"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A log file."""
    how = format_json if request.param == "json" else format_text
    before = "Nov 25 20:00:00 host powermail[7]: " if request.param == "journal" else ""
    lines = [before + how(format_stamp(1_700_000_000.5 + at), event, facts) for at, (event, facts) in enumerate(EVENTS)]
    path = tmp_path / "log"
    path.write_text("PowerMail is ready: smtp 2525\n" + "\n".join(lines) + "\n\n{broken\n")
    return str(path)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        (KEYS[0].hex(), ["delivered", "deferred", "sent"]),
        (KEYS[0].hex().upper(), ["delivered", "deferred", "sent"]),
        ("<one@example.net>", ["login", "delivered", "deferred", "sent"]),
        ("One@Example.net", ["login", "delivered", "deferred", "sent"]),
        ("bob@example.org", ["login", "recipient-refused", "delivered", "deferred", "sent"]),
        ("cat@example.org", ["login", "delivered", "sent", "retrieved", "deleted"]),
        (KEYS[1].hex(), ["delivered", "sent", "retrieved", "deleted"]),
        ("dan@example.org", ["login-failed"]),
        ("spam@example.net", ["recipient-refused"]),
        ("example.org", []),
    ],
)
def test_the_story_is_that_message_and_no_other(log: str, word: str, told: list[str]) -> None:
    done = powermail("trace", word, "--log", log, "--json")
    if not told:
        assert done.status == 1
        assert done.sentence() == f"nothing in the log tells of {word}"
        return
    expected = [name for name in told if name != "login" or "cid" in str(EVENTS)]
    found = [line["event"] for line in done.json()]
    assert [name for name in found if name != "login"] == [name for name in expected if name != "login"]


def test_people_read_one_line_an_event(log: str) -> None:
    done = powermail("trace", "spam@example.net", "--log", log)
    (line,) = done.out.splitlines()
    assert "recipient-refused" in line and 'cause=no "such" user' in line and "sender=<spam@example.net>" in line


def test_what_the_log_writes_is_what_is_read(tmp_path: Path) -> None:
    """Pair check: the writer's escapes are the reader's."""
    for json in (False, True):
        path = tmp_path / f"log-{json}"
        with path.open("w") as stream:
            log = StreamLog(lambda: 1_700_000_000.0, json=json, stream=stream)
            log.event(
                Event.DELIVERED,
                key=KEYS[0],
                to=("a b@example.org", "ü@example.org"),
                sender='<"x\\y"@z>',
                cause='no\r\n"\x1b[2J" key=00\u202e',
            )
            log.close()
        found = [parse(line) for line in path.read_text().splitlines()]
        assert [line.facts["key"] for line in found if line] == [KEYS[0].hex()] * 2
        assert [line.facts["cause"] for line in found if line] == ['no\r\n"\x1b[2J" key=00\u202e'] * 2
        assert [line.facts["sender"] for line in found if line] == ['<"x\\y"@z>'] * 2
        assert [line.facts["to"] for line in found if line] == ["a b@example.org", "ü@example.org"]


def test_files_that_cannot_be_read_are_said() -> None:
    assert "cannot read /nowhere: No such file" in powermail("trace", "x", "--log", "/nowhere").sentence()
    assert list(story([], "x")) == []


def test_lines_of_one_event_say_what_each_would_say_alone() -> None:
    """What recipients share is formatted once, whatever they are called."""
    to = ("ann@example.org", 'a" b@example.org', "jörg@bücher.example", "x\ny@example.org")
    fields = {"key": b"\x01\x02", "sender": "<a b@example.org>", "to": to, "octets": 4096, "nodes": None, "seconds": 0.5}
    alone = [{**fields, "to": one} for one in to]
    assert text_lines("t", Event.DELIVERED, fields) == [format_text("t", Event.DELIVERED, each) for each in alone]
    lines = json_lines("t", Event.DELIVERED, fields)
    assert [msgspec.json.decode(line) for line in lines] == [
        msgspec.json.decode(format_json("t", Event.DELIVERED, each)) for each in alone
    ]


def test_lines_of_several_messages_say_what_each_would_say_alone() -> None:
    """What a reader took in one second is one event."""
    fields = {"cid": "1", "key": (KEYS[0], KEYS[1]), "account": "a b@example.org"}
    alone = [{**fields, "key": key} for key in KEYS]
    assert text_lines("t", Event.RETRIEVED, fields) == [format_text("t", Event.RETRIEVED, each) for each in alone]
    lines = json_lines("t", Event.RETRIEVED, fields)
    assert [msgspec.json.decode(line) for line in lines] == [
        msgspec.json.decode(format_json("t", Event.RETRIEVED, each)) for each in alone
    ]
