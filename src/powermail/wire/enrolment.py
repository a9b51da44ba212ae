"""Owns the enrolment protocol: how a machine that knows nothing but a token gets its certificate, and the next one later.

    authority → Greeting    who it is, before anybody has said anything
    machine   → Join        the token's secret and a request (PKCS #10), only when the greeting was checked against the pin
              or Renew      a request; who asks is in the certificate of its TLS connection
    authority → Issued or Refused, and the connection ends

A frame is four octets, little-endian, that say how many follow, and a msgpack array whose first element is the number of its
form (docs/peer-protocol.md, section 8). Fields are only ever appended (P19). One question a connection.

A token is `pm1.PIN.ID.SECRET`: the SHA-256 of the authority's public key, the token's id, its secret, in hex.

Danger: until `trust` nothing may be sent: whoever answers first may be anybody.
"""

from __future__ import annotations

import re
from struct import Struct as Packed
from typing import Annotated, Final, NamedTuple

import msgspec
from msgspec import Meta, Struct

from powermail.base import limits

FIRST: Final = 1  # the oldest version that this program speaks
LAST: Final = 1  # and the newest
ID_OCTETS: Final = 8
SECRET_OCTETS: Final = 16

_LENGTH: Final = Packed("<I")
_TOKEN: Final = re.compile(r"pm1\.([0-9a-f]{64})\.([0-9a-f]{16})\.([0-9a-f]{32})")
_Der = Annotated[bytes, Meta(max_length=limits.ENROLMENT_REQUEST_OCTETS_MAX)]
_Word = Annotated[str, Meta(max_length=256)]
_Text = Annotated[str, Meta(max_length=4096)]
_Number = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]


class Broken(Exception):
    """The peer does not keep to the protocol; `why` is a word for counting."""

    def __init__(self, why: str, text: str) -> None:
        super().__init__(text)
        self.why = why


# -- tokens -----------------------------------------------------------------------------------------------------------


class Token(NamedTuple):
    """What an operator carries to a new machine."""

    pin: str
    id: str
    secret: bytes


def format_token(token: Token) -> str:
    """As it is printed."""
    return f"pm1.{token.pin}.{token.id}.{token.secret.hex()}"


def parse_token(text: str) -> Token:
    """Reads one. Raises ValueError."""
    match = _TOKEN.fullmatch(text.strip())
    if match is None:
        raise ValueError("a token is `pm1.` and 114 letters and digits, as `node add` or `cluster admit` prints it")
    return Token(match[1], match[2], bytes.fromhex(match[3]))


# -- forms ------------------------------------------------------------------------------------------------------------


class Greeting(Struct, array_like=True, frozen=True, tag=1):
    """What the authority says first."""

    first: _Number  # protocol versions that it speaks
    last: _Number
    cluster: _Word
    authority: _Der  # its certificate


class Join(Struct, array_like=True, frozen=True, tag=2):
    """A machine that has a token."""

    version: _Number
    token: _Word  # its id
    secret: Annotated[bytes, Meta(max_length=64)]
    request: _Der
    address: _Word = ""  # where a node is reached, if its token does not say
    site: _Word = ""  # where the machine stands


class Renew(Struct, array_like=True, frozen=True, tag=3):
    """A machine that has a certificate, and shows it to TLS."""

    version: _Number
    request: _Der


class Issued(Struct, array_like=True, frozen=True, tag=4):
    """A certificate, and what its holder is to be. `settings` are further settings of the cluster, as TOML values by name;
    `files` what lies beside them on each front end.
    """

    certificate: _Der
    cluster: _Word
    identity: _Word
    roles: tuple[_Word, ...]
    group: _Word = ""
    priority: int = 1
    address: _Word = ""
    settings: dict[_Word, _Text] = {}
    files: dict[_Word, _Der] = {}
    site: _Word = ""


class Refused(Struct, array_like=True, frozen=True, tag=5):
    """No certificate: a word for programs, and the reason for people."""

    why: _Word
    text: _Text


Ask = Join | Renew
Answer = Issued | Refused
_ASK: Final = msgspec.msgpack.Decoder(Ask)
_GREETING: Final = msgspec.msgpack.Decoder(Greeting)
_ANSWER: Final = msgspec.msgpack.Decoder(Answer)
_ENCODER: Final = msgspec.msgpack.Encoder()


def pack(form: Greeting | Ask | Answer) -> bytes:
    """A form as it stands in a frame, and as an answer is kept with its token."""
    octets = _ENCODER.encode(form)
    assert len(octets) <= limits.ENROLMENT_FRAME_OCTETS_MAX, "what we say keeps to our own bound"
    return octets


def frame(form: Greeting | Ask | Answer) -> bytes:
    """A form as it is sent."""
    octets = pack(form)
    return _LENGTH.pack(len(octets)) + octets


def unpack_answer(octets: bytes) -> Answer:
    """An answer as it was kept."""
    answer: Answer = _ANSWER.decode(octets)
    return answer


# -- machines ---------------------------------------------------------------------------------------------------------


class _Frames:
    """Takes octets in any chunking and gives the payloads of whole frames."""

    def __init__(self) -> None:
        self._octets = bytearray()

    def feed(self, octets: bytes) -> None:
        """Takes what came. Raises Broken when it is more than a frame may have."""
        self._octets += octets
        if len(self._octets) >= _LENGTH.size and self._announced() > limits.ENROLMENT_FRAME_OCTETS_MAX:
            raise Broken("oversized", f"a frame of {self._announced()} octets")

    def _announced(self) -> int:
        length: int = _LENGTH.unpack_from(self._octets)[0]
        return length

    def take(self) -> bytes | None:
        """The next payload, if it is whole."""
        if len(self._octets) < _LENGTH.size or len(self._octets) < _LENGTH.size + self._announced():
            return None
        end = _LENGTH.size + self._announced()
        payload = bytes(self._octets[_LENGTH.size : end])
        del self._octets[:end]
        return payload

    @property
    def rest(self) -> int:
        """Octets that no frame was made of yet."""
        return len(self._octets)


class Registering:
    """The authority's end: one question, and nothing behind it."""

    def __init__(self) -> None:
        self._frames = _Frames()
        self._asked = False

    def feed(self, octets: bytes) -> Ask | None:
        """Takes what came; the question, when it is whole. Raises Broken."""
        if self._asked:
            raise Broken("order", "a second question")
        self._frames.feed(octets)
        payload = self._frames.take()
        if payload is None:
            return None
        self._asked = True
        if self._frames.rest:
            raise Broken("order", "a second question")
        try:
            ask: Ask = _ASK.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Broken("malformed", f"a question that cannot be read: {error}") from error
        if not FIRST <= ask.version <= LAST:
            raise Broken("version", f"version {ask.version} is spoken there, and {FIRST} to {LAST} here")
        return ask


class Enrolling:
    """The machine's end. It hears the greeting, waits to be told that it may be trusted, asks once, hears the answer."""

    def __init__(self) -> None:
        self._frames = _Frames()
        self._greeting: Greeting | None = None
        self._trusted = False
        self._asked = False
        self._answered = False

    def feed(self, octets: bytes) -> Greeting | Answer | None:
        """Takes what came; what is whole by it. Raises Broken."""
        self._frames.feed(octets)
        payload = self._frames.take()
        if payload is None:
            return None
        try:
            if self._greeting is None:
                self._greeting = _GREETING.decode(payload)
                if self._greeting.last < FIRST or self._greeting.first > LAST:
                    theirs = f"{self._greeting.first} to {self._greeting.last}"
                    raise Broken("version", f"version {theirs} is spoken there, and {FIRST} to {LAST} here")
                if self._frames.rest:
                    raise Broken("order", "an answer before anything was asked")
                return self._greeting
            if not self._asked or self._answered or self._frames.rest:
                raise Broken("order", "an answer to nothing that was asked")
            self._answered = True
            return unpack_answer(payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Broken("malformed", f"an answer that cannot be read: {error}") from error

    def trust(self) -> None:
        """The greeting and the certificate of the connection were checked."""
        assert self._greeting is not None
        self._trusted = True

    def join(self, token: Token, request: bytes, address: str = "", site: str = "") -> bytes:
        """Asks for a certificate with a token; what is to be sent."""
        return self._ask(Join(self._version(), token.id, token.secret, request, address, site))

    def renew(self, request: bytes) -> bytes:
        """Asks for the next certificate; what is to be sent."""
        return self._ask(Renew(self._version(), request))

    def _version(self) -> int:
        assert self._greeting is not None
        return min(LAST, self._greeting.last)

    def _ask(self, ask: Ask) -> bytes:
        assert self._trusted and not self._asked, "nothing is sent to who may be anybody, and nothing twice"
        self._asked = True
        return frame(ask)
