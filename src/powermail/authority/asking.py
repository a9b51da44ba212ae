"""Owns asking the authority: joining with a token, and renewing with a certificate.

Danger: a token's secret, and a request, go only to who has shown the authority that the token names, and a certificate of it
that is good now and says that it speaks for the authority of its cluster. Until then not one octet is sent but TLS's own.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable

from powermail.base import limits
from powermail.base.certificates import Untrusted, check_pinned, has_key, pin_of
from powermail.base.certificates import check_issued as check_issued_by
from powermail.base.errors import OperatorError, Trouble
from powermail.base.net import parse_host_port
from powermail.base.world import World
from powermail.wire import enrolment as forms
from powermail.wire.node_identity import Name, uri_of
from powermail.wire.node_verbs import Role


class Refusal(OperatorError):
    """The authority gives no certificate, and says why; `why` is its word."""

    def __init__(self, why: str, text: str) -> None:
        super().__init__(text)
        self.why = why


class _Line(asyncio.Protocol):
    """What came on a connection, in order; b"" when it has ended."""

    def __init__(self) -> None:
        self.came: asyncio.Queue[bytes] = asyncio.Queue()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self.came.put_nowait(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.came.put_nowait(b"")


class Joined:
    """What came of joining: the answer, and the certificate (DER) of the authority that gave it."""

    def __init__(self, issued: forms.Issued, authority: bytes) -> None:
        self.issued = issued
        self.authority = authority


async def join(
    world: World, address: str, token: forms.Token, key: bytes, request: bytes, reached_at: str = "", site: str = ""
) -> Joined:
    """Gets a certificate for `request`, made with `key` (PEM); `reached_at` is where a node is served, `site` where the machine
    stands.

    The same request may be asked again: it gets the same answer.

    Raises Refusal, OperatorError (it is not to be trusted), Trouble (it cannot be reached, or breaks off).
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the chain is checked against the pin, by us, before anything is sent
    asked = await _ask(world, address, context, token.pin, lambda machine: machine.join(token, request, reached_at, site))
    return _checked(world, asked, key)


async def renew(world: World, address: str, context: ssl.SSLContext, authority: bytes, key: bytes, request: bytes) -> Joined:
    """Gets the next certificate for the same key; `context` shows the one that there is. Raises as `join`."""
    asked = await _ask(world, address, context, pin_of(authority), lambda machine: machine.renew(request))
    return _checked(world, asked, key)


async def _ask(
    world: World, address: str, context: ssl.SSLContext, pin: str, ask: Callable[[forms.Enrolling], bytes]
) -> Joined:
    line = _Line()
    try:
        async with asyncio.timeout(limits.ENROLMENT_TIMEOUT_S):
            await world.net.connect(*parse_host_port(address), lambda: line, context, "")
            return await _talk(world, line, pin, ask)
    except forms.Broken as error:
        raise Trouble(f"what answers at {address} is no authority: {error}") from error
    except Untrusted as error:
        raise OperatorError(f"{address} is not to be trusted: {error}. Nothing was sent there") from error
    except TimeoutError as error:
        raise Trouble(f"the authority at {address} does not answer in time") from error
    except OSError as error:
        raise Trouble(f"the authority at {address} cannot be reached: {error}") from error
    finally:
        if line.transport is not None:
            line.transport.abort()


async def _talk(world: World, line: _Line, pin: str, ask: Callable[[forms.Enrolling], bytes]) -> Joined:
    machine = forms.Enrolling()
    greeting = await _hear(line, machine)
    assert isinstance(greeting, forms.Greeting) and line.transport is not None
    shown = line.transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
    facts = check_pinned(pin, greeting.authority, shown or b"", world.clock.now())
    prefix = uri_of(Name(greeting.cluster, Role.AUTHORITY, ""))
    if not any(uri.startswith(prefix) for uri in facts.uris):
        raise Untrusted("role", f"who answers is a member of the cluster, and not its authority ({', '.join(facts.uris)})")
    machine.trust()
    line.transport.write(ask(machine))
    answer = await _hear(line, machine)
    assert not isinstance(answer, forms.Greeting)
    if isinstance(answer, forms.Refused):
        if answer.why == "trouble":
            raise Trouble(f"the authority gives no certificate: {answer.text}")
        raise Refusal(answer.why, f"the authority gives no certificate: {answer.text}")
    return Joined(answer, greeting.authority)


async def _hear(line: _Line, machine: forms.Enrolling) -> forms.Greeting | forms.Answer:
    while True:
        octets = await line.came.get()
        if not octets:
            raise ConnectionResetError("the connection ended before the answer")
        if (heard := machine.feed(octets)) is not None:
            return heard


def _checked(world: World, joined: Joined, key: bytes) -> Joined:
    """What was given is for our key and of the authority. Raises OperatorError."""
    try:
        check_issued_by(joined.issued.certificate, joined.authority, world.clock.now())
        ours = has_key(joined.issued.certificate, key)
    except (Untrusted, ValueError) as error:
        raise OperatorError(f"the certificate that came is of no use: {error}") from error
    if not ours:
        raise OperatorError("the certificate that came is for another key than was asked for")
    return joined
