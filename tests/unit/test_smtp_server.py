"""The SMTP machine without a socket: order, capabilities, errors, TLS and messages."""

from __future__ import annotations

import pytest

from powermail.base import limits
from powermail.mail import status as st
from powermail.wire.smtp import CAPABILITIES, MailCommand, RcptCommand
from powermail.wire.smtp_events import Aborted, Begin, Body, Close, End, Login, Response, StartTls
from powermail.wire.smtp_server import SmtpServer
from powermail.wire.smtp_table import COMMANDS, Kind, Offer, State

OFFER = Offer("host.example", 1000, 100, True, ("PLAIN", "LOGIN"))


class Side:
    """A machine, and a session that says yes unless it is told otherwise."""

    def __init__(self, kind: Kind = Kind.SMTP, offer: Offer = OFFER) -> None:
        self.machine = SmtpServer(kind, offer)
        self.machine.greet("hello")
        self.machine.to_send()
        self.messages: list[bytes] = []
        self.seen: list[str] = []
        self._body = b""

    def say(self, octets: bytes) -> list[str]:
        """The replies to these octets."""
        machine = self.machine
        machine.receive(octets)
        while (event := machine.next_event()) is not None:
            self.seen.append(type(event).__name__)
            match event:
                case MailCommand():
                    machine.answer(st.SENDER_OK)
                case RcptCommand():
                    machine.answer(st.RECIPIENT_OK if event.address.local != "no" else st.UNKNOWN_RECIPIENT)
                case Begin():
                    self._body = b""
                    machine.answer(st.START_INPUT)
                case Body():
                    self._body += event.octets
                case End():
                    self.messages.append(self._body)
                    machine.answer(st.DELIVERED)
                case StartTls():
                    machine.answer(st.START_TLS)
                    machine.secured()
                case Login():
                    machine.challenge("")
                case Response():
                    machine.answer(st.LOGGED_IN if event.text == "yes" else st.AUTH_FAILED)
                case Close():
                    break
        return machine.to_send().decode().splitlines()

    def codes(self, octets: bytes) -> list[int]:
        """The codes of the last lines of replies."""
        return [int(line[:3]) for line in self.say(octets) if line[3:4] == " "]


def test_every_command_of_the_table_is_reachable_and_leads_where_it_says() -> None:
    for verb, rule in COMMANDS.items():
        assert rule.before <= set(State), verb
        assert rule.before, verb
    assert {rule.capability for rule in COMMANDS.values()} - {""} <= {each.name for each in CAPABILITIES}


@pytest.mark.parametrize("verb", [verb for verb, rule in COMMANDS.items() if rule.after is not None])
def test_a_command_leads_where_the_table_says(verb: str) -> None:
    before = {"MAIL": b"", "RCPT": b"MAIL FROM:<a@b.cc>\r\n"}
    taken = b"MAIL FROM:<a@b.cc>\r\nRCPT TO:<a@b.cc>\r\n"
    said = {
        "EHLO": b"EHLO y",
        "HELO": b"HELO y",
        "LHLO": b"LHLO y",
        "MAIL": b"MAIL FROM:<a@b.cc>",
        "RCPT": b"RCPT TO:<a@b.cc>",
        "BDAT": b"BDAT 5",
    }
    for kind in Kind:
        if not COMMANDS[verb].lmtp.met(kind is Kind.LMTP):
            continue
        side = Side(kind)
        side.machine.logged_in = kind is Kind.SUBMISSION
        side.say(b"LHLO x\r\n" if kind is Kind.LMTP else b"EHLO x\r\n")
        if verb not in ("STARTTLS",):
            side.say(before.get(verb, taken))
        side.say(said.get(verb, verb.encode()) + b"\r\n")
        assert side.machine.state is COMMANDS[verb].after, kind


@pytest.mark.parametrize("verb", [verb for verb, rule in COMMANDS.items() if State.START not in rule.before])
def test_before_a_greeting_it_is_out_of_sequence(verb: str) -> None:
    argument = {"MAIL": " FROM:<a@b.cc>", "RCPT": " TO:<a@b.cc>", "BDAT": " 0 LAST", "AUTH": " PLAIN"}.get(verb, "")
    assert Side(Kind.SUBMISSION).codes(f"{verb}{argument}\r\n".encode()) == [503]


@pytest.mark.parametrize("verb", ["DATA", "RSET", "QUIT", "STARTTLS"])
def test_an_argument_where_none_belongs(verb: str) -> None:
    side = Side()
    side.say(b"EHLO x\r\nMAIL FROM:<a@b.cc>\r\nRCPT TO:<a@b.cc>\r\n" if verb == "DATA" else b"EHLO x\r\n")
    assert side.codes(f"{verb} now\r\n".encode()) == [501]


def test_what_is_offered_depends_on_tls_and_login() -> None:
    side = Side(Kind.SUBMISSION)
    clear = side.say(b"EHLO x\r\n")
    assert "250 STARTTLS" in clear
    assert not any("AUTH" in line for line in clear)
    assert side.codes(b"AUTH PLAIN\r\n") == [538]
    side.say(b"STARTTLS\r\n")
    secret = side.say(b"EHLO x\r\n")
    assert "250 AUTH PLAIN LOGIN" in secret
    assert not any("STARTTLS" in line for line in secret)
    assert side.codes(b"MAIL FROM:<a@b.cc>\r\nAUTH PLAIN yes\r\nyes\r\n") == [530, 334, 235]
    assert not any("AUTH" in line for line in side.say(b"EHLO x\r\n"))
    assert side.codes(b"AUTH PLAIN\r\n") == [503]


def test_who_is_trusted_logs_in_without_tls() -> None:
    side = Side(Kind.SUBMISSION)
    side.machine.trusted = True
    assert "250 AUTH PLAIN LOGIN" in side.say(b"EHLO x\r\n")
    assert side.codes(b"AUTH PLAIN\r\nyes\r\n") == [334, 235]


@pytest.mark.parametrize("behind", [b"NOOP\r\n", b"MAIL FROM:<a@b.cc>\r\n", b"EHLO y\r\n", b"NO", b"\r\n"])
def test_what_stands_behind_starttls_in_clear_is_thrown_away(behind: bytes) -> None:
    side = Side()
    side.say(b"EHLO x\r\n")
    assert side.codes(b"STARTTLS\r\n" + behind) == [220]
    assert side.machine.state is State.START
    assert side.codes(b"OP\r\n") == [500]
    assert side.codes(b"MAIL FROM:<a@b.cc>\r\n") == [503]


def test_good_mail_makes_up_for_errors() -> None:
    """A peer that sends good mail over one connection for days, with an unknown recipient now and then, is not cut off."""
    side = Side()
    side.say(b"EHLO x\r\n")
    for _ in range(3):
        for _ in range(limits.SMTP_ERRORS_MAX - 1):
            assert side.codes(b"JUNK\r\n") == [500]
        assert side.codes(b"MAIL FROM:<a@b.cc>\r\nRCPT TO:<a@b.cc>\r\nDATA\r\nx\r\n.\r\n")[-1] == 250
    assert side.codes(b"JUNK\r\n" * limits.SMTP_ERRORS_MAX)[-1] == 421
    assert side.codes(b"NOOP\r\n") == []


def test_unknown_recipients_count_and_temporary_refusals_do_not() -> None:
    side = Side()
    side.say(b"EHLO x\r\nMAIL FROM:<a@b.cc>\r\n")
    assert side.codes(b"RCPT TO:<no@b.cc>\r\n" * limits.SMTP_ERRORS_MAX)[-1] == 421
    machine = SmtpServer(Kind.SMTP, OFFER)
    machine.greet("hello")
    machine.receive(b"EHLO x\r\nMAIL FROM:<a@b.cc>\r\n")
    machine.next_event()
    machine.answer(st.SENDER_OK)
    for _ in range(2 * limits.SMTP_ERRORS_MAX):
        machine.receive(b"RCPT TO:<a@b.cc>\r\n")
        assert isinstance(machine.next_event(), RcptCommand)
        machine.answer(st.DIRECTORY_TROUBLE)
    assert machine.errors == 0


@pytest.mark.parametrize(
    "name", ["[2001:db8::1]", "[IPv6:2001:db8::1]", "[192.0.2.1]", "john's_pc", "a+b/c", "x..y", "[fe80::1%eth0]"]
)
def test_odd_names_are_taken(name: str) -> None:
    assert Side().codes(f"EHLO {name}\r\n".encode()) == [250]


@pytest.mark.parametrize("name", ["[999.1.1.1]", "[2001:db8::1", "<script>", "a(b)", "a;b", "[]"])
def test_names_that_could_break_a_field_are_not(name: str) -> None:
    assert Side().codes(f"EHLO {name}\r\n".encode()) == [501]


def test_a_refused_body_is_thrown_away_to_its_end() -> None:
    for kind, count in ((Kind.SMTP, 1), (Kind.LMTP, 2)):
        machine = SmtpServer(kind, OFFER)
        machine.greet("hello")
        machine.receive(b"LHLO x\r\n" if kind is Kind.LMTP else b"EHLO x\r\n")
        machine.receive(b"MAIL FROM:<a@b.cc>\r\nRCPT TO:<a@b.cc>\r\nRCPT TO:<b@b.cc>\r\nDATA\r\nbody\r\n")
        for _ in range(3):
            assert machine.next_event() is not None
            machine.answer(st.OK)
        assert isinstance(machine.next_event(), Begin)
        machine.answer(st.START_INPUT)
        assert isinstance(machine.next_event(), Body)
        machine.refuse(st.TOO_LARGE)
        machine.to_send()
        machine.receive(b"MAIL FROM:<evil@b.cc>\r\n.\r\nNOOP\r\n")
        assert machine.next_event() is None
        assert [line[:3] for line in machine.to_send().split(b"\r\n")] == [b"552"] * count + [b"250", b""]


def test_a_message_that_is_not_begun_costs_its_chunk_only() -> None:
    machine = SmtpServer(Kind.SMTP, OFFER)
    machine.greet("hello")
    machine.receive(b"EHLO x\r\nMAIL FROM:<a@b.cc>\r\nRCPT TO:<a@b.cc>\r\nBDAT 12\r\nQUIT\r\nQUIT\r\nNOOP\r\n")
    for _ in range(2):
        machine.next_event()
        machine.answer(st.OK)
    assert isinstance(machine.next_event(), Begin)
    machine.to_send()
    machine.answer(st.NOT_REDUNDANT)
    assert machine.next_event() is None
    assert [line[:3] for line in machine.to_send().split(b"\r\n")] == [b"451", b"250", b""]
    assert machine.state is State.READY


@pytest.mark.parametrize("end", [b"RSET\r\n", b"EHLO y\r\n", b"BDAT x\r\n"])
def test_a_message_between_chunks_is_given_up(end: bytes) -> None:
    side = Side()
    side.say(b"EHLO x\r\nMAIL FROM:<a@b.cc>\r\nRCPT TO:<a@b.cc>\r\nBDAT 3\r\nabc")
    assert side.machine.state is State.BDAT
    side.say(end)
    assert side.seen[-1] == Aborted.__name__
    assert side.codes(b"BDAT 3 LAST\r\nabc") == [503]
    assert side.messages == []


@pytest.mark.parametrize("words", ["3 LASTX", "3 x", "3 LAST LAST", "3 3", "3 LAST x", "00000000000000000000003 y"])
@pytest.mark.parametrize(
    "begun", [b"", b"MAIL FROM:<a@b.cc>\r\nRCPT TO:<a@b.cc>\r\n", b"MAIL FROM:<a@b.cc>\r\nRCPT TO:<a@b.cc>\r\nBDAT 1\r\nx"]
)
def test_the_octets_of_a_chunk_are_never_commands_whatever_stands_behind_its_size(words: str, begun: bytes) -> None:
    side = Side()
    side.say(b"EHLO x\r\n" + begun)
    codes = side.codes(f"BDAT {words}\r\n".encode() + b"Q\r\nNOOP\r\n")
    assert len(codes) == 2 and codes[0] in (501, 503) and codes[1] == 250
    assert side.messages == []


def test_a_size_may_have_zeros_in_front() -> None:
    side = Side()
    side.say(b"EHLO x\r\nMAIL FROM:<a@b.cc>\r\nRCPT TO:<a@b.cc>\r\n")
    assert side.codes(b"BDAT 00000000000000000000003 last\r\nabc") == [250]
    assert side.messages == [b"abc\r\n"]


def test_a_lone_lf_in_a_chunk_becomes_a_line_end_unless_it_is_binary() -> None:
    for body, stored in ((b"", b"a\r\nb\r\n"), (b" BODY=BINARYMIME", b"a\nb")):
        side = Side()
        side.say(b"EHLO x\r\nMAIL FROM:<a@b.cc>" + body + b"\r\nRCPT TO:<a@b.cc>\r\n")
        side.say(b"BDAT 2\r\na\nBDAT 1 LAST\r\nb")
        assert side.messages == [stored]


def test_who_speaks_first_is_sent_away() -> None:
    machine = SmtpServer(Kind.SMTP, OFFER)
    machine.receive(b"EHLO x\r\n")
    machine.greet("hello")
    assert machine.to_send().startswith(b"554")
    assert machine.next_event() == Close("early_talkers")


@pytest.mark.parametrize("octets", [b"GET / HTTP/1.1\r\n", b"\x16\x03\x01\x02\x00", b"SSH-2.0 x\r\n", b"POST /\n"])
def test_other_protocols_are_closed_at_their_first_line(octets: bytes) -> None:
    side = Side()
    assert side.codes(octets + b"EHLO x\r\n") == [554]
    assert side.machine.state is State.CLOSED


@pytest.mark.parametrize(
    "octets",
    [
        b"\x16\x03" + b"z" * 5000 + b"\r\nNOOP\r\n",
        b"z" * 5000 + b"\r\n\x16\x03",
        b"z" * 5000 + b"\x16\x03\r\nNOOP\r\n",
        b"NOOP\r\n\x16\x03\x01",
        b"z" * 9000 + b"\r\n\x16\x03" + b"z" * 9000,
    ],
)
def test_a_handshake_behind_anything_is_seen_whatever_the_chunks(octets: bytes) -> None:
    """Found by the fuzzer: whether it was taken for another protocol depended on where the octets were cut."""
    whole = Side().say(octets)
    for size in (1, 2, 7, 4095, 4096, 4097):
        side = Side()
        pieces = [octets[at : at + size] for at in range(0, len(octets), size)]
        assert [line for piece in pieces for line in side.say(piece)] == whole, size
