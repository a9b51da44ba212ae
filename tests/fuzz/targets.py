"""What is fuzzed: every parser of foreign octets, each with what must hold for any input.

A target takes octets and raises only when a promise is broken. `make fuzz` drives them by coverage; the tests drive each
with a few hundred random inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import msgspec

from powermail.base import limits
from powermail.base.digest import hash_octets
from powermail.base.errors import OperatorError
from powermail.base.settings import load
from powermail.delivery.srs import Rewriter, SrsError
from powermail.delivery.submission import Submission
from powermail.directory import password
from powermail.keeper import checkpoint_form as form
from powermail.mail import header
from powermail.mail import status as st
from powermail.mail.address import Address, AddressError, is_hello_name, parse, parse_canonical, parse_path
from powermail.mail.dsn import is_xtext, printable
from powermail.mail.envelope import Commit, Peer
from powermail.mail.mailboxes import parse_list
from powermail.mail.status import Status
from powermail.storage.log import record as rec
from powermail.wire import pop3, sasl, smtp
from powermail.wire.buffer import BareLineEnd, InputBuffer, LineTooLong
from powermail.wire.dot import DotReader, DotWriter, stuff
from powermail.wire.proxy import ProxyError, parse_proxy
from powermail.wire.smtp import MailCommand, RcptCommand
from powermail.wire.smtp_client import SmtpClient, Verb
from powermail.wire.smtp_events import Begin, Body, Close, End, Login, Response, StartTls
from powermail.wire.smtp_server import SmtpServer
from powermail.wire.smtp_table import Kind, Offer, State
from tests.fuzz.enrolment_targets import enrolment, strangers
from tests.fuzz.node_targets import certificate_names, chunk_frames, node_answers, node_asks

Target = Callable[[bytes], None]
_CODEC = rec.Codec(b"salt" * 8)
_REWRITER = Rewriter("ours.example", [b"key"])


def _cut(data: bytes) -> tuple[bytes, list[bytes]]:
    """The first octet says how the rest is cut."""
    if not data:
        return b"", [b""]
    size, rest = data[0] % 7 + 1, data[1:]
    edges = [*range(0, len(rest), size), len(rest)]
    return rest, [rest[a:b] for a, b in pairwise(edges)]


def _is_safe(text: str) -> None:
    assert not any(ord(c) < 32 or ord(c) == 127 for c in text), text


def addresses(data: bytes) -> None:
    """What parses has no control character, survives formatting, and is its own canonical form."""
    text = data.decode("utf-8", "replace")
    try:
        address = parse(text)
    except AddressError:
        pass
    else:
        _is_safe(address.text)
        assert parse(address.text) == address
        assert parse_canonical(address.canonical) == address.canonical
        assert len(address.local.encode()) <= limits.LOCAL_PART_OCTETS_MAX
    try:
        path, rest = parse_path(text)
    except AddressError:
        pass
    else:
        assert text.endswith(rest)
        if path is not None:
            _is_safe(path.text)
    try:
        _is_safe(parse_canonical(text))
    except AddressError:
        pass


def smtp_commands(data: bytes) -> None:
    """Every line gives a refusal or a value whose texts can stand in a record."""
    _, argument = smtp.split_command(data)
    mail = smtp.parse_mail(argument)
    if not isinstance(mail, Status):
        for text in (mail.envelope.envid, mail.envelope.ret, mail.envelope.body):
            _is_safe(text)
        assert mail.size >= 0
    rcpt = smtp.parse_rcpt(argument, True)
    if not isinstance(rcpt, Status):
        for text in (rcpt.notify, rcpt.orcpt, rcpt.address.text):
            _is_safe(text)
    size = smtp.parse_bdat(argument)
    assert size is None or 0 <= size[0] < 10**18
    if is_hello_name(argument):
        field = header.received_field(Peer(argument, argument, "ESMTP", argument), "host", b"k" * 16, "date", "")
        assert b"\r\n" not in field.replace(b"\r\n\t", b"")[:-2]


def smtp_sessions(data: bytes) -> None:
    """A whole session gives the same replies and the same messages for every chunking of what the client says."""
    rest, pieces = _cut(data)
    for kind in Kind:
        whole, parts = _smtp_session(kind, [rest]), _smtp_session(kind, pieces)
        assert whole == parts, (kind, whole, parts)


def _smtp_session(kind: Kind, pieces: list[bytes]) -> tuple[bytes, list[bytes]]:
    """The replies, and the octets of each message that was complete; the session says yes to everything."""
    machine = SmtpServer(kind, Offer("host.example", 1000, 100, True, ("PLAIN", "LOGIN")))
    machine.trusted = True
    machine.greet("hello")
    sent, messages, body = machine.to_send(), list[bytes](), b""
    for piece in pieces:
        machine.receive(piece)
        while (event := machine.next_event()) is not None:
            match event:
                case MailCommand():
                    machine.answer(st.SENDER_OK)
                case RcptCommand():
                    machine.answer(st.RECIPIENT_OK if event.address.local != "no" else st.UNKNOWN_RECIPIENT)
                case Begin():
                    body = b""
                    machine.answer(st.START_INPUT)
                case Body():
                    body += event.octets
                case End():
                    assert not event.plain or stuff(body) == body + b".\r\n"
                    messages.append(body)
                    machine.answer(st.DELIVERED)
                case Login():
                    machine.challenge("")
                case Response():
                    machine.answer(st.AUTH_FAILED if event.text == "!" else st.LOGGED_IN)
                case StartTls():
                    machine.answer(st.DIRECTORY_TROUBLE)
                case Close():
                    return sent + machine.to_send(), messages
        sent += machine.to_send()
        assert machine.state in State
    assert b"\n" not in sent.replace(b"\r\n", b"")
    return sent, messages


def lines(data: bytes) -> None:
    """A line buffer gives the same for every chunking."""
    rest, pieces = _cut(data)
    assert _lines([rest]) == _lines(pieces)


def _lines(pieces: list[bytes]) -> list[object]:
    buffer, found = InputBuffer(), list[object]()
    for piece in pieces:
        buffer.feed(piece)
        while True:
            try:
                line = buffer.line(40)
            except LineTooLong:
                found.append("too long")
                continue
            except BareLineEnd as error:
                found.append(("bare", error.args[0]))
                continue
            if line is None:
                break
            assert b"\n" not in line and b"\r" not in line and b"\0" not in line
            found.append(line)
        assert len(buffer) <= 40 + len(piece)
    return found


def dots(data: bytes) -> None:
    """The end of data is found at the same octet for every chunking, and only at CRLF.CRLF."""
    rest, pieces = _cut(data)
    whole, parts = _dots([rest]), _dots(pieces)
    assert whole == parts
    message, _, done = whole
    assert done == (b"\r\n.\r\n" in b"\r\n" + rest)
    assert message.count(b"\n") == message.count(b"\r\n")


def _dots(pieces: list[bytes]) -> tuple[bytes, bytes, bool]:
    reader, message, following, done = DotReader(), b"", b"", False
    for piece in pieces:
        if done:
            following += piece
            continue
        body, behind, done = reader.feed(piece)
        message += body
        following += behind
    if done and reader.plain:
        assert stuff(message) == message + b".\r\n", "what is called plain can be sent as it is"
    return message, following, done


def stuffing(data: bytes) -> None:
    """What is sent has one end, only CRLF line ends, and is read back."""
    rest, pieces = _cut(data)
    for clean in (False, True):
        writer = DotWriter(clean_cr=clean)
        sent = b"".join(writer.feed(piece) for piece in pieces) + writer.end()
        assert sent.count(b"\n") == sent.count(b"\r\n")
        if clean:
            assert sent.count(b"\r") == sent.count(b"\r\n")
        assert (b"\r\n" + sent).find(b"\r\n.\r\n") == len(sent) - 3
    assert _dots([stuff(rest)])[2] and _dots([stuff(rest)])[1] == b""


def proxy_headers(data: bytes) -> None:
    """A header is refused, incomplete, or uses no more octets than there are."""
    try:
        parsed = parse_proxy(data)
    except ProxyError:
        return
    assert parsed is None or 0 < parsed[1] <= len(data)


def sasl_messages(data: bytes) -> None:
    """Credentials are short text or refused."""
    for read in (lambda: sasl.parse_plain(data), lambda: (sasl.credential(data),), lambda: (sasl.scram_user(data.decode()),)):
        try:
            words = read()
        except (sasl.SaslError, UnicodeDecodeError):
            continue
        assert all(isinstance(word, str) for word in words)
    try:
        sasl.decode(data.decode("ascii", "replace"))
    except sasl.SaslError:
        pass


def pop3_commands(data: bytes) -> None:
    """Numbers are plain; TOP is a prefix."""
    command = pop3.parse_command(data)
    for state in pop3.State:
        pop3.check_command(command, state)
    for word in command.arguments:
        number = pop3.parse_number(word, 0)
        assert number is None or str(number) == (word.lstrip("0") or "0")
    if data:
        _, pieces = _cut(data)
        whole = pop3.TopReader(data[0] % 4)
        reader = pop3.TopReader(data[0] % 4)
        found = b"".join(reader.feed(piece) for piece in pieces)
        assert whole.feed(data[1:]) == found
        assert data[1:].startswith(found)


def replies(data: bytes) -> None:
    """A hostile next hop gives the same replies for every chunking, bounded, or an error."""
    rest, pieces = _cut(data)
    assert _replies([rest]) == _replies(pieces)


def _replies(pieces: list[bytes]) -> list[object]:
    """What a session takes them for: it has said hello and waits for MAIL and RCPT."""
    machine, found = SmtpClient(), list[object]()
    machine.receive(b"220 hop\r\n")
    machine.ask(Verb.EHLO, "here")
    machine.receive(b"250 hop\r\n")
    machine.ask(Verb.MAIL, "FROM:<a@b>")
    machine.ask(Verb.RCPT, "TO:<c@d>")
    for piece in pieces:
        for verb, reply in machine.receive(piece):
            assert 100 <= reply.code < 600
            assert reply.enhanced.isascii()
            assert "\n" not in reply.enhanced and len(printable(reply.text)) <= 400
            _is_safe(printable(reply.text))
            found += [verb, reply]
    return [*found, machine.end, machine.state, machine.clean]


def log_records(data: bytes) -> None:
    """No octets pass for a record without its checksum; walking ends and covers no octet twice."""
    base = rec.SEGMENT_HEADER_OCTETS
    octets = data + b"".join(_CODEC.pack(rec.Record(rec.CHUNK, 0, 0, b"k" * 16, data[:50]), 1, base + (len(data) + 7 & -8)))
    octets = data.ljust(len(data) + 7 & -8, b"\0") + octets[len(data) :]
    position, good = base, 0
    for offset, record, room in _CODEC.walk(octets, 1, base):
        assert offset >= position and room > 0
        position = offset + room
        good += record is not None
    assert good == 1, "what lies behind damage is found, and nothing else"
    try:
        rec.unpack_segment_header(data)
    except rec.BadRecord:
        pass


def headers(data: bytes) -> None:
    """Hops are counted in the header, which is a prefix."""
    head = header.header_of(data)
    assert data.startswith(head)
    assert 0 <= header.count_received(data) <= len(data)
    text = data.decode("utf-8", "replace")
    word = header.safe_word(text)
    assert not any(c in word for c in '\r\n()<>";, ')
    if is_xtext(text):
        _is_safe(text)
    _is_safe(printable(text))


def return_addresses(data: bytes) -> None:
    """A forged SRS address is refused; what we rewrite is undone to the same."""
    text = data.decode("utf-8", "replace")
    try:
        address = parse(text)
    except AddressError:
        return
    try:
        _REWRITER.reverse(address, 1e9)
    except SrsError:
        pass
    rewritten, original = _REWRITER.forward(text, 1e9)
    parsed = parse(rewritten)
    if original:
        assert original == text and len(parsed.local.encode()) <= 64
    elif _REWRITER.is_ours(parsed) and rewritten != text and not address.local[:5].upper().startswith(("SRS0=", "SRS1=")):
        assert parse(_REWRITER.reverse(parsed, 1e9)) == address


def stored_records(data: bytes) -> None:
    """Commit records and checkpoints of a damaged or newer node are read or refused."""
    try:
        Commit.parse(data)
    except msgspec.DecodeError:
        pass
    for read in (
        lambda: form.decode_head(data),
        lambda: form.decode_whole([data]),
        lambda: form.decode_tail([data]),
        lambda: form.decode_queue(data),
        lambda: form.decode_first(data),
    ):
        try:
            read()
        except form.BadRecord:
            continue


def originators(data: bytes) -> None:
    """A list of authors is read or refused; what is read are addresses. A submitted header is the same for every chunking."""
    try:
        found = parse_list(data.decode("utf-8", "replace"))
    except AddressError:
        pass
    else:
        assert all(parse(address.text) == address for address in found)
    rest, pieces = _cut(data)
    assert _submitted([rest]) == _submitted(pieces)


def _submitted(pieces: list[bytes]) -> tuple[bytes, object, list[Address]]:
    submission = Submission("a@b.cc", "today", "1@host")
    octets = b"".join([submission.feed(piece) for piece in pieces]) + submission.end()
    return octets, submission.refusal, submission.authors


def settings_files(data: bytes) -> None:
    """A settings file is read or refused with one clear error."""
    try:
        load(data.decode("utf-8", "replace"), {}, [])
    except OperatorError as error:
        assert str(error)


def stored_passwords(data: bytes) -> None:
    """A row's password of any form admits nobody by accident, and never raises."""
    stored = data.decode("utf-8", "replace")
    scheme, _, rest = password.parse_stored(stored)
    if scheme in ("plain", "md5", "") or not rest:
        assert password.judge(stored, "\1" + stored) is not None


def digests(data: bytes) -> None:
    """Feeding a hash in slices is feeding it at once."""
    import hashlib

    one, other = hashlib.sha256(), hashlib.sha256()
    one.update(data * 9)
    hash_octets(other, data * 9)
    assert one.digest() == other.digest()


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (
        addresses,
        smtp_commands,
        smtp_sessions,
        originators,
        lines,
        dots,
        stuffing,
        proxy_headers,
        sasl_messages,
        pop3_commands,
        replies,
        log_records,
        headers,
        return_addresses,
        stored_records,
        settings_files,
        stored_passwords,
        digests,
        node_asks,
        node_answers,
        certificate_names,
        chunk_frames,
        enrolment,
        strangers,
    )
}
