"""Owns the server's side of SMTP, submission and LMTP as a machine: octets in, events out, replies gathered.

It never waits, reads no clock, and gives the same events and replies for every chunking of its input. Grammar, order of
commands, TLS, login, pipelining, the budget of errors and the end of a message are its; who exists and what may be stored is
the session's, which is asked by an event:

    event                                the session then calls
    MailCommand, RcptCommand             answer
    StartTls                             answer; after 220 and the handshake, `secured`
    Login                                challenge (a Response follows), and in the end answer
    Begin                                answer: START_INPUT, or why this message is not taken
    Body                                 refuse, if the rest is to be thrown away
    End                                  answer, or answer_each: in LMTP each recipient has a reply (RFC 2033 §4.2)
    Aborted                              nothing: a message was given up
    Close                                nothing: send what is there and close

Standards: RFC 5321, 2033, 2920, 3030, 3207, 4954. Danger: octets sent before a TLS handshake are dropped, and the state with
them; a refused BDAT chunk is thrown away octet by octet and never read as commands.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Final

from powermail.base import limits
from powermail.mail import status as st
from powermail.mail.address import is_hello_name
from powermail.mail.status import Status
from powermail.wire import smtp
from powermail.wire.buffer import BareLineEnd, InputBuffer, LineTooLong
from powermail.wire.dot import DotReader, LineEnds
from powermail.wire.smtp import CAPABILITIES, MailCommand, Need
from powermail.wire.smtp_events import Aborted, Begin, Body, Close, End, Event, Login, Response, StartTls
from powermail.wire.smtp_table import COMMANDS, Kind, Offer, Rule, State

_RULES: Final = {
    kind: {verb: rule for verb, rule in COMMANDS.items() if rule.lmtp.met(kind is Kind.LMTP)} for kind in Kind
}  # what is not of a door is not known there
_FREE: Final = {
    kind: {
        verb
        for verb, rule in rules.items()
        if not rule.capability and rule.tls is Need.EITHER and (rule.login is Need.EITHER or kind is not Kind.SUBMISSION)
    }
    for kind, rules in _RULES.items()
}  # commands that need nothing but their place and their argument
_START, _READY, _GIVEN = State.START, State.READY, State.MAIL  # looked up once: a member is found by a call in Python
_AWAITING: Final = frozenset(State) - {State.BODY, State.CLOSED, State.CHALLENGED}  # a command
_IN_BODY: Final = State.BODY
_OVER: Final = State.CLOSED
_LMTP: Final = Kind.LMTP
_SIMPLE: Final = {"NOOP": st.OK, "HELP": st.HELP, "VRFY": st.CANNOT_VERIFY, "EXPN": st.NOT_IMPLEMENTED}
_HELLOS: Final = frozenset({"EHLO", "HELO", "LHLO"})
_START_TLS, _BEGIN, _ABORTED = StartTls(), Begin(), Aborted()


class _Wait(Enum):
    """Nothing can be said before more octets come."""

    FOR_OCTETS = "for octets"


_WAIT: Final = _Wait.FOR_OCTETS


class SmtpServer:
    """One connection. An event that asks something is answered before the next one is taken."""

    def __init__(self, kind: Kind, offer: Offer) -> None:
        self.state = State.SILENT
        self.tls = False
        self.logged_in = False
        self.trusted = False  # may log in without TLS
        self.hello = ""
        self.extended = False
        self.accepted = 0  # recipients of the message that is being taken
        self.errors = 0  # in all
        self.refused: list[Status] = []  # what the machine refused by itself and the session has not looked at
        self._kind = kind
        self._offer = offer
        self._rules = _RULES[kind]
        self._free = _FREE[kind]
        self._buffer = InputBuffer()
        self._waiting = self._buffer.data
        self._out: list[bytes] = []
        self._budget = limits.SMTP_ERRORS_MAX
        self._transactions = 0
        self._asked: Rule | None = None  # the command that waits for its answer
        self._why = ""
        self._mail: MailCommand | None = None
        self._dots: DotReader | None = None  # reads DATA
        self._ends: LineEnds | None = None  # reads BDAT; there from the first chunk to the end of the message
        self._left = 0  # octets of the chunk
        self._last = False  # it is the last one
        self._skip = 0  # octets of a chunk that belongs to no message
        self._complete = False  # all octets of the message have come
        self._refusal: Status | None = None  # the message is thrown away, and answered so

    # -- octets in and out ----------------------------------------------------------------------------------------

    def receive(self, octets: bytes) -> None:
        """Octets of the client."""
        self._buffer.feed(octets)

    def to_send(self) -> bytes:
        """The replies that were gathered (RFC 2920 §3.2): to be sent before anything is waited for."""
        if not self._out:
            return b""
        octets = b"".join(self._out) if len(self._out) > 1 else self._out[0]
        self._out.clear()
        return octets

    @property
    def in_body(self) -> bool:
        """True while octets of a message, or of a refused chunk, are awaited."""
        return self.state is _IN_BODY or self._skip > 0

    @property
    def protocol(self) -> str:
        """How the message that is being taken comes (RFC 3848; RFC 6531 §4.3)."""
        if not self.extended:
            return "SMTP"
        base = "LMTP" if self._kind is _LMTP else "ESMTP"
        if self._mail is not None and self._mail.envelope.smtputf8:
            base = "UTF8" + base.removeprefix("E")
        return base + ("S" if self.tls else "") + ("A" if self.logged_in else "")

    # -- what the session says ------------------------------------------------------------------------------------

    def greet(self, text: str) -> None:
        """Our first line. Who has spoken before it is no mail server; LMTP peers are trusted."""
        assert self.state is State.SILENT
        if len(self._buffer) and self._kind is not Kind.LMTP:
            self.close(st.TALKED_EARLY, "early_talkers")
            return
        self._out.append(f"220 {self._offer.host} {'LMTP' if self._kind is Kind.LMTP else 'ESMTP'} {text}\r\n".encode())
        self.state = State.START

    def answer(self, status: Status) -> None:
        """The answer to the last event."""
        if self.state is _IN_BODY:
            self.answer_each([status] * self.accepted)
            return
        rule, self._asked = self._asked, None
        assert rule is not None, "nothing was asked"
        if rule is _BDAT:  # nothing is said before the end of the chunk
            assert self._mail is not None
            self._ends = LineEnds(self._mail.envelope.body == "BINARYMIME")
            self._refusal = None if status.code < 400 else status
            self.state = State.BODY
            return
        self._out.append(smtp.format_reply(status))
        if status.code < 400:
            self.state = rule.after or self.state
            self._taken(rule)
            return
        self.state = rule.refused or self.state
        if status.code == 421:
            self._end("refused")
        elif rule.counts and status.code >= 500:
            self._count()

    def _taken(self, rule: Rule) -> None:
        if rule is _RCPT:
            self.accepted += 1
        elif rule is _MAIL:
            self.accepted = 0
            self._transactions += 1
        elif rule is _DATA:
            self._dots = DotReader()
        elif rule is _AUTH:
            self.logged_in = True
        elif rule is _STARTTLS:  # RFC 3207 §4.2: everything known from before the handshake is thrown away
            if not rule.behind_kept:
                self._buffer.clear()
            self.hello, self.extended, self.logged_in = "", False, False

    def challenge(self, text: str) -> None:
        """A SASL challenge, in base64; a Response follows."""
        self._out.append(f"334 {text}\r\n".encode())
        self.state = State.CHALLENGED

    def refuse(self, status: Status) -> None:
        """Throws the rest of this message away; it is answered so when its end has come, without an End."""
        assert self.state is State.BODY
        self._refusal = status

    def secured(self) -> None:
        """The TLS handshake is done, now or before the first octet."""
        self.tls = True

    def close(self, status: Status, why: str) -> None:
        """Says something last, and ends."""
        self._out.append(smtp.format_reply(status))
        self._end(why)

    def _end(self, why: str) -> None:
        self.state = _OVER
        self._why = why
        self._skip = 0

    # -- events ---------------------------------------------------------------------------------------------------

    def next_event(self) -> Event | None:
        """What comes next; None if more octets are needed."""
        while True:
            state = self.state
            event: Event | _Wait | None
            if self._skip:
                event = self._skip_some()
            elif state in _AWAITING:
                if not self._waiting:
                    return None
                event = self._command()
            elif state is _IN_BODY:
                event = self._body()
            elif state is _OVER:
                return Close(self._why)
            else:
                event = self._response()
            if event is not None:
                return None if event is _WAIT else event

    def _command(self) -> Event | _Wait | None:
        if self.state is _START and self._buffer.begins(b"\x16\x03"):
            return self._foreign()  # a TLS handshake has no line end to wait for
        try:
            line = self._buffer.line(limits.SMTP_COMMAND_LINE_OCTETS_MAX)
        except LineTooLong:
            return self._error(st.LINE_TOO_LONG)
        except BareLineEnd as error:
            foreign = smtp.is_foreign(smtp.split_command(error.args[0])[0])
            return self._foreign() if foreign else self._error(st.UNRECOGNISED)
        if line is None:
            return _WAIT
        verb, argument = smtp.split_command(line)
        rule = self._rules.get(verb)
        if rule is None:
            return self._foreign() if smtp.is_foreign(verb) else self._error(st.UNRECOGNISED)
        refusal = self._check(verb, rule, argument)
        if rule is _BDAT:
            return self._bdat(argument, refusal)
        if refusal is not None:
            return self._error(refusal)
        if rule is _MAIL:
            return self._mail_from(argument)
        if rule is _RCPT:
            return self._rcpt_to(argument)
        if rule is _DATA:
            return self._data()
        if verb in _HELLOS:
            return self._greeted(verb, rule, argument)
        return self._other(verb, rule, argument)

    def _check(self, verb: str, rule: Rule, argument: str) -> Status | None:
        """What the table says against a command here; None if it may run."""
        if self.state not in rule.before:
            return st.BAD_SEQUENCE
        if rule.argument is not None and rule.argument is not bool(argument):
            return st.SYNTAX
        if verb in self._free:
            return None
        if rule.capability and not self._has(rule.capability):
            return st.NOT_IMPLEMENTED
        if not rule.tls.met(self.tls or (self.trusted and rule.tls is Need.ONLY)):
            return st.BAD_SEQUENCE if self.tls else st.AUTH_NEEDS_TLS
        if self._kind is Kind.SUBMISSION and not rule.login.met(self.logged_in):
            return st.BAD_SEQUENCE if self.logged_in else st.NEEDS_AUTH
        return None

    def _has(self, capability: str) -> bool:
        if capability == "STARTTLS":
            return self._offer.tls
        return capability != "AUTH" or bool(self._offer.mechanisms)

    def _error(self, status: Status) -> Event | None:
        """A refusal of the machine's own: it counts against the client."""
        self.refused.append(status)
        self._out.append(smtp.format_reply(status))
        self._count()
        return None

    def _count(self) -> None:
        self.errors += 1
        self._budget -= 1
        if self._budget <= 0:
            self.close(st.TOO_MANY_ERRORS, "errors")

    def _foreign(self) -> Event | None:
        """Another protocol's client: closed at its first line, nothing after it is looked at."""
        self.close(st.SPEAKS_OTHER, "foreign_protocol")
        return None

    def _reset(self) -> Aborted | None:
        """Forgets the transaction (RFC 5321 §4.1.1.5); the greeting stays."""
        begun = self._ends is not None
        self._ends = self._refusal = self._mail = None
        if self.state is not _START:
            self.state = _READY
        return _ABORTED if begun else None

    # -- commands -------------------------------------------------------------------------------------------------

    def _other(self, verb: str, rule: Rule, argument: str) -> Event | None:
        if verb == "QUIT":
            self.close(st.BYE, "quit")
            return None
        if verb == "RSET":
            self._out.append(smtp.format_reply(st.OK))
            return self._reset()
        if rule is _STARTTLS:
            self._asked = rule
            return _START_TLS
        if rule is _AUTH:
            mechanism, _, initial = argument.partition(" ")
            if mechanism.upper() not in self._offer.mechanisms:
                return self._error(st.AUTH_UNKNOWN)
            self._asked = rule
            return Login(mechanism.upper(), initial)
        self._out.append(smtp.format_reply(_SIMPLE[verb]))
        return None

    def _greeted(self, verb: str, rule: Rule, argument: str) -> Event | None:
        name = argument.split(" ")[0]
        if not is_hello_name(name):
            return self._error(st.HELLO_SYNTAX)
        aborted = self._reset()
        self.state = rule.after or self.state
        self.hello = name
        self.extended = verb != "HELO"
        offer = self._offer
        if not self.extended:
            self._out.append(f"250 {offer.host}\r\n".encode())
            return aborted
        words = {**offer._asdict(), "mechanisms": " ".join(offer.mechanisms)}
        lines = [
            each.line.format(**words)
            for each in CAPABILITIES
            if self._has(each.name)
            and each.tls.met(self.tls or (self.trusted and each.tls is Need.ONLY))
            and each.login.met(self.logged_in)
        ]
        self._out.append(smtp.format_ehlo(offer.host, lines))
        return aborted

    def _mail_from(self, argument: str) -> Event | None:
        if self._transactions >= limits.SMTP_TRANSACTIONS_MAX:
            self.close(st.TOO_MANY_TRANSACTIONS, "transactions")
            return None
        mail = smtp.parse_mail(argument)
        if isinstance(mail, Status):
            return self._error(mail)
        self._mail = mail
        self._asked = _MAIL
        return mail

    def _rcpt_to(self, argument: str) -> Event | None:
        assert self._mail is not None
        rcpt = smtp.parse_rcpt(argument, self._mail.envelope.smtputf8)
        if isinstance(rcpt, Status):
            return self._error(rcpt)
        self._asked = _RCPT
        return rcpt

    def _response(self) -> Response | _Wait:
        try:
            line = self._buffer.line(limits.SMTP_AUTH_LINE_OCTETS_MAX)
        except (LineTooLong, BareLineEnd):
            line = b"!"  # refused before anything is hashed (U09)
        if line is None:
            return _WAIT
        self.state = State.READY
        return Response(line.decode("ascii", "replace"))

    # -- messages -------------------------------------------------------------------------------------------------

    def _data(self) -> Event | None:
        assert self._mail is not None
        if self.state is _GIVEN:
            return self._error(st.NO_VALID_RECIPIENTS)
        if self._mail.envelope.body == "BINARYMIME":
            return self._error(st.BAD_SEQUENCE)  # RFC 3030 §3: only BDAT carries it
        self._asked = _DATA
        return _BEGIN

    def _bdat(self, argument: str, refusal: Status | None) -> Event | None:
        parsed = smtp.parse_bdat(argument)
        aborted = None
        if refusal is None and parsed is None:
            aborted, refusal = self._reset(), st.SYNTAX
        if refusal is None and self.state is State.MAIL:
            refusal = st.NO_VALID_RECIPIENTS
        if refusal is not None:
            self._error(refusal)
            if self.state is not State.CLOSED:
                self._skip = smtp.claimed_octets(argument) or 0  # exactly its octets (S33)
            return aborted
        assert parsed is not None
        self._left, self._last = parsed
        if self._ends is not None:
            self.state = State.BODY
            return None
        self._asked = _BDAT
        return _BEGIN

    def _skip_some(self) -> _Wait | None:
        octets = len(self._buffer.take(self._skip))
        self._skip -= octets
        return None if octets else _WAIT

    def _body(self) -> Event | _Wait | None:
        if self._complete:
            return self._message_ends()
        if self._dots is not None:
            if not self._waiting:
                return _WAIT
            octets, rest, self._complete = self._dots.feed(self._buffer.take_all())
            if rest:
                self._buffer.put_back(rest)
            if octets and self._refusal is None:
                return Body(octets)
            return None if self._complete else _WAIT
        assert self._ends is not None
        if self._left:
            octets = self._buffer.take(self._left)
            if not octets:
                return _WAIT
            self._left -= len(octets)
            return Body(self._ends.feed(octets)) if self._refusal is None else None
        return self._chunk_ends()

    def _chunk_ends(self) -> Body | None:
        assert self._ends is not None
        if self._last:
            self._complete = True
            tail = self._ends.end()
            return Body(tail) if tail and self._refusal is None else None
        self.state = State.BDAT
        self._out.append(smtp.format_reply(self._refusal or st.CHUNK_OK))
        if self._refusal is not None:
            self._reset()
        return None

    def _message_ends(self) -> End | None:
        if self._refusal is not None:
            self.answer_each([self._refusal] * self.accepted)
            return None
        if self._dots is not None:
            return End(self._dots.plain)
        assert self._ends is not None
        return End(self._ends.plain, self._ends.added)

    def answer_each(self, statuses: Sequence[Status]) -> None:
        """The replies to the end of a message, in order of its recipients: all of them for LMTP, the first for others."""
        assert self._complete and len(statuses) == self.accepted
        if self._kind is _LMTP:
            self._out += map(smtp.format_reply, statuses)
        else:
            self._out.append(smtp.format_reply(statuses[0]))
        if min(statuses).code < 400:  # a status begins with its code
            self._budget = limits.SMTP_ERRORS_MAX  # good mail makes up for errors
        self._dots, self._complete = None, False
        self._reset()


_MAIL, _RCPT, _DATA, _BDAT = COMMANDS["MAIL"], COMMANDS["RCPT"], COMMANDS["DATA"], COMMANDS["BDAT"]
_AUTH, _STARTTLS = COMMANDS["AUTH"], COMMANDS["STARTTLS"]
