"""Owns the listener that gives certificates: TLS first, a greeting, one question, one answer.

A machine that joins has no certificate yet, so none is asked for; who shows one shows a good one of this cluster, or does not
come in. Connections, their number and their time are the door's.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence

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
        try:
            first = await connection.receive(limits.ENROLMENT_TIMEOUT_S)
            await connection.start_tls(self._context(), first)
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
