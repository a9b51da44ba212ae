"""The protocol machines: the same for every chunking of the input, and never more than one end of data."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as some

from powermail.base import limits
from powermail.mail import status as st
from powermail.mail.envelope import Envelope
from powermail.mail.status import Status
from powermail.wire import pop3, sasl, smtp
from powermail.wire.buffer import BareLineEnd, InputBuffer, LineTooLong
from powermail.wire.dot import DotReader, DotWriter, LineEnds, stuff
from powermail.wire.proxy import ProxyError, literal, parse_proxy, plain_address
from powermail.wire.smtp_client import Reply, ReplyError, ReplyReader

nasty = some.lists(some.sampled_from([b"\r", b"\n", b"\r\n", b".", b"..", b"a", b"\0", b"\xff"]), max_size=40).map(b"".join)


def read_dots(pieces: list[bytes]) -> tuple[bytes, bytes, bool]:
    """(message, what follows, whether the end came) for input in these pieces."""
    reader, message, done, rest = DotReader(), b"", False, b""
    for piece in pieces:
        if done:
            rest += piece
            continue
        body, following, done = reader.feed(piece)
        message += body
        rest += following
    return message, rest, done


def read_replies(pieces: list[bytes]) -> list[Reply]:
    """The replies in these pieces."""
    reader, found = ReplyReader(), list[Reply]()
    for piece in pieces:
        reader.add(piece)
        while (reply := reader.next()) is not None:
            found.append(reply)
    return found


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """`data` cut at these places."""
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


@given(nasty, some.lists(some.integers(0, 1000), max_size=6))
def test_data_is_read_the_same_for_every_chunking(data: bytes, places: list[int]) -> None:
    stream = data + b"\r\n.\r\nQUIT\r\n"
    assert read_dots(cut(stream, places)) == read_dots([stream])
    assert read_dots([stream[i : i + 1] for i in range(len(stream))]) == read_dots([stream])


@given(nasty)
def test_what_is_stuffed_is_read_back(data: bytes) -> None:
    writer = DotWriter()
    sent = writer.feed(data) + writer.end()
    message, rest, done = read_dots([sent])
    expected = b"\r\n".join(part.replace(b"\n", b"\r\n") for part in data.split(b"\r\n"))
    assert done
    assert rest == b""
    assert message in (expected, expected + b"\r\n")


@given(nasty, some.lists(some.integers(0, 1000), max_size=6))
def test_outbound_stream_has_only_crlf_line_ends(data: bytes, places: list[int]) -> None:
    writer = DotWriter(clean_cr=True)
    sent = b"".join(writer.feed(piece) for piece in cut(data, places)) + writer.end()
    assert sent.count(b"\r") == sent.count(b"\n") == sent.count(b"\r\n")
    assert sent.find(b"\r\n.\r\n") in (-1, len(sent) - 5) or sent == b".\r\n"


@pytest.mark.parametrize(
    "end", [b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r.\r", b"\r\n.\r", b"\r.\r\n", b"\n.\r", b"\r\n\x00.\r\n"]
)
def test_original_defect_8_only_crlf_dot_crlf_ends_data(end: bytes) -> None:
    message, rest, done = read_dots([b"body" + end + b"MAIL FROM:<smuggled@x>\r\n.\r\n"])
    assert done
    assert rest == b""
    assert b"smuggled" in message


def test_dot_lines_are_unstuffed_exactly_once() -> None:
    assert read_dots([b"..x\r\n...\r\n....\r\n.\r\n"]) == (b".x\r\n..\r\n...\r\n", b"", True)


def test_a_message_may_be_empty() -> None:
    assert read_dots([b".\r\nRSET\r\n"]) == (b"", b"RSET\r\n", True)


@given(some.binary(max_size=200), some.lists(some.integers(0, 1000), max_size=6))
def test_lines_are_the_same_for_every_chunking(data: bytes, places: list[int]) -> None:
    def lines(pieces: list[bytes]) -> list[bytes | str]:
        buffer, found = InputBuffer(), list[bytes | str]()
        for piece in pieces:
            buffer.feed(piece)
            while True:
                try:
                    line = buffer.line(64)
                except LineTooLong:
                    found.append("long")
                    continue
                except BareLineEnd:
                    found.append("bare")
                    continue
                if line is None:
                    break
                found.append(line)
        return found

    assert lines(cut(data, places)) == lines([data])


def test_an_endless_line_is_refused_once_and_keeps_no_memory() -> None:
    buffer = InputBuffer()
    refused = 0
    for _ in range(100):
        buffer.feed(b"x" * 10_000)
        try:
            assert buffer.line(512) is None
        except LineTooLong:
            refused += 1
        assert len(buffer) == 0
    buffer.feed(b"\r\nNOOP\r\n")
    assert (refused, buffer.line(512)) == (1, b"NOOP")


@pytest.mark.parametrize(
    ("argument", "status"),
    [
        ("FROM:<a@b.c> SIZE=99999999999999999999999", st.SYNTAX),
        ("FROM:<a@b.c> SIZE=-1", st.SYNTAX),
        ("FROM:<a@b.c> AUTH=a+0Ab", st.SYNTAX),
        ("FROM:<a@b.c> ENVID=+0D+0A", st.SYNTAX),
        ("FROM:<a@b.c> FOO=1", st.PARAMETER_UNKNOWN),
        ("FROM:<ü@b.c>", st.NEEDS_SMTPUTF8),
        ("TO:<a@b.c>", st.SYNTAX),
        ("FROM:<a@b.c> SIZE=1 SIZE=1", st.SYNTAX),
        ("FROM:<a@b.c> BODY=7BIT size=1 body=7BIT", st.SYNTAX),
        ("FROM:<a@b.c> SMTPUTF8 SMTPUTF8", st.SYNTAX),
        ("FROM:<a@b.c> RET=FULL RET=HDRS", st.SYNTAX),
    ],
)
def test_bad_mail_parameters(argument: str, status: Status) -> None:
    assert smtp.parse_mail(argument) == status


@pytest.mark.parametrize(
    "path", ["<;sleep 66;>", "<@local>", "<.a@local>", "<a@>", f"<{'a' * 255}@local>", '<""@local>', "<a@b", "<a b@c>"]
)
def test_bad_paths_are_refused(path: str) -> None:
    parsed = smtp.parse_rcpt(f"TO:{path}", False)
    assert isinstance(parsed, Status)
    assert parsed.code == 501


@pytest.mark.parametrize(
    "path",
    [
        "<postmaster>",
        "<POSTMASTER>",
        "<\"x' OR '1'='1\"@local>",
        '<"../../../etc/cron.d/x"@local>',
        "<a/b@local>",
        "<@relay.example:a@b.c>",
        "a@b.c",
        f"<{'a' * 65}@local>",
        f"<SRS1=abcdefgh=relay.example==ijkl=mn=sender.example={'long-name-' * 9}@local>",
        f"<bounces+{'x' * 180}@bulk.example>",
        f'<"{"q" * 100} {"q" * 100}"@local>',
    ],
)
def test_odd_but_legal_paths_are_parsed(path: str) -> None:
    assert not isinstance(smtp.parse_rcpt(f"TO:{path}", False), Status)


def test_mail_parameters() -> None:
    parsed = smtp.parse_mail("FROM:<a@b.c> SIZE=100 BODY=8BITMIME RET=HDRS ENVID=x+2By SMTPUTF8")
    assert not isinstance(parsed, Status)
    assert (parsed.size, parsed.envelope) == (100, Envelope("a@b.c", "8BITMIME", True, "HDRS", "x+2By"))


@pytest.mark.parametrize("argument", ["-1", "x", "", "5 LAST LAST", "5 FIRST", "0x10", "1e3"])
def test_bad_bdat(argument: str) -> None:
    assert smtp.parse_bdat(argument) is None


@pytest.mark.parametrize(
    "octets", [b"999 x\r\n", b"25\r\n", b"250-a\r\n251 b\r\n", b"\0\r\n", b"x" * 5000, b"250-x\r\n" * 5000, b"250 \0\r\n"]
)
def test_hostile_replies_are_errors(octets: bytes) -> None:
    with pytest.raises(ReplyError):
        read_replies([octets])


@given(some.lists(some.integers(0, 1000), max_size=6))
def test_replies_are_the_same_for_every_chunking(places: list[int]) -> None:
    stream = b"250-first\r\n250 2.1.0 last\r\n354 go\r\n550 5.1.1 no\r\n"
    replies = read_replies(cut(stream, places))
    assert [reply.code for reply in replies] == [250, 354, 550]
    assert replies[2].enhanced == "5.1.1"


@given(some.binary(max_size=600))
def test_proxy_headers_never_crash(data: bytes) -> None:
    for start in (b"PROXY ", b"\r\n\r\n\0\r\nQUIT\n", b""):
        try:
            parse_proxy(start + data)
        except ProxyError:
            pass


def test_proxy_headers() -> None:
    assert parse_proxy(b"PROXY TCP4 192.0.2.1 192.0.2.2 5 25\r\nEHLO") == (("192.0.2.1", 5), 37)
    assert parse_proxy(b"PROXY UNKNOWN\r\n") == (None, 15)
    version_2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c" + bytes([192, 0, 2, 1, 192, 0, 2, 2, 0, 5, 0, 25])
    assert parse_proxy(version_2) == (("192.0.2.1", 5), 28)
    assert parse_proxy(version_2[:20]) is None


@pytest.mark.parametrize("text", ["0", "-1", "99999999999999999999", "x", "1 2", "+1", "¹", ""])
def test_pop3_numbers_are_not_guessed(text: str) -> None:
    assert pop3.parse_number(text, 1) is None


def test_pop3_pass_keeps_blanks() -> None:
    assert pop3.parse_command(b"pass a b  c") == pop3.Command("PASS", ["a b  c"])


@given(some.binary(max_size=300), some.integers(0, 20))
def test_top_is_a_prefix(message: bytes, lines: int) -> None:
    assert message.startswith(pop3.TopReader(lines).feed(message))


@given(nasty, some.integers(0, 5), some.lists(some.integers(0, 200), max_size=6))
def test_top_is_header_and_lines_whatever_the_pieces(body: bytes, lines: int, places: list[int]) -> None:
    head = b"A: b\r\n\r\n"
    reader = pop3.TopReader(lines)
    found = b"".join(reader.feed(piece) for piece in cut(head + body, places))
    kept = body.split(b"\n")
    wanted = b"\n".join(kept[:lines]) + (b"\n" if lines else b"") if len(kept) > lines else body
    assert found == head + wanted


@given(nasty, some.lists(some.integers(0, 200), max_size=6))
def test_text_in_chunks_is_stored_as_the_same_text_behind_data(text: bytes, places: list[int]) -> None:
    ends = LineEnds(False)
    found = b"".join(ends.feed(piece) for piece in cut(text, places)) + ends.end()
    assert found.count(b"\n") == found.count(b"\r\n")
    assert found.endswith(b"\r\n") or not found
    writer = DotWriter()
    sent = writer.feed(found) + writer.end()
    assert len(sent) - 3 == len(found) + (b"\r\n" + found).count(b"\r\n."), "what LIST says is what RETR sends"
    assert ends.plain == (b"\r\n." not in b"\r\n" + found)


@given(nasty, some.lists(some.integers(0, 200), max_size=6))
def test_binary_chunks_stay_as_they_are(octets: bytes, places: list[int]) -> None:
    ends = LineEnds(True)
    assert b"".join(ends.feed(piece) for piece in cut(octets, places)) + ends.end() == octets


@given(nasty, some.booleans(), some.lists(some.integers(0, 200), max_size=6), some.lists(some.integers(0, 200), max_size=6))
def test_list_says_what_retr_and_top_send(body: bytes, binary: bool, came: list[int], read: list[int]) -> None:
    """Whatever line ends came, in whatever pieces, in text and in binary; by both ways of sending."""
    trace = b"Received: from x\r\n"
    ends = LineEnds(binary)
    stored = trace + b"".join(ends.feed(piece) for piece in cut(body, came)) + ends.end()
    listed = len(stored) + ends.added
    assert binary or not ends.added
    top, retr, topped = pop3.TopReader(10**6), DotWriter(), DotWriter()
    sent = b"".join(retr.feed(piece) for piece in cut(stored, read)) + retr.end()
    shown = b"".join(topped.feed(top.feed(piece)) for piece in cut(stored, read)) + topped.end()
    assert sent == stuff(stored) == shown
    read_back, rest, ended = read_dots([sent])
    assert ended and rest == b"" and len(read_back) == listed


@given(nasty, some.integers(0, 5), some.lists(some.integers(0, 200), max_size=6))
def test_top_of_a_binary_message_is_that_of_its_text(body: bytes, lines: int, places: list[int]) -> None:
    """With LF alone its header has no end that is CRLF CRLF."""
    raw = b"A: b\n\n" + body
    writer = DotWriter()
    text = DotReader().feed(writer.feed(raw) + writer.end())[0]
    one, other, sent = pop3.TopReader(lines), pop3.TopReader(lines), DotWriter()
    top = DotReader().feed(b"".join(sent.feed(one.feed(piece)) for piece in cut(raw, places)) + sent.end())[0]
    assert top == other.feed(text)


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("::FFFF:c000:0201", "192.0.2.1"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1"),
        ("192.0.2.1", "192.0.2.1"),
        ("local", "local"),
    ],
)
def test_a_client_address_has_one_form(given: str, plain: str) -> None:
    assert plain_address(given) == plain


def test_a_mapped_client_behind_a_proxy_is_the_ipv4_client() -> None:
    parsed = parse_proxy(b"PROXY TCP6 ::ffff:192.0.2.9 ::1 5 25\r\n")
    assert parsed is not None
    assert parsed[0] == ("192.0.2.9", 5)
    assert literal("192.0.2.9") == "[192.0.2.9]"
    assert literal("2001:db8::1") == "[IPv6:2001:db8::1]"


def test_a_proxy_header_may_carry_a_kilobyte_of_tlvs() -> None:
    address = bytes([192, 0, 2, 1, 192, 0, 2, 2, 0, 5, 0, 25])
    tlvs = b"\x20\x03\x00" + b"x" * 0x300 + b"\x05\x02\x00" + b"u" * 0x200
    header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11" + (len(address) + len(tlvs)).to_bytes(2, "big") + address + tlvs
    assert parse_proxy(header + b"EHLO x\r\n") == (("192.0.2.1", 5), len(header))
    assert parse_proxy(header[:-1]) is None


@pytest.mark.parametrize(
    "octets", [b"", b"a", b"\0\0", b"a\0b", b"\0a\0", b"\0\0p", b"\0" + b"u" * 2000 + b"\0p", b"\0\xff\0p", b"a\0b\0c\0d"]
)
def test_bad_plain_messages(octets: bytes) -> None:
    with pytest.raises(sasl.SaslError):
        sasl.parse_plain(octets)


def test_limits_are_related() -> None:
    assert limits.SMTP_RECIPIENTS_MAX >= 100
    assert limits.SMTP_COMMAND_LINE_OCTETS_MAX >= 512


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        ("rfc822;a@b.cc", True),
        ("utf-8;j\u00f6rg@b\u00fccher.test", True),
        ("UTF-8;j\\x{F6}rg@b\\x{FC}cher.test", True),
        ("utf-8;a+2Bb@c.dd", True),
        ("utf-8;a\\x{0A}b@c.dd", False),
        ("utf-8;a\\x{110000}@c.dd", False),
        ("utf-8;a\u0085b@c.dd", False),
        ("utf-8;a+0Ab@c.dd", False),
        ("rfc822;j\u00f6rg@b.cc", False),
        ("utf-8;", False),
        ("utf-8;" + "\u00f6" * 300 + "@b.cc", False),
    ],
)
def test_original_recipients_beyond_ascii(value: str, taken: bool) -> None:
    parsed = smtp.parse_rcpt(f"TO:<a@b.cc> ORCPT={value}", True)
    assert isinstance(parsed, Status) is not taken
    if taken:
        assert not isinstance(parsed, Status)
        assert parsed.orcpt == value


def test_a_parameter_beyond_ascii_needs_smtputf8() -> None:
    assert smtp.parse_rcpt("TO:<a@b.cc> ORCPT=utf-8;j\u00f6rg@b.cc", False) == st.NEEDS_SMTPUTF8
