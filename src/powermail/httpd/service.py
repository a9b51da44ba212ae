"""Owns the HTTP listener of monitoring: `/metrics`, `/live` and `/ready`, and nothing else.

HTTP is aiohttp's (docs/decisions/0006); connections, their number and their time are the door's. A connection is for one
request and ends within HTTP_CONNECTION_S, whatever its client does. Only GET and HEAD are known. What goes wrong here is
counted and logged, and is never mail's trouble: a listener that does not come about is tried again by a worker.
"""

from __future__ import annotations

import asyncio
import logging

from aiohttp import web
from aiohttp.http import HttpProcessingError
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from powermail.admin.desk import Desk
from powermail.base import limits
from powermail.base.errors import OperatorError, Trouble
from powermail.base.log import Event
from powermail.base.net import Listener, parse_host_port
from powermail.base.tasks import Tasks, report_bug
from powermail.base.world import World
from powermail.door.connection import Connection, Door, Draining, Gone
from powermail.door.life import Life
from powermail.httpd.figures import Looker
from powermail.httpd.metrics import Exposition

NAME = "httpd"


class _Reports(logging.Handler):
    """What aiohttp says: a request that cannot be read is its client's fault, all else is a bug of ours."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError | web.RequestPayloadError):
            self._world.counters.add(f"{NAME}.requests_bad")
        elif error is not None:
            report_bug(self._world.log, error, NAME)
        else:
            self._world.log.event(Event.TROUBLE, door=NAME, error=record.getMessage())


def _logger(world: World) -> logging.Logger:
    logger = logging.Logger(NAME)  # of this listener alone: nothing is written beside the event log
    logger.addHandler(_Reports(world))
    return logger


def refuse(connection: Connection, why: str) -> bytes:
    """What a client over the cap reads."""
    body = f"{why}\n".encode()
    fields = f"Content-Type: text/plain\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    return f"HTTP/1.1 503 Service Unavailable\r\n{fields}\r\n".encode() + body


class Monitor:
    """The listener, from the start of a process to its very end: it answers while the process drains."""

    def __init__(self, desk: Desk, life: Life, tasks: Tasks) -> None:
        """`tasks` owns its sessions, and nobody else's."""
        self._desk = desk
        self._life = life
        self._tasks = tasks
        self._world = desk.world
        self._clock = desk.world.clock
        self._looker = Looker(desk)
        self._look_at = self._clock.monotonic()
        self._exposition = Exposition(desk, self._looker, lambda: not self.why_not_ready())
        self._rendering = asyncio.Lock()
        self._made_at, self._text = float("-inf"), b""
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/live", self._live)
        app.router.add_get("/ready", self._ready)
        app.on_response_prepare.append(self._dress)
        self._runner = web.AppRunner(
            app,
            handle_signals=False,
            shutdown_timeout=limits.HTTP_LINGER_S,
            access_log=None,
            logger=_logger(self._world),
            keepalive_timeout=0,  # the door ends what takes too long
            auto_decompress=False,  # no body is wanted
            lingering_time=limits.HTTP_LINGER_S,
            max_line_size=limits.HTTP_LINE_OCTETS_MAX,
            max_field_size=limits.HTTP_FIELD_OCTETS_MAX,
            max_headers=limits.HTTP_FIELDS_MAX,
        )
        most = limits.HTTP_CONNECTIONS_MAX
        each = limits.HTTP_CONNECTIONS_PER_ADDRESS_MAX if desk.settings.metrics.allow_remote else most
        self.door = Door(self._world, NAME, tasks, self._serve, refuse, most, each)
        self._listeners: dict[str, Listener] = {}  # by the address of the settings

    # -- life -----------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Listens as far as it can; the worker tries what is left again, and says why it cannot."""
        await self._runner.setup()
        await self._listen()

    async def _listen(self) -> str:
        """Listens where it does not yet; why not everywhere."""
        troubles = []
        for address in self._desk.settings.metrics.listen:
            if address in self._listeners:
                continue
            try:
                host, port = parse_host_port(address)
                listener = self._listeners[address] = await self._world.net.listen(host, port, self.door)
            except OperatorError as error:
                troubles.append(str(error))
            else:
                self._world.log.event(Event.LISTENING, door=NAME, address=f"{host}:{listener.port}")
        return "; ".join(troubles)

    async def step(self) -> float:
        """A worker's: listens where it does not yet, and looks at figures when they are due. Raises Trouble."""
        trouble = await self._listen()
        now = self._clock.monotonic()
        if now >= self._look_at:
            self._look_at = now + await self._looker.look()  # which is due again at once if nobody answered
        if trouble:
            raise Trouble(trouble)
        return max(0.1, self._look_at - self._clock.monotonic())

    async def close(self) -> None:
        """Ends it, at the very end of the process."""
        for listener in self._listeners.values():
            listener.close()
        self._listeners.clear()
        await self._tasks.cancel()
        await self._runner.cleanup()

    # -- one connection -------------------------------------------------------------------------------------------

    async def _serve(self, connection: Connection) -> None:
        """Gives aiohttp what comes, for as long as a connection may take."""
        assert connection.transport is not None and self._runner.server is not None
        ends_at = self._clock.monotonic() + limits.HTTP_CONNECTION_S
        http = self._runner.server()
        http.connection_made(connection.transport)
        try:
            while (left_s := ends_at - self._clock.monotonic()) > 0:
                http.data_received(await connection.receive(left_s))
            raise TimeoutError
        except Gone:
            await self._linger(connection)
        except (TimeoutError, Draining):
            self._world.counters.add(f"{NAME}.timeout")
            connection.abort()
        finally:
            http.connection_lost(None)

    async def _linger(self, connection: Connection) -> None:
        """A client that has shut its writing side may still read, one that has gone looks the same: an answer gets a moment."""
        try:
            await connection.lost(limits.HTTP_LINGER_S)
        except (TimeoutError, Draining):
            connection.abort()

    async def _dress(self, request: web.Request, response: web.StreamResponse) -> None:
        """What every answer has in common."""
        self._world.counters.add(f"{NAME}.requests")
        response.force_close()
        response.headers["Connection"] = "close"
        response.headers["Server"] = "PowerMail"
        response.headers["Cache-Control"] = "no-store"
        response.headers["X-Content-Type-Options"] = "nosniff"

    # -- answers --------------------------------------------------------------------------------------------------

    def why_not_ready(self) -> str:
        """Why a balancer should send nothing here; "" while mail is taken."""
        life, desk = self._life, self._desk
        if life.draining:
            return "draining: the server is stopping"
        if not life.open:
            return "starting: the doors are not open yet"
        if life.broken:
            return "a storage invariant broke"
        if not desk.cluster.takes_mail():
            return f"mail is not accepted: fewer than {desk.cluster.copies_required} groups of nodes are writable"
        if desk.index.catching_up:
            return "the index is catching up with the nodes"
        return ""

    async def _live(self, request: web.Request) -> web.Response:
        return _line("a storage invariant broke" if self._life.broken else "", "alive")

    async def _ready(self, request: web.Request) -> web.Response:
        return _line(self.why_not_ready(), "ready")

    async def _metrics(self, request: web.Request) -> web.Response:
        """The text format of Prometheus, version 0.0.4, whatever is asked for: every collector reads it, at half the cost of
        OpenMetrics.
        """
        async with self._rendering:
            now = self._clock.monotonic()
            if now - self._made_at >= limits.METRICS_FRESH_S:
                self._made_at, self._text = now, await self._render()
        return web.Response(body=self._text, headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    async def _render(self) -> bytes:
        """All figures, in pieces of a millisecond, between which mail has its turn."""
        parts = []
        for piece in self._exposition.pieces():
            parts.append(generate_latest(piece))
            await asyncio.sleep(0)
        return b"".join(parts)


def _line(why_not: str, well: str) -> web.Response:
    """200, or 503 with one plain line that says why."""
    return web.Response(status=503 if why_not else 200, text=f"{why_not or well}\n")
