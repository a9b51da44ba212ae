"""Owns the listener that gives certificates: TLS first, a greeting, one question, one answer.

A machine that joins has no certificate yet, so none is asked for; who shows one shows a good one of this cluster, or does not
come in. Connections, their number and their time are the door's; how often one may come is `authority.pace`'s.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence

from powermail.authority.pace import Pace
from powermail.authority.registrar import Registrar
from powermail.base import limits
from powermail.base.log import Event
from powermail.base.net import Listener
from powermail.base.tasks import Tasks
from powermail.base.world import World
from powermail.door.connection import Connection, Door, Draining, Gone
from powermail.wire import enrolment as forms
from powermail.wire.node_identity import Name, parse_names

NAME = "enrolment"


class AuthorityService:
    """Listens, and gives each connection to the registrar."""

    def __init__(
        self,
        world: World,
        registrar: Registrar,
        greeting: forms.Greeting,
        context: Callable[[], ssl.SSLContext],
        tasks: Tasks,
    ) -> None:
        """`context` asks for certificates and takes connections without; it is asked for anew for each connection."""
        self._world = world
        self._registrar = registrar
        self._greeting = forms.frame(greeting)
        self._context = context
        self._tasks = tasks
        most, each = limits.ENROLMENT_CONNECTIONS_MAX, limits.ENROLMENT_CONNECTIONS_PER_ADDRESS_MAX
        self.door = Door(world, NAME, tasks, self._serve, _nothing, most, each)
        self._pace = Pace(world.clock)
        self._listeners: list[Listener] = []

    async def listen(self, host: str, port: int) -> int:
        """Takes connections; the port. Raises OperatorError."""
        listener = await self._world.net.listen(host, port, self.door)
        self._listeners.append(listener)
        self._world.log.event(Event.LISTENING, door=NAME, address=f"{host}:{listener.port}")
        return listener.port

    async def close(self) -> None:
        """Ends what there is: who asked asks again."""
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        self.door.drain()
        await self._tasks.cancel()

    async def step(self) -> float:
        """A worker's: deadlines."""
        self.door.sweep()
        return 1.0

    # -- one connection --------------------------------------------------------------------------------------------

    async def _serve(self, connection: Connection) -> None:
        ends_at = self._world.clock.monotonic() + limits.ENROLMENT_TIMEOUT_S
        machine = forms.Registering()
        if not await self._turn(connection):
            return
        try:
            await self._secure(connection)
            connection.write(self._greeting)
            ask = None
            while ask is None:
                ask = machine.feed(await connection.receive(max(0.0, ends_at - self._world.clock.monotonic())))
        except (TimeoutError, Draining):
            self._refused(connection, "silent", "nothing was asked in time")
            connection.abort()
        except Gone:
            raise
        except OSError as error:
            self._refused(connection, "tls", str(error) or "the handshake failed")
            connection.abort()
        except forms.Broken as error:
            self._refused(connection, error.why, str(error))
            connection.write(forms.frame(forms.Refused(error.why, str(error))))
        else:
            connection.write(forms.frame(await self._registrar.answer(ask, _names(connection), connection.client)))

    async def _turn(self, connection: Connection) -> bool:
        """Waits for the turn of a connection; False if it is not heard."""
        wait_s = self._pace.wait_s(connection.client)
        if wait_s is None:
            self._refused(connection, "rate", "too many come in a short time")
            connection.abort()
            return False
        if wait_s:
            self._world.counters.add("authority.slowed")
            await asyncio.sleep(wait_s)
        return True

    async def _secure(self, connection: Connection) -> None:
        """The handshake. Raises TimeoutError, Draining, Gone, OSError."""
        first = await connection.receive(limits.ENROLMENT_TIMEOUT_S)
        oldest = self._pace.begin(connection)
        if oldest is not None:
            self._refused(oldest, "handshakes", "too many shake hands and get nowhere")
            oldest.abort()
        try:
            await connection.start_tls(self._context(), first)
        except OSError as error:
            if not self._pace.end(connection):
                raise Gone from error  # that was said
            raise
        finally:
            self._pace.end(connection)

    def _refused(self, connection: Connection, why: str, text: str) -> None:
        self._world.counters.add(f"authority.refused.{why}")
        self._world.log.event(Event.CONNECTION_REFUSED, door=NAME, client=connection.client, why=why, reason=text)


def _names(connection: Connection) -> Sequence[Name]:
    """The names in the certificate that was shown, and that TLS has checked."""
    assert connection.transport is not None
    certificate = connection.transport.get_extra_info("peercert") or {}
    return parse_names(certificate.get("subjectAltName", ()))


def _nothing(connection: Connection, why: str) -> bytes:
    """Before TLS nothing is said."""
    return b""
