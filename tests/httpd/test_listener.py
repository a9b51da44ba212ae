"""The listener as a process of its own and a real client see it: what it answers, and what it refuses."""

from __future__ import annotations

import socket
import struct

import pytest

from powermail.base import limits
from powermail.base.errors import OperatorError
from powermail.base.settings import load
from tests.httpd.conftest import Watched

ASK = b"GET /live HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(("path", "line"), [("/live", "alive\n"), ("/ready", "ready\n")])
def test_a_server_that_is_well_says_so_in_one_line(watched: Watched, path: str, line: str) -> None:
    answer = watched.ask(path)
    assert (answer.status, answer.body) == (200, line)
    assert answer.headers["Content-Type"].startswith("text/plain") and answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("path", ["/live", "/ready", "/metrics"])
def test_head_has_the_head_of_get_and_no_body(watched: Watched, path: str) -> None:
    octets = watched.say(f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head, _, body = octets.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n") and body == b""
    (length,) = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length: ")]
    assert int(length.split()[1]) > 0
    assert set(watched.ask(path).headers) == set(watched.ask(path, "HEAD").headers)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"])
@pytest.mark.parametrize("path", ["/live", "/ready", "/metrics"])
def test_only_get_and_head_are_known(watched: Watched, path: str, method: str) -> None:
    answer = watched.ask(path, method)
    assert answer.status == 405
    assert answer.headers["Allow"].replace(" ", "").split(",") == ["GET", "HEAD"]


@pytest.mark.parametrize("path", ["/", "/metrics/", "/Live", "/live/x", "/..%2fmetrics", "//live", "/powermail.toml", "/%00"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_nothing_else_is_there(watched: Watched, path: str, method: str) -> None:
    assert watched.ask(path, method).status == 404


@pytest.mark.parametrize(
    "octets",
    [
        b"EHLO client.example\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"G\x80T /live HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /live HTTP/9.9\r\nHost: x\r\n\r\n",
        ASK + b"X: " + b"a" * (limits.HTTP_FIELD_OCTETS_MAX + 1) + b"\r\n\r\n",
        b"GET /live?" + b"a" * limits.HTTP_LINE_OCTETS_MAX + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        ASK + b"".join(b"X%d: a\r\n" % number for number in range(limits.HTTP_FIELDS_MAX + 1)) + b"\r\n",
        ASK + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ASK + b"Content-Length: -1\r\n\r\n",
        ASK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        ASK + b"No colon\r\n\r\n",
        ASK + b"X: a\0b\r\n\r\n",
    ],
    ids=lambda octets: repr(octets[-24:]),
)
def test_what_is_no_request_is_refused_counted_and_no_bug(watched: Watched, octets: bytes) -> None:
    before = watched.figure("powermail_door_requests_bad_total", door="httpd")
    assert watched.say(octets).split()[1] == b"400"
    assert watched.becomes(before + 1, "powermail_door_requests_bad_total", door="httpd")
    assert watched.events("bug") == []


def test_a_header_without_an_end_is_refused_before_it_fills_memory(watched: Watched) -> None:
    try:
        assert b" 400 " in watched.say(b"GET /live HTTP/1.1\r\nX: " + b"a" * (8 * limits.MIB))
    except ConnectionError:
        pass  # closed while it was still sending
    assert watched.ask("/live").status == 200


def test_a_connection_is_for_one_request(watched: Watched) -> None:
    octets = watched.say((ASK + b"\r\n") * 3)
    assert octets.count(b"HTTP/1.1 200 OK") == 1 and b"\r\nConnection: close\r\n" in octets
    assert watched.say(b"GET /live HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").endswith(b"\r\n\r\nalive\n")


def test_a_client_that_shuts_its_writing_side_is_answered(watched: Watched) -> None:
    assert watched.say(ASK + b"\r\n", shut=True).endswith(b"\r\n\r\nalive\n")
    assert watched.say(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", shut=True).count(b"# HELP") > 100


def test_a_body_that_nobody_wants_is_bounded(watched: Watched) -> None:
    octets = watched.say(ASK + b"Content-Length: 1000000000\r\n\r\n" + b"a" * 1000)
    assert octets.endswith(b"\r\n\r\nalive\n")


@pytest.mark.parametrize(
    "octets",
    [
        ASK + b"Content-Encoding: gzip\r\nContent-Length: 50\r\n\r\nxxxx",
        ASK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nZZ\r\n",
        b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc",
        ASK + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n",
        ASK + b"Expect: nonsense\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: \xc3\xa9;;;,,q=;version=1.x\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\njunk",
    ],
    ids=lambda octets: repr(octets[-24:]),
)
def test_whatever_a_client_does_is_no_bug_of_ours(watched: Watched, octets: bytes) -> None:
    for end in range(1, len(octets), 9):
        with socket.create_connection(("127.0.0.1", watched.ports["httpd"])) as client:
            client.sendall(octets[:end])
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not a goodbye
    with socket.create_connection(("127.0.0.1", watched.ports["httpd"]), timeout=20) as client:
        client.sendall(octets)
        assert client.recv(7) == b"HTTP/1."
    assert watched.ask("/live").status == 200
    assert watched.events("bug") == []


@pytest.mark.parametrize(
    "upgrade", [b"Upgrade: websocket\r\nConnection: Upgrade\r\n", b"Upgrade: h2c\r\nConnection: upgrade\r\n"]
)
def test_no_other_protocol_is_begun(watched: Watched, upgrade: bytes) -> None:
    octets = watched.say(ASK + upgrade + b"\r\n\x00\x01\x02")
    assert octets.startswith(b"HTTP/1.1 200 OK\r\n") and octets.endswith(b"\r\n\r\nalive\n")


def test_the_answer_names_no_library(watched: Watched) -> None:
    assert watched.ask("/live").headers["Server"] == watched.ask("/none").headers["Server"] == "PowerMail"


@pytest.mark.parametrize("address", ["127.0.0.1:2900", "127.8.9.1:0", "[::1]:2900", "localhost:2900"])
def test_loopback_is_listened_on(address: str) -> None:
    assert load("", {}, [f'metrics.listen=["{address}"]']).metrics.listen == [address]


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0:2900", "[::]:2900", ":2900", "192.0.2.1:2900", "[2001:db8::1]:2900", "mail.example:2900", "127.1:2900",
        "[::ffff:192.0.2.1]:2900", "localhost.example:2900", "10.0.0.1:2900", "*:2900",
    ],
)  # fmt: skip
def test_what_others_reach_is_refused_unless_it_is_said_explicitly(address: str) -> None:
    with pytest.raises(OperatorError, match=r"metrics\.allow_remote = true"):
        load("", {}, [f'metrics.listen=["127.0.0.1:0", "{address}"]'])
    assert load("", {}, [f'metrics.listen=["{address}"]', "metrics.allow_remote=true"]).metrics.listen == [address]


def test_a_port_alone_is_no_address() -> None:
    with pytest.raises(OperatorError, match=r"metrics\.listen: '2900' is not host:port"):
        load("", {}, ['metrics.listen=["2900"]', "metrics.allow_remote=true"])


def test_it_is_off_by_default() -> None:
    assert load("", {}).metrics.listen == []
