"""Owns the life of a process's own certificate: files that changed are taken, and at two thirds of its life it is renewed.

The key stays, so that the certificate is one file, replaced in one step: whoever reads finds a pair that belongs together,
whatever was interrupted. While nobody gives the next one, the old one is good until it ends, and status says why.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from powermail.authority.asking import renew
from powermail.authority.registrar import Registrar
from powermail.base import limits
from powermail.base.certificates import as_pem, make_request
from powermail.base.errors import OperatorError, Trouble
from powermail.base.lane import Lane
from powermail.base.log import Event
from powermail.base.tls import PeerCertificate
from powermail.base.world import World
from powermail.wire import enrolment as forms
from powermail.wire.node_identity import parse_names

# From a key (PEM) and a request for it (DER) to a certificate (DER). Raises OperatorError, Trouble.
Ask = Callable[[bytes, bytes], Awaitable[bytes]]
NAME = "certificate"  # of the worker


class Renewer:
    """A worker's step."""

    def __init__(self, world: World, certificate: PeerCertificate, lane: Lane, ask: Ask | None) -> None:
        """`ask` is None where certificates are made by hand: then files are only taken when they change."""
        self._world = world
        self._certificate = certificate
        self._lane = lane
        self._ask = ask

    async def step(self) -> float:
        """Looks at the files, and renews when it is time. Raises Trouble while nobody gives the next one."""
        await self._lane.run(self._certificate.reload)
        now = self._world.clock.now()
        if self._ask is None or now < self._certificate.facts.renew_at:
            return limits.CERTIFICATE_LOOK_S
        certificate = self._certificate.paths[0]
        try:
            issued = await self._ask(*await self._lane.run(self._make_request))
        except (OperatorError, ValueError) as error:
            raise Trouble(f"the certificate is not renewed, {self._left(now)}: {error}") from error
        except Trouble as error:
            raise Trouble(f"{error}; the certificate is not renewed yet, {self._left(now)}") from error
        await self._lane.run(self._world.disk.replace_file, certificate, as_pem(issued), 0o600)
        await self._lane.run(self._certificate.reload)
        self._world.log.event(Event.CERTIFICATE, renewed=certificate, days=round(self._certificate.days_left(now), 1))
        return limits.CERTIFICATE_LOOK_S

    def _left(self, now: float) -> str:
        days = self._certificate.days_left(now)
        if days <= 0:
            return "and has ended: `powermail join` with a new token of `node add` or `cluster admit` gets another"
        return f"and ends in {days:.1f} days"

    def _make_request(self) -> tuple[bytes, bytes]:
        key = self._world.disk.read_file(self._certificate.paths[1])
        return key, make_request(key)


def by_network(world: World, certificate: PeerCertificate, addresses: Sequence[str]) -> Ask:
    """Asks the authority at the first of these addresses that answers."""

    async def ask(key: bytes, request: bytes) -> bytes:
        troubles = []
        for address in addresses:
            try:
                joined = await renew(world, address, certificate.client(), certificate.authority, key, request)
                return joined.issued.certificate
            except Trouble as error:
                troubles.append(str(error))
        raise Trouble("; ".join(troubles))

    return ask


def by_registrar(registrar: Registrar, certificate: PeerCertificate) -> Ask:
    """Asks the authority of this process."""

    async def ask(key: bytes, request: bytes) -> bytes:
        names = parse_names([("URI", uri) for uri in certificate.facts.uris])
        answer = await registrar.answer(forms.Renew(forms.LAST, request), names, "")
        if isinstance(answer, forms.Refused):
            raise Trouble(answer.text)
        return answer.certificate

    return ask
